"""Recipes of Wan, which makes videos."""

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

_WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，"
    "倒着走"
)
"""The default negative prompt of Wan's own code."""


def wan_pickscore() -> Config:
    """Videos by Wan 2.1 (1.3B) towards PickScore of their frames; bring prompts.txt and eval.txt.

    The step's noise and the clip range of 1e-4 are DanceGRPO's (arXiv 2505.07818): the default range follows the
    latent's size and would be 7.3e-6 here. Guidance, negative prompt, shift and size are Wan's own (arXiv 2503.20314).
    The rest is our choice, and we have not run it: a LoRA, 33 frames, 20 steps, and a plan that halves groups after
    twelve of them.
    """
    return Config(
        recipe="wan-pickscore",
        iterations=300,
        model=ModelSettings(
            path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            lora_rank=32,
            lora_alpha=64,
            frames=33,
            dtype="bfloat16",
            activation_checkpointing=True,
        ),
        prompts=PromptSettings(source="prompts.txt", per_iteration=8),
        sampling=SamplingSettings(
            num_inference_steps=20, guidance_scale=5.0, negative_prompt=_WAN_NEGATIVE, sampler="dance", microbatch=1
        ),
        plan=PlanSettings(preset="custom", group_size=16, prune=((11, 8),)),
        reward=RewardSettings((RewardTerm("pickscore"),)),
        objective=ObjectiveSettings(grpo=GRPOSettings(clip_range=1e-4)),
        optim=OptimSettings(lr=1e-4, microbatch=1),
        eval=EvalSettings(prompts="eval.txt", pictures=32, num_inference_steps=50, guidance_scale=5.0),
    )


def wan22_pickscore() -> Config:
    """Videos by Wan 2.2 (A14B) towards PickScore of their frames; bring prompts.txt and eval.txt.

    Size, frames, steps, noise, rank, rate, clip range, prompts and the one random step that is trained are
    Flow-Factory's public settings for this model, in groups of 16 (`--plan.preset custom --plan.group-size 16`). Its
    step is one of the second to the fourth, ours may be the first too. It guides the denoiser of low noise by 3, here
    both are guided by 4. The negative prompt is Wan's own. The plan is Pro-GRPO's (arXiv 2512.15347), which was not
    published on videos.
    """
    return Config(
        recipe="wan22-pickscore",
        iterations=300,
        model=ModelSettings(
            path="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            lora_rank=64,
            lora_alpha=128,
            resolution=480,
            frames=5,
            dtype="bfloat16",
            activation_checkpointing=True,
        ),
        prompts=PromptSettings(source="prompts.txt", per_iteration=48),
        sampling=SamplingSettings(
            num_inference_steps=10,
            guidance_scale=4.0,
            negative_prompt=_WAN_NEGATIVE,
            noise_level=0.9,
            latent_dtype="bfloat16",
            sde_window="random",
            sde_window_size=1,
            sde_window_end=4,
            microbatch=2,
        ),
        plan=PlanSettings(preset="standard"),
        reward=RewardSettings((RewardTerm("pickscore"),)),
        objective=ObjectiveSettings(grpo=GRPOSettings(clip_range=1e-4)),
        optim=OptimSettings(lr=1e-4, updates_per_rollout=2, microbatch=1, ema_decay=EMA_OF_TWO_UPDATES),
        eval=EvalSettings(prompts="eval.txt", pictures=32, num_inference_steps=28, guidance_scale=4.0),
    )
