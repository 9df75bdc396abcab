"""Recipes of SANA."""

from __future__ import annotations

from progrpo.config import (
    Config,
    EvalSettings,
    ModelSettings,
    NFTSettings,
    ObjectiveSettings,
    OptimSettings,
    PlanSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
    SamplingSettings,
)


def sana_pickscore() -> Config:
    """SANA (1.6B) towards PickScore by DiffusionNFT at 1024 pixels; bring prompts.txt and eval.txt.

    Objective, size, steps without guidance and noise, layers of the LoRA and the std of the whole batch are those of
    the public configuration of SANA's authors (Sol-RL, arXiv 2604.06916), whose baseline is `--plan.preset none`, a
    group of 24. They train a SANA of their own with linear feed-forward layers, and solve by other steps than Euler's.
    Rank and rate of the LoRA are our choice, Flow-GRPO's on SD 3.5 (arXiv 2505.05470). The plan is Pro-GRPO's (arXiv
    2512.15347), which was not published with this model or objective.
    """
    layers = tuple(f"{block}.{name}" for block in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0"))
    return Config(
        recipe="sana-pickscore",
        iterations=1000,
        model=ModelSettings(
            path="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
            lora_rank=32,
            lora_alpha=64,
            lora_targets=layers,
            resolution=1024,
            dtype="bfloat16",
        ),
        prompts=PromptSettings(source="prompts.txt", per_iteration=48),
        sampling=SamplingSettings(num_inference_steps=10, microbatch=8),
        plan=PlanSettings(preset="standard"),
        reward=RewardSettings((RewardTerm("pickscore"),)),
        objective=ObjectiveSettings(name="nft", advantage="batch", nft=NFTSettings(beta=1.0, kl_beta=1e-4)),
        optim=OptimSettings(lr=3e-4, microbatch=8),
        eval=EvalSettings(prompts="eval.txt", pictures=200, num_inference_steps=40),
    )
