"""Vetted configurations, as functions: the first line of each docstring is what `progrpo recipes` shows."""

from __future__ import annotations

import os
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
from progrpo.words import named


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


def flux_pickscore() -> Config:
    """FLUX.1-dev towards PickScore at 512 pixels, in six steps; bring prompts.txt and eval.txt.

    Flow-GRPO's settings for it (arXiv 2505.05470), with embedded guidance and the model's own shift; its baseline is
    `--plan.preset none`, a group of 24. The plan is Pro-GRPO's (arXiv 2512.15347), which was not published on FLUX.
    """
    attention = "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
    feed_forward = "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"
    return Config(
        recipe="flux-pickscore",
        iterations=1000,
        model=ModelConfig(
            path="black-forest-labs/FLUX.1-dev",
            lora_rank=64,
            lora_alpha=128,
            lora_targets=(*(f"attn.{name}" for name in attention), *feed_forward),
            max_sequence_length=128,
            resolution=512,
            dtype="bfloat16",
            activation_checkpointing=True,
        ),
        prompts=PromptConfig(source="prompts.txt", per_iteration=48),
        sampling=SamplingConfig(
            num_inference_steps=6, guidance_scale=3.5, embedded_guidance=True, noise_level=0.9, microbatch=8
        ),
        plan=PlanConfig(preset="standard"),
        reward=RewardConfig((RewardTerm("pickscore"),)),
        optim=OptimConfig(lr=3e-4, updates_per_rollout=2, microbatch=4, ema_decay=0.9),
        eval=EvalConfig(prompts="eval.txt", pictures=200, num_inference_steps=28, guidance_scale=3.5),
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
    "flux-pickscore": flux_pickscore,
    "sd3": sd3,
    "smoke": smoke,
}


_MOST_BYTES = 1_000_000  # a configuration takes about 3,000


def describe(name: str) -> str:
    """One line on a shipped recipe."""
    return (RECIPES[name].__doc__ or "").partition("\n")[0]


def load_recipe(name: str) -> Config:
    """The configuration of a shipped recipe, of a JSON file, or of a run folder (its config.json)."""
    if name in RECIPES:
        return RECIPES[name]()
    # os.path asks what Path would raise at: a name too long for a path, or with a NUL in it
    path = Path(name, "config.json") if os.path.isdir(name) else Path(name)
    if not os.path.isfile(path):
        raise ValueError(
            f"{named(name)} is no recipe ({', '.join(RECIPES)}), config file or run folder{nearest(name, RECIPES)}"
        )
    try:
        return config_from_json(_text_of(path))
    except OSError as error:
        raise ValueError(f"{named(path)} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{named(path)}: not UTF-8 text; save the file as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{named(path)}: {error}") from None


def _text_of(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"over {_MOST_BYTES // 10**6} MB, so no configuration; give a recipe's JSON or a run folder")
    return content.decode("utf-8-sig")
