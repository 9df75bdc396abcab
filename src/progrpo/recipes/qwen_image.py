"""Recipes of Qwen-Image."""

from __future__ import annotations

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
from progrpo.recipes.published import ATTENTION


def qwen_image_edit() -> Config:
    """Qwen-Image-Edit, which edits, towards RationalRewards; bring edits.jsonl and eval.jsonl.

    A line of those is {"prompt": ..., "image": a path}. Size, steps, guidance, noise, the window of three steps before
    the seventh, LoRA, rate, clip range and prompts per iteration are verl-omni's public settings for this model, in
    groups of 16 (`--plan.preset custom --plan.group-size 16`) and towards PickScore, which does not see the source. The
    reward is Flow-Factory's for the same pipeline: a server has to run it (docs/rewards.md). The plan is Pro-GRPO's
    (arXiv 2512.15347), which was not published on this model.
    """
    feed_forward = "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"
    return Config(
        recipe="qwen-image-edit",
        iterations=300,
        model=ModelSettings(
            path="Qwen/Qwen-Image-Edit-2511",
            lora_rank=64,
            lora_alpha=128,
            lora_targets=(*ATTENTION, *feed_forward),
            resolution=512,
            dtype="bfloat16",
            activation_checkpointing=True,
        ),
        prompts=PromptSettings(source="edits.jsonl", per_iteration=32),
        sampling=SamplingSettings(
            num_inference_steps=12,
            guidance_scale=4.0,
            negative_prompt=" ",
            noise_level=0.7,
            latent_dtype="bfloat16",
            sde_window="random",
            sde_window_size=3,
            sde_window_end=6,
            microbatch=4,
        ),
        plan=PlanSettings(preset="standard"),
        reward=RewardSettings((RewardTerm("rationalrewards_edit"),)),
        objective=ObjectiveSettings(grpo=GRPOSettings(clip_range=1e-4)),
        optim=OptimSettings(lr=3e-4, updates_per_rollout=2, microbatch=1),
        eval=EvalSettings(prompts="eval.jsonl", pictures=64, num_inference_steps=40, guidance_scale=4.0),
    )
