"""Recipes of FLUX.1 and FLUX.2."""

from __future__ import annotations

from dataclasses import replace

from progrpo.config import (
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


def flux_pickscore() -> Config:
    """FLUX.1-dev towards PickScore at 512 pixels, in six steps; bring prompts.txt and eval.txt.

    The settings are Flow-GRPO's for this model (arXiv 2505.05470), with embedded guidance and the model's own shift.
    Its baseline is `--plan.preset none`, a group of 24. The plan is Pro-GRPO's (arXiv 2512.15347), which was not
    published on FLUX.
    """
    feed_forward = "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"
    return Config(
        recipe="flux-pickscore",
        iterations=1000,
        model=ModelSettings(
            path="black-forest-labs/FLUX.1-dev",
            lora_rank=64,
            lora_alpha=128,
            lora_targets=(*ATTENTION, *feed_forward),
            max_sequence_length=128,
            resolution=512,
            dtype="bfloat16",
            activation_checkpointing=True,
        ),
        prompts=PromptSettings(source="prompts.txt", per_iteration=48),
        sampling=SamplingSettings(
            num_inference_steps=6, guidance_scale=3.5, embedded_guidance=True, noise_level=0.9, microbatch=8
        ),
        plan=PlanSettings(preset="standard"),
        reward=RewardSettings((RewardTerm("pickscore"),)),
        optim=OptimSettings(lr=3e-4, updates_per_rollout=2, microbatch=4, ema_decay=EMA_OF_TWO_UPDATES),
        eval=EvalSettings(prompts="eval.txt", pictures=200, num_inference_steps=28, guidance_scale=3.5),
    )


def kontext_vlm() -> Config:
    """FLUX.1 Kontext, which edits, towards the marks of a vision model; bring edits.jsonl and eval.jsonl.

    A line of those is {"prompt": ..., "image": a path, "question": the question to the judge}. The judge does not see
    the source, so the question must say what is to stay as it is. A reward of your own that takes `image` may compare.
    The network's settings are those of `flux-pickscore`, Flow-GRPO's on FLUX.1-dev (arXiv 2505.05470), and the
    guidance is Kontext's own (arXiv 2506.15742). These settings and the reward are our choice for editing: nobody has
    published such a run with this plan.
    """
    base = flux_pickscore()
    return replace(
        base,
        recipe="kontext-vlm",
        model=replace(base.model, path="black-forest-labs/FLUX.1-Kontext-dev"),
        prompts=replace(base.prompts, source="edits.jsonl"),
        sampling=replace(base.sampling, guidance_scale=2.5),
        reward=RewardSettings((RewardTerm("vlm"),)),
        eval=replace(base.eval, prompts="eval.jsonl", guidance_scale=2.5),
    )


def flux2_klein_pickscore() -> Config:
    """FLUX.2 klein (4B) towards PickScore at 384 pixels, in eight steps; bring prompts.txt and eval.txt.

    Size, steps, guidance, noise, rank, rate, clip range, prompts and the one random step that is trained are
    Flow-Factory's public settings for the base models, in groups of 16 (`--plan.preset custom --plan.group-size 16`).
    It trains the model of 9 billion parameters, of pictures as well (`--model.path
    black-forest-labs/FLUX.2-klein-base-9B`). Its step is one of the second to the fourth, ours may be the first too.
    The plan is Pro-GRPO's (arXiv 2512.15347), which was not published on FLUX.2.
    """
    return Config(
        recipe="flux2-klein-pickscore",
        iterations=1000,
        model=ModelSettings(
            path="black-forest-labs/FLUX.2-klein-base-4B",
            lora_rank=64,
            lora_alpha=128,
            max_sequence_length=512,
            resolution=384,
            dtype="bfloat16",
        ),
        prompts=PromptSettings(source="prompts.txt", per_iteration=48),
        sampling=SamplingSettings(
            num_inference_steps=8,
            guidance_scale=4.0,
            noise_level=0.7,
            sde_window="random",
            sde_window_size=1,
            sde_window_end=4,
            microbatch=8,
        ),
        plan=PlanSettings(preset="standard"),
        reward=RewardSettings((RewardTerm("pickscore"),)),
        objective=ObjectiveSettings(grpo=GRPOSettings(clip_range=1e-4)),
        optim=OptimSettings(lr=3e-4, updates_per_rollout=2, microbatch=4, ema_decay=EMA_OF_TWO_UPDATES),
        eval=EvalSettings(prompts="eval.txt", pictures=200, num_inference_steps=28, guidance_scale=4.0),
    )


def flux_pickscore_24gb() -> Config:
    """`flux-pickscore` on one GPU of 24 GB, its frozen weights in 8 bits; bring prompts.txt and eval.txt."""
    config = lean(flux_pickscore(), 24, sampled=4, trained=2)
    return replace(config, model=replace(config.model, quantize="int8", offload=True, decoding="sliced"))


def flux_pickscore_48gb() -> Config:
    """`flux-pickscore` on one GPU of 48 GB, 8 prompts per iteration; bring prompts.txt and eval.txt."""
    return lean(flux_pickscore(), 48, sampled=4, trained=4)


def flux_pickscore_80gb() -> Config:
    """`flux-pickscore` on one GPU of 80 GB, 8 prompts per iteration; bring prompts.txt and eval.txt."""
    return lean(flux_pickscore(), 80, sampled=16, trained=8)
