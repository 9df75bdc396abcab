"""Recipes of the built-in models."""

from __future__ import annotations

from dataclasses import replace

from progrpo.config import (
    AuditSettings,
    CheckpointSettings,
    Config,
    DGPOSettings,
    EvalSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimSettings,
    PlanSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
    SamplingSettings,
)

# without the distance to the base two of four runs fell back, at half the rate
_HELD_NEAR_BASE = ObjectiveSettings(name="dgpo", dgpo=DGPOSettings(draws=2, kl_beta=0.01))


def _small_groups() -> Config:
    """Small plain groups and many updates by DGPO on the verifier: what the recipes of built-in models have in common.

    The objective has one deviation for all groups, so that those that are nearly decided count less; the noisier
    levels, where a picture's objects are decided; and a group's weight that fades later.
    """
    return Config(
        iterations=220,
        model=ModelSettings(weights="full", dtype="auto"),
        prompts=PromptSettings(per_iteration=6),
        # given rather than measured, so that equal seeds give equal runs; these microbatches fill up with whole groups
        sampling=SamplingSettings(num_inference_steps=6, microbatch=72),
        plan=PlanSettings(preset="custom", group_size=12),
        reward=RewardSettings((RewardTerm("shapes_mixed"),)),
        objective=ObjectiveSettings(
            name="dgpo",
            advantage="batch",
            dgpo=DGPOSettings(draws=2, kl_beta=0.01, dpo_beta=50.0, time_fraction=0.5),
        ),
        optim=OptimSettings(lr=2e-4, decay=1.0, max_grad_norm=0.1, microbatch=72, ema_decay=0.9),
        audit=AuditSettings(every=25),
        eval=EvalSettings(every=55, keep_best=True),
        checkpoint=CheckpointSettings(every=25),
    )


def quickstart() -> Config:
    """Teach the built-in model in minutes on two CPU cores; half of each group is stopped early.

    The reward is the match without thresholds. The strict verdict stands beside it and is never trained on.
    `--plan.prune` without points prunes nothing.
    """
    base = _small_groups()
    return replace(
        base,
        recipe="quickstart",
        iterations=310,
        plan=replace(base.plan, prune=((2, 6),)),
        reward=RewardSettings((RewardTerm("shapes_match"),)),
        optim=replace(base.optim, lr=3e-4),
        audit=AuditSettings(every=31),
        eval=replace(base.eval, every=62),
        checkpoint=CheckpointSettings(every=31),
    )


def shapes_diffusion() -> Config:
    """Teach the built-in diffusion model, a U-Net that predicts noise, in minutes on two CPU cores.

    Half of each group is stopped before the last network call. The reward is the match without thresholds.
    """
    base = _small_groups()
    return replace(
        base,
        recipe="shapes-diffusion",
        iterations=152,
        model=replace(base.model, path="shapes-diffusion"),
        plan=replace(base.plan, prune=((4, 6),)),
        reward=RewardSettings((RewardTerm("shapes_match"),)),
        optim=replace(base.optim, lr=1e-4),
        audit=AuditSettings(every=19),
        eval=replace(base.eval, every=76),
        checkpoint=CheckpointSettings(every=19),
    )


def words_flow() -> Config:
    """Teach the built-in model of words to spell by a text recogniser, in 20 minutes on a CPU.

    The recogniser is PP-OCRv6 in rapidocr's package (`pip install 'progrpo[ocr]'`). It reads the inked part of a
    picture as one line. `ocr`, which searches the picture for lines first, judges from outside.
    """
    base = _small_groups()
    return replace(
        base,
        recipe="words-flow",
        iterations=150,
        model=replace(base.model, path="words-flow"),
        prompts=replace(base.prompts, source="words"),
        reward=RewardSettings((RewardTerm("ocr_line"),)),
        objective=_HELD_NEAR_BASE,
        eval=replace(base.eval, every=50, prompts="words", pictures=384, rewards=(RewardTerm("ocr"),)),
    )


def preferences() -> Config:
    """Align the built-in model with a reward model of your own pairs, in minutes; train that first.

    The reward model is the folder `reward-model` (docs/preferences.md). The hidden taste of the example
    (examples/preferences.py) and the strict verdict judge from outside. One prompt an iteration is enough where a taste
    asks the same of every prompt: more prompts would teach the same (arXiv 1812.06162).
    """
    base = _small_groups()
    return replace(
        base,
        recipe="preferences",
        iterations=60,
        model=replace(base.model, dtype="float32"),
        prompts=PromptSettings(per_iteration=1),
        sampling=replace(base.sampling, microbatch=24),
        reward=RewardSettings((RewardTerm("reward_model", model="reward-model"),)),
        objective=_HELD_NEAR_BASE,
        optim=replace(base.optim, microbatch=24),
        audit=AuditSettings(every=0),
        eval=replace(
            base.eval,
            every=20,
            keep_best=False,
            pictures=256,
            rewards=(RewardTerm("shapes_taste"), RewardTerm("shapes_strict")),
        ),
    )


def smoke() -> Config:
    """Two tiny iterations of everything, in seconds: for tests; it learns nothing."""
    return Config(
        recipe="smoke",
        iterations=2,
        prompts=PromptSettings(per_iteration=2),
        sampling=SamplingSettings(num_inference_steps=6, microbatch=12),
        plan=PlanSettings(preset="custom", group_size=6, prune=((3, 4),)),
        optim=OptimSettings(microbatch=40),
        audit=AuditSettings(every=2),
        eval=EvalSettings(pictures=12, num_inference_steps=6),
        checkpoint=CheckpointSettings(every=1),
    )
