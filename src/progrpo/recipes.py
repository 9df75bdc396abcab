"""Vetted configurations, as functions: the first line of each docstring is what `progrpo recipes` shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from progrpo.config import (
    AuditConfig,
    CheckpointConfig,
    Config,
    DGPOConfig,
    EvalConfig,
    GRPOConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PlanConfig,
    PromptConfig,
    RewardConfig,
    RewardTerm,
    SamplingConfig,
    config_from_json,
    nearest,
)


def quickstart() -> Config:
    """Expand, prune and learn on the built-in model, in minutes on two CPU cores."""
    return Config(
        recipe="quickstart",
        iterations=80,
        model=ModelConfig(weights="full", dtype="auto"),
        prompts=PromptConfig(per_iteration=12),
        # microbatches are not left to be measured, so that equal seeds give equal runs; these fill up and hold groups whole
        sampling=SamplingConfig(num_inference_steps=8, microbatch=48),
        plan=PlanConfig(preset="custom", group_size=24, prune=((4, 12),)),
        reward=RewardConfig((RewardTerm("shapes_mixed"),)),
        objective=ObjectiveConfig(name="dgpo", dgpo=DGPOConfig(draws=2, kl_beta=0.0)),
        optim=OptimConfig(lr=1e-4, decay=1.0, max_grad_norm=0.1, microbatch=72, ema_decay=0.9),
        audit=AuditConfig(every=10),
        eval=EvalConfig(every=10, keep_best=True),
        checkpoint=CheckpointConfig(every=10),
    )


def shapes_diffusion() -> Config:
    """The quickstart on the built-in diffusion model: a U-Net that says noise, sampled by DDIM."""
    base = quickstart()
    return replace(
        base,
        recipe="shapes-diffusion",
        iterations=50,  # over 80 the rate stays high for longer, and a third of the gain is lost again
        model=replace(base.model, path="shapes-diffusion"),
    )


def sd14_hpsv2() -> Config:
    """The paper's run on SD 1.4 towards HPSv2.1, 48 -> 32 -> 8; bring prompts.txt and eval.txt.

    DanceGRPO's settings (arXiv 2505.07818), whose baseline is `--plan.preset custom --plan.group-size 16`; the plan is Pro-GRPO's
    (arXiv 2512.15347), and its learning settings are not known in public.
    """
    return Config(
        recipe="sd14-hpsv2",
        iterations=300,
        model=ModelConfig(path="CompVis/stable-diffusion-v1-4", weights="full", dtype="bfloat16"),
        prompts=PromptConfig(source="prompts.txt", per_iteration=32),
        sampling=SamplingConfig(num_inference_steps=50, guidance_scale=5.0, same_latent=True, microbatch=16),
        plan=PlanConfig(preset="sd14"),
        reward=RewardConfig((RewardTerm("hpsv2"),)),
        optim=OptimConfig(lr=1e-5, updates_per_rollout=2, microbatch=8),
        eval=EvalConfig(prompts="eval.txt", pictures=200, num_inference_steps=50, guidance_scale=5.0),
    )


def sd35m_pickscore() -> Config:
    """The paper's run on SD 3.5 Medium towards PickScore; bring prompts.txt and eval.txt.

    Plan `standard`, or `--plan.preset flash` (Pro-GRPO, arXiv 2512.15347, whose learning settings are not known in public);
    the rest is Flow-GRPO's (arXiv 2505.05470), whose baseline is `--plan.preset none`, a group of 24.
    """
    return Config(
        recipe="sd35m-pickscore",
        iterations=1000,
        model=ModelConfig(
            path="stabilityai/stable-diffusion-3.5-medium",
            lora_rank=32,
            lora_alpha=64,
            max_sequence_length=128,
            dtype="bfloat16",
        ),
        prompts=PromptConfig(source="prompts.txt", per_iteration=48),
        sampling=SamplingConfig(guidance_scale=4.5, microbatch=8),
        plan=PlanConfig(preset="standard"),
        reward=RewardConfig((RewardTerm("pickscore"),)),
        objective=ObjectiveConfig(grpo=GRPOConfig(kl_beta=0.01, kl_form="flow_grpo")),
        optim=OptimConfig(lr=3e-4, updates_per_rollout=2, microbatch=8, ema_decay=0.9),
        eval=EvalConfig(prompts="eval.txt", pictures=200, num_inference_steps=40, guidance_scale=4.5),
    )


def sd3() -> Config:
    """Pro-GRPO with the paper's plan on Stable Diffusion 3.5, to begin with for a task of one's own."""
    return Config(
        recipe="sd3",
        iterations=300,
        model=ModelConfig(
            path="stabilityai/stable-diffusion-3.5-medium",
            lora_rank=32,
            lora_alpha=64,
            max_sequence_length=128,
            dtype="bfloat16",
        ),
        sampling=SamplingConfig(guidance_scale=4.5, microbatch=8),
        plan=PlanConfig(preset="standard"),
        optim=OptimConfig(lr=3e-4, microbatch=8, ema_decay=0.9),
        eval=EvalConfig(guidance_scale=4.5),
    )


def smoke() -> Config:
    """Two tiny iterations of everything, in seconds: for tests, learns nothing."""
    return Config(
        recipe="smoke",
        iterations=2,
        prompts=PromptConfig(per_iteration=2),
        sampling=SamplingConfig(num_inference_steps=6, microbatch=12),
        plan=PlanConfig(preset="custom", group_size=6, prune=((3, 4),)),
        optim=OptimConfig(microbatch=40),
        audit=AuditConfig(every=2),
        eval=EvalConfig(pictures=12, num_inference_steps=6),
        checkpoint=CheckpointConfig(every=1),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "quickstart": quickstart,
    "shapes-diffusion": shapes_diffusion,
    "sd14-hpsv2": sd14_hpsv2,
    "sd35m-pickscore": sd35m_pickscore,
    "sd3": sd3,
    "smoke": smoke,
}


def describe(name: str) -> str:
    """One line on a shipped recipe."""
    return (RECIPES[name].__doc__ or "").partition("\n")[0]


def load_recipe(name: str) -> Config:
    """The configuration of a shipped recipe, of a JSON file, or of a run folder (its config.json)."""
    if name in RECIPES:
        return RECIPES[name]()
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ValueError(
            f"{name} is no recipe ({', '.join(RECIPES)}), config file or run folder{nearest(name, RECIPES)}"
        )
    try:
        return config_from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path}: {error}") from None
