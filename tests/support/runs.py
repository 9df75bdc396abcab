"""The parts of a run of a tiny pipeline: prompts, a reward, a configuration, a policy and a trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.copies import Copies
from tests.support.pipelines import frames_of

PROMPTS = ("red cat", "blue dog", "green bird")


def redness(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """A reward that tells any two pictures apart: the mean of the red channel, from 0 to 1."""
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


def prompts_of(*texts: str) -> list[Any]:
    """Prompts with a source picture each, which differs by the text and which only models that edit look at."""
    from PIL import Image

    from progrpo.types import Prompt

    drawn = [np.random.default_rng(list(text.encode())).integers(0, 256, (16, 16, 3), np.uint8) for text in texts]
    return [Prompt(text, {"image": Image.fromarray(pixels)}) for text, pixels in zip(texts, drawn, strict=True)]


def tiny_config(**sections: Any) -> Any:
    """A configuration of seconds, with sections replaced by name: groups of 4, of which 3 live on after step 1 of 4.

    Microbatches that it leaves open are what a trainer takes then, since a run would measure them for seconds.
    """
    from progrpo import config as c

    base = c.Config(
        recipe="tiny",
        iterations=2,
        model=c.ModelSettings(lora_rank=2, lora_alpha=4, max_sequence_length=8),
        prompts=c.PromptSettings(per_iteration=2),
        sampling=c.SamplingSettings(num_inference_steps=4),
        plan=c.PlanSettings(preset="custom", group_size=4, prune=((1, 3),)),
        objective=c.ObjectiveSettings(grpo=c.GRPOSettings(clip_range=3e-3)),
        audit=c.AuditSettings(every=0),
        eval=c.EvalSettings(pictures=3, num_inference_steps=3),
        checkpoint=c.CheckpointSettings(every=1),
    )
    config = replace(base, **sections)
    return replace(
        config,
        sampling=replace(config.sampling, microbatch=config.sampling.microbatch or 64),
        optim=replace(config.optim, microbatch=config.optim.microbatch or 64),
    )


def load_pipeline(folder: Path) -> Any:
    """The untouched pipeline of a folder, as a user of diffusers has it: a copy, at a part of the time of reading."""
    return _read_pipeline(folder).new()


@cache
def _read_pipeline(folder: Path) -> Copies[Any]:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return Copies(pipeline)


def load_tiny_policy(
    folder: Path,
    weights: Any = "lora",
    dtype: Any = "float32",
    moved: float = 0.0,
    quantize: Any = "none",
) -> Any:
    """The pipeline as a policy, a copy; `moved` is how far its trained weights are from their start."""
    policy = _read_tiny_policy(folder, weights, dtype, quantize).new()
    move(policy, moved)
    return policy


@cache
def _read_tiny_policy(folder: Path, weights: Any, dtype: Any, quantize: Any) -> Copies[Any]:
    from progrpo.policies.load import policy_from_pipeline
    from progrpo.policies.settings import ModelSettings

    settings = ModelSettings(
        weights=weights,
        lora_rank=2,
        lora_alpha=4,
        max_sequence_length=8,
        dtype=dtype,
        resolution=16,
        frames=frames_of(folder),
        quantize=quantize,
    )
    return Copies(policy_from_pipeline(load_pipeline(folder), settings))


@torch.no_grad()
def move(policy: Any, far: float) -> None:
    """Move every trained weight: a fresh LoRA is the base model and hides its own mistakes."""
    generator = torch.Generator().manual_seed(4)
    for parameter in policy.trainable.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=far)


def build_trainer(config: Any, policy: Any, reward: Any = redness) -> Any:
    """A trainer on one process, with the prompts in turn, by a reward function or a mixture."""
    from progrpo.prompts.order import InTurn
    from progrpo.rewards.frames import FrameAverageReward
    from progrpo.rewards.function import FunctionReward
    from progrpo.rewards.mixture import RewardMixture
    from progrpo.training.distributed import Ranks
    from progrpo.training.trainer import Trainer
    from tests.support.rewards import mixture_of_one

    order = InTurn({"": tuple(prompts_of(*PROMPTS))}, config.seed)
    if not isinstance(reward, RewardMixture):
        reward = mixture_of_one(FrameAverageReward(FunctionReward(reward), 1))
    return Trainer(config, policy, reward, order, Ranks())


def first_experience(trainer: Any) -> Any:
    """The experience of a trainer's first iteration, before it learns."""
    from progrpo.rollout.meter import Meter
    from progrpo.rollout.noise import NoiseKey
    from progrpo.rollout.rollout import rollout
    from progrpo.training.experience import AdvantageEstimator

    count = trainer.config.prompts.per_iteration
    prompts, key = trainer.order.prompts_for(0, count), NoiseKey(trainer.config.seed, 0)
    rolled = rollout(trainer.sampler, prompts, torch.arange(count), key, Meter())
    config, clip = trainer.config.objective, trainer.learner.objective.settings.adv_clip_max
    estimator = AdvantageEstimator(config, clip, trainer.reward.weights, trainer.ranks)
    return estimator.experience(rolled, trainer.sampler.sampling, key)[0]


def assert_trained_alike(weights: Mapping[str, Any], expected: Mapping[str, Any], lr: float, steps: int) -> None:
    """Assert that two runs have trained the same weights, by name, up to what their gradients were rounded by.

    AdamW divides a gradient by its own size. Where one is but rounding its step has any sign, and the learning rate's
    length: such weights are few, and at most two learning rates apart for each step.
    """
    assert weights.keys() == expected.keys()
    apart = torch.cat([(weights[name] - weight).abs().flatten() for name, weight in expected.items()])
    assert apart.max() <= 2.1 * lr * steps
    assert (apart > 0.01 * lr).double().mean() < 0.01
