"""Recipes of Stable Diffusion 1.4 and 3.5."""

from __future__ import annotations

from dataclasses import replace

from progrpo.config import (
    AWMSettings,
    Config,
    EvalSettings,
    GRPOSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimSettings,
    PlanSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
    SamplingSettings,
)
from progrpo.recipes.published import ATTENTION, EMA_OF_TWO_UPDATES, lean


def sd14_hpsv2() -> Config:
    """The paper's run on SD 1.4 towards HPSv2.1, 48 -> 32 -> 8; bring prompts.txt and eval.txt.

    The settings are DanceGRPO's (arXiv 2505.07818), whose baseline is `--plan.preset custom --plan.group-size 16`. The
    plan is Pro-GRPO's (arXiv 2512.15347), whose learning settings are not public.
    """
    return Config(
        recipe="sd14-hpsv2",
        iterations=300,
        model=ModelSettings(path="CompVis/stable-diffusion-v1-4", weights="full", dtype="bfloat16"),
        prompts=PromptSettings(source="prompts.txt", per_iteration=32),
        sampling=SamplingSettings(num_inference_steps=50, guidance_scale=5.0, same_latent=True, microbatch=16),
        plan=PlanSettings(preset="sd14"),
        reward=RewardSettings((RewardTerm("hpsv2"),)),
        optim=OptimSettings(lr=1e-5, updates_per_rollout=2, microbatch=8),
        eval=EvalSettings(prompts="eval.txt", pictures=200, num_inference_steps=50, guidance_scale=5.0),
    )


def _sd35m(task: str, kl_beta: float, prompts: str = "txt", reward: str = "") -> Config:
    """Flow-GRPO's settings on SD 3.5 Medium (arXiv 2505.05470), with Pro-GRPO's plan.

    Tasks differ in reward, prompts and KL. Pro-GRPO's own learning settings are not public. The std of advantages is
    that of the survivors, as in its paper; flow_grpo takes that of the whole batch: `--objective.advantage batch`.
    """
    return Config(
        recipe=f"sd35m-{task}",
        iterations=1000,
        model=ModelSettings(
            path="stabilityai/stable-diffusion-3.5-medium",
            lora_rank=32,
            lora_alpha=64,
            lora_targets=ATTENTION,
            max_sequence_length=128,
            resolution=512,
            dtype="bfloat16",
        ),
        prompts=PromptSettings(source=f"prompts.{prompts}", per_iteration=48),
        sampling=SamplingSettings(guidance_scale=4.5, microbatch=8),
        plan=PlanSettings(preset="standard"),
        reward=RewardSettings((RewardTerm(reward or task),)),
        objective=ObjectiveSettings(grpo=GRPOSettings(kl_beta=kl_beta, kl_form="flow_grpo")),
        optim=OptimSettings(lr=3e-4, updates_per_rollout=2, microbatch=8, ema_decay=EMA_OF_TWO_UPDATES),
        eval=EvalSettings(prompts=f"eval.{prompts}", pictures=200, num_inference_steps=40, guidance_scale=4.5),
    )


def sd35m_pickscore() -> Config:
    """The paper's run on SD 3.5 Medium towards PickScore; bring prompts.txt and eval.txt.

    The plan is `standard`, or `--plan.preset flash` (Pro-GRPO, arXiv 2512.15347, whose learning settings are not
    public). The rest is Flow-GRPO's (arXiv 2505.05470), whose baseline is `--plan.preset none`, a group of 24.
    """
    return _sd35m("pickscore", kl_beta=0.01)


def sd35m_hpsv2() -> Config:
    """The paper's other reward on SD 3.5 Medium, HPSv2.1; bring prompts.txt and eval.txt.

    Pro-GRPO (arXiv 2512.15347) names such a run without its settings, and Flow-GRPO (arXiv 2505.05470) has none. These
    are Flow-GRPO's settings for PickScore, the other reward of human preferences.
    """
    return _sd35m("hpsv2", kl_beta=0.01)


def sd35m_geneval() -> Config:
    """SD 3.5 Medium towards GenEval's checks; bring prompts.jsonl and eval.jsonl, GenEval's metadata.

    The settings and the reward's value are Flow-GRPO's (arXiv 2505.05470). The plan is Pro-GRPO's (arXiv 2512.15347),
    which was not published with this reward. The value of `--reward.terms geneval` stays in 0..1.
    """
    return _sd35m("geneval", kl_beta=0.04, prompts="jsonl", reward="geneval_flow_grpo")


def sd35m_ocr() -> Config:
    """SD 3.5 Medium towards text that can be read; bring prompts.txt and eval.txt, with texts in quotes.

    The settings are Flow-GRPO's for this task (arXiv 2505.05470). The plan is Pro-GRPO's (arXiv 2512.15347), which was
    not published with this reward.
    """
    return _sd35m("ocr", kl_beta=0.04)


def sd35m_awm() -> Config:
    """SD 3.5 Medium towards PickScore by AWM, with its authors' settings; bring prompts.txt and eval.txt.

    The settings come from their public configuration for one node of eight GPUs (arXiv 2509.25050), whose baseline is
    `--plan.preset none`, a group of 24. Their solver is SA-Solver, ours the ODE's Euler steps. The plan is Pro-GRPO's
    (arXiv 2512.15347), which was not published with this objective. Flow-Factory's settings are the objective's
    defaults, with `weighting ghuber`.
    """
    base = _sd35m("awm", kl_beta=0.0, reward="pickscore")
    return replace(
        base,
        prompts=replace(base.prompts, per_iteration=24),
        sampling=replace(base.sampling, num_inference_steps=14, guidance_scale=1.0),
        objective=ObjectiveSettings(
            name="awm",
            advantage="batch",
            awm=AWMSettings(weighting="ghuber", adv_clip_max=5.0, adv_scale=0.2, average_ramp=1e-3),
        ),
        optim=replace(base.optim, updates_per_rollout=1, ema_decay=0.99),
        eval=replace(base.eval, guidance_scale=1.0),
    )


def sd35m_pickscore_24gb() -> Config:
    """`sd35m-pickscore` on one GPU of 24 GB, 8 prompts per iteration; bring prompts.txt and eval.txt."""
    return lean(sd35m_pickscore(), 24, sampled=4, trained=4)


def sd35m_pickscore_48gb() -> Config:
    """`sd35m-pickscore` on one GPU of 48 GB, 8 prompts per iteration; bring prompts.txt and eval.txt."""
    return lean(sd35m_pickscore(), 48, sampled=16, trained=8)


def sd35m_pickscore_80gb() -> Config:
    """`sd35m-pickscore` on one GPU of 80 GB, 8 prompts per iteration; bring prompts.txt and eval.txt."""
    return lean(sd35m_pickscore(), 80, sampled=32, trained=8, checkpointing=False)


def sd3() -> Config:
    """Pro-GRPO with the paper's plan on Stable Diffusion 3.5: a start for a task of your own."""
    return Config(
        recipe="sd3",
        iterations=300,
        model=ModelSettings(
            path="stabilityai/stable-diffusion-3.5-medium",
            lora_rank=32,
            lora_alpha=64,
            max_sequence_length=128,
            resolution=512,
            dtype="bfloat16",
        ),
        sampling=SamplingSettings(guidance_scale=4.5, microbatch=8),
        plan=PlanSettings(preset="standard"),
        optim=OptimSettings(lr=3e-4, microbatch=8, ema_decay=0.9),
        eval=EvalSettings(guidance_scale=4.5),
    )
