"""The objects of a run, made from its configuration. Beyond this file, functions take numbers and tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from progrpo.config import (
    Config,
    ModelSettings,
    ObjectiveSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
    shared_calls,
    stochastic_steps,
    trained_steps,
)
from progrpo.messages import named
from progrpo.objectives.advantage import normalised_sum, posterior_means
from progrpo.objectives.base import Objective
from progrpo.objectives.settings import Stored, load_objective
from progrpo.policies.base import Policy, PolicyContext
from progrpo.policies.load import fastest_dtype, load_policy, quiet
from progrpo.preferences.pairs import read_pairs
from progrpo.prompts.load import TEXT, load_prompts
from progrpo.prompts.order import PromptOrder, make_order
from progrpo.rewards.base import Judge, Refusal
from progrpo.rewards.mixture import Ranking
from progrpo.rollout.sampling import Record, Sampling, sampling_for, stochastic_step
from progrpo.tracking.own_files import weights_folders
from progrpo.training.distributed import Ranks
from progrpo.training.memory import keep_freed_memory
from progrpo.training.zero import with_requested_dtype
from progrpo.types import Prompt
from progrpo.zoo import WEIGHTS
from progrpo.zoo.shapes.detector import load_detector
from progrpo.zoo.worlds import WORLDS


def objective_from(config: Config, policy: Policy) -> Objective:
    """The objective. Without a given clip range it has the one that was published with the sampler."""
    sampler = stochastic_step(config.sampling, policy)
    settings = config.objective.loss.for_sampler(sampler, math.prod(policy.latent_shape))
    objective: Objective = load_objective(config.objective.name)(settings)
    return objective


def resolve_dtype(config: Config, ranks: Ranks) -> Config:
    """The configuration with a dtype in place of auto: the fastest one, as the main process measures it.

    ValueError where the configuration contradicts a request for DeepSpeed.
    """
    if ranks.zero is not None:
        config = with_requested_dtype(config, ranks.zero)
    if config.model.dtype != "auto":
        return config
    dtype = ranks.from_main(lambda: fastest_dtype(ranks.device))
    return replace(config, model=replace(config.model, dtype=dtype))


def policy_from(model: ModelSettings, context: PolicyContext, trained: Path | None = None) -> Policy:
    """The policy that settings name, optionally with weights that a run has saved."""
    quiet()
    if context.device.type == "cpu":  # beside a GPU the weights in the CPU's memory are freed once they are copied
        keep_freed_memory()
    return load_policy(with_lora_of_run(model), context, trained)


def policy_context(config: Config, ranks: Ranks) -> PolicyContext:
    """The surroundings of a run's policy in this process."""
    return PolicyContext(
        device=ranks.device,
        lora_seed=config.seed,
        world_size=ranks.world,
        decoder_for_previews=config.preview.needed_decoder,
        guide_away_from=config.sampling.negative_prompt,
    )


def with_lora_of_run(model: ModelSettings) -> ModelSettings:
    """The settings with the LoRA that a run has saved, where `lora` names a run folder."""
    run = Path(model.lora)
    return replace(model, lora=str(saved_weights(run))) if model.lora and was_trained(run) else model


def was_trained(folder: Path) -> bool:
    """Whether a folder is a run's."""
    # os.path, since Path's own method raises for a name that is too long
    return os.path.isfile(folder / "config.json") and os.path.isfile(folder / "summary.json")


def saved_weights(run: Path) -> Path:
    """The folder of a run's trained weights. ValueError where there is none yet."""
    saved = weights_folders(run)
    if not saved:
        raise ValueError(f"{named(run)} has saved no trained weights yet; they are written when the run ends")
    return saved[0]


def has_saved_weights(run: Path) -> bool:
    """Whether a run has saved its result."""
    return bool(weights_folders(run))


def sampling_from(config: Config, policy: Policy, stores: Stored, iteration: int) -> Sampling:
    """The sampling of an iteration: stochastic in its window, storing what the objective needs of trained steps."""
    record = Record(
        steps=frozenset(trained_steps(config, iteration)),
        means=stores == "means",
        graphs=config.optim.reuse_rollout,
        latent_features=config.preview.probe,
    )
    sampling = sampling_for(policy, config.sampling, stochastic_steps(config, iteration), record)
    return replace(sampling, shared_calls=shared_calls(config, iteration))


def check_sampling(config: Config, policy: Policy) -> None:
    """ValueError for guidance that the model does not have, and for a step that some iteration cannot train."""
    trained = frozenset(step for i in range(config.iterations) for step in trained_steps(config, i))
    sampling_for(policy, config.sampling, range(config.sampling.num_inference_steps), Record(steps=trained))


def ranking_from(objective: ObjectiveSettings, reward: RewardSettings) -> Ranking | None:
    """The function whose values selectors compare; None where they compare the weighted sum itself."""
    if reward.noise:
        return partial(_expected, reward.terms, [term.name for term in reward.terms].index(reward.noise))
    if objective.advantage != "gdpo":
        return None

    def normalised(rewards_NR: Tensor, group_N: Tensor) -> Tensor:
        return normalised_sum(rewards_NR, _weights(reward.terms), group_N, int(group_N.max()) + 1, objective.adv_eps)

    return normalised


def _weights(terms: Sequence[RewardTerm]) -> Tensor:
    return torch.tensor([term.weight for term in terms], dtype=torch.float64)


def _expected(terms: Sequence[RewardTerm], noise: int, rewards_NR: Tensor, group_N: Tensor) -> Tensor:
    """The expected sums of rewards, whose column `noise` has the variances of their noise."""
    variance_N = rewards_NR[:, noise]
    if (variance_N < 0).any():
        lowest = variance_N.nan_to_num(0.0).min().item()
        raise Refusal(f"reward.noise must name a reward that gives variances, which are 0 or more, not {lowest:g}")
    # under plan.keep_groups all groups of a process may have been stopped
    num_groups = int(group_N.max()) + 1 if len(group_N) else 0
    return posterior_means((rewards_NR * _weights(terms)).sum(1), variance_N, group_N, num_groups)


def train_order(prompts: PromptSettings, seed: int) -> PromptOrder:
    """The training prompts, or pairs as prompts, in the order that the settings name."""
    if prompts.pairs:
        pairs = tuple(pair.as_prompt() for pair in read_pairs(Path(prompts.pairs)))
        return make_order(prompts.order, {"": pairs}, seed)
    return make_order(prompts.order, load_prompts(prompts.source, "train", prompts.column), seed)


def eval_prompts(source: str, split: str, count: int, column: str = TEXT) -> list[Prompt]:
    """The evaluation prompts: `count` of a built-in split by kind in turn, or of a file in its order, repeated."""
    if source in WORLDS:
        return WORLDS[source].sample_prompts(split, count, seed=0)
    (prompts,) = load_prompts(source, split, column).values()
    return as_many(prompts, count)


def as_many(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """So many prompts in their order, repeated where there are fewer."""
    return [prompts[i % len(prompts)] for i in range(count)]


def judge_for(source: str) -> Judge | None:
    """The second opinion on pictures of the shapes world. Others have none."""
    if source != "shapes":
        return None
    return load_detector(WEIGHTS / "shapes-judge")
