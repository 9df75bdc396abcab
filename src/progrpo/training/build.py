"""From a configuration to the parts of a run. Past this file, functions take numbers and tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from progrpo.config import Config, ModelConfig, ObjectiveConfig, PromptConfig, stochastic_steps, trained_steps
from progrpo.data import ORDERS, PromptOrder, load_prompts
from progrpo.objectives.awm import AWM
from progrpo.objectives.base import Needs, Objective
from progrpo.objectives.dgpo import DGPO
from progrpo.objectives.grpo import GRPO
from progrpo.objectives.nft import NFT
from progrpo.policies.base import Policy
from progrpo.policies.load import fastest_dtype, load_policy, quiet
from progrpo.recipes import load_recipe
from progrpo.rewards.base import Judge
from progrpo.rollout.denoise import Sampling
from progrpo.training.distributed import Ranks
from progrpo.types import Prompt
from progrpo.zoo import WEIGHTS
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.judge import load_judge

OBJECTIVES: dict[str, Callable[[ObjectiveConfig], Objective]] = {
    "grpo": lambda c: GRPO(**asdict(c.grpo)),
    "nft": lambda c: NFT(**asdict(c.nft)),
    "awm": lambda c: AWM(**asdict(c.awm)),
    "dgpo": lambda c: DGPO(**asdict(c.dgpo)),
}


def settled(config: Config, ranks: Ranks) -> Config:
    """The configuration with what is chosen by measuring, as the main process measures it."""
    if config.model.dtype != "auto":
        return config
    dtype = ranks.gather([fastest_dtype(ranks.device) if ranks.is_main else None])[0]
    return replace(config, model=replace(config.model, dtype=dtype))


def policy_from(model: ModelConfig, seed: int, ranks: Ranks, trained: Path | None = None) -> Policy:
    """The policy that a configuration names, optionally with weights that a run has saved."""
    quiet()
    return load_policy(
        model.path,
        weights=model.weights,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
        lora_targets=model.lora_targets,
        max_sequence_length=model.max_sequence_length,
        seed=seed,
        device=ranks.device,
        dtype=getattr(torch, model.dtype),
        trained=trained,
    )


def trained_policy(target: str, trained: Path | None, ranks: Ranks) -> Policy:
    """A model by name, folder or hub id, or what a run folder has trained; `trained` may name a run or its LoRA folder."""
    if _is_run(Path(target)):
        trained = Path(target)
    if trained is not None and _is_run(trained):
        saved = [trained / name for name in ("lora", "transformer") if (trained / name).is_dir()]
        if not saved:
            raise ValueError(f"{trained} has saved no trained weights yet; they are written when the run ends")
        trained = saved[0]
    return policy_from(config_of(target).model, 0, ranks, trained)


def config_of(target: str) -> Config:
    """A run's configuration, or the default one for a model."""
    return load_recipe(target) if _is_run(Path(target)) else Config(model=ModelConfig(path=target))


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "summary.json").is_file()


def sampling_from(config: Config, policy: Policy, needs: Needs, iteration: int) -> Sampling:
    """How an iteration samples: stochastic where its window lies, storing what an objective needs of the trained steps."""
    wanted, stochastic = config.sampling, stochastic_steps(config, iteration)
    return Sampling(
        sigmas_T1=policy.sigmas(wanted.num_inference_steps, wanted.shift),
        noise_levels=tuple(wanted.noise_level * (step in stochastic) for step in range(wanted.num_inference_steps)),
        stored_steps=frozenset(trained_steps(config, iteration)),
        stored_means=needs == "means",
        guidance_scale=wanted.guidance_scale,
        microbatch=wanted.microbatch,
    )


def train_order(prompts: PromptConfig, seed: int) -> PromptOrder:
    return ORDERS[prompts.order](load_prompts(prompts.source, "train"), seed)


def eval_prompts(source: str, split: str, count: int) -> list[Prompt]:
    """The same `count` prompts every time: of the built-in split by kind in turn, of a file from its start, again and again."""
    if source == "shapes":
        return world.sample_prompts(split, count, seed=0)
    (prompts,) = load_prompts(source).values()
    return [prompts[i % len(prompts)] for i in range(count)]


def judge_for(source: str) -> Judge | None:
    """The built-in prompts have a second judge, a file's have none."""
    if source != "shapes":
        return None
    return load_judge(WEIGHTS / "shapes-judge")
