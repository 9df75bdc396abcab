"""Recipes of Z-Image."""

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
from progrpo.recipes.published import EMA_OF_TWO_UPDATES


def z_image_pickscore() -> Config:
    """Z-Image-Turbo towards PickScore at 512 pixels on one GPU of 16 GB; bring prompts.txt and eval.txt.

    Size, steps, noise, LoRA, rate, clip range and the one random step that is trained are Flow-Factory's public
    settings for this model, without guidance, in groups of 16 (`--plan.preset custom --plan.group-size 16`). Its step
    is one of the second to the fourth, ours may be the first too. The plan is Pro-GRPO's (arXiv 2512.15347), which was
    not published on Z-Image. Our choice for 16 GB are weights in 8 bits, 8 prompts per iteration where Flow-Factory
    has 48 on eight GPUs, small microbatches, and a denoiser and a text encoder that take turns. The fit is calculated
    (`progrpo plan z-image-pickscore --gpu rtx5080`), not measured.
    """
    return Config(
        recipe="z-image-pickscore",
        iterations=1000,
        model=ModelSettings(
            path="Tongyi-MAI/Z-Image-Turbo",
            lora_rank=64,
            lora_alpha=128,
            max_sequence_length=512,
            resolution=512,
            dtype="bfloat16",
            quantize="int8",
            activation_checkpointing=True,
            offload=True,
        ),
        prompts=PromptSettings(source="prompts.txt", per_iteration=8),
        sampling=SamplingSettings(
            num_inference_steps=6,
            noise_level=0.7,
            latent_dtype="bfloat16",
            sde_window="random",
            sde_window_size=1,
            sde_window_end=4,
            microbatch=2,
        ),
        plan=PlanSettings(preset="standard"),
        reward=RewardSettings((RewardTerm("pickscore"),)),
        objective=ObjectiveSettings(grpo=GRPOSettings(clip_range=1e-4)),
        optim=OptimSettings(lr=3e-4, updates_per_rollout=2, microbatch=1, ema_decay=EMA_OF_TWO_UPDATES),
        eval=EvalSettings(prompts="eval.txt", pictures=200, num_inference_steps=10),
    )
