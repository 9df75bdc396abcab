"""From a configuration to the parts of a run. Past this file, functions take numbers and tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from progrpo.config import (
    Config,
    ModelSettings,
    ObjectiveSettings,
    PromptSettings,
    RewardTerm,
    stochastic_steps,
    trained_steps,
)
from progrpo.messages import named
from progrpo.objectives.advantage import normalised_sum
from progrpo.objectives.base import Objective
from progrpo.objectives.settings import Stored, load_objective
from progrpo.policies.base import Policy, PolicyContext
from progrpo.policies.decoding import BUILT_IN_DECODER
from progrpo.policies.load import BUILT_IN, fastest_dtype, load_policy, quiet
from progrpo.prompts.load import DATASET, TEXT, load_prompts, split_configuration
from progrpo.prompts.order import PromptOrder, make_order
from progrpo.recipes import load_recipe
from progrpo.rewards.base import Judge
from progrpo.rewards.mixture import Ranking
from progrpo.rollout.sampling import Record, Sampling, sampling_for, stochastic_step
from progrpo.training.distributed import Ranks
from progrpo.training.equal_inputs import require_same_model
from progrpo.training.memory import keep_freed_memory
from progrpo.training.zero import with_requested_dtype
from progrpo.types import FROM_PYTHON, Prompt
from progrpo.zoo import WEIGHTS
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.detector import load_detector


def objective_from(config: Config, policy: Policy) -> Objective:
    """The objective, with the clip range that was published with the sampler where none is given."""
    sampler = stochastic_step(config.sampling, policy)
    settings = config.objective.loss.for_sampler(sampler, math.prod(policy.latent_shape))
    objective: Objective = load_objective(config.objective.name)(settings)
    return objective


def located(config: Config) -> Config:
    """The configuration with absolute paths in place of relative ones, so that a run folder can be used from any folder.

    What names nothing on this disk (a built-in, a hub id) stays as it is.
    """
    model, preview = config.model, config.preview
    return replace(
        config,
        model=replace(model, path=_absolute(model.path), lora=_absolute(model.lora)),
        prompts=replace(config.prompts, source=_absolute(config.prompts.source)),
        preview=replace(preview, tiny_decoder=_absolute(preview.tiny_decoder)),
        reward=replace(config.reward, terms=tuple(map(_located_term, config.reward.terms))),
        eval=replace(
            config.eval,
            prompts=_absolute(config.eval.prompts),
            rewards=tuple(map(_located_term, config.eval.rewards)),
        ),
    )


def _located_term(term: RewardTerm) -> RewardTerm:
    model = term.model if term.names_model_of_server else _absolute(term.model)
    return replace(term, model=model, cache=os.path.abspath(os.path.expanduser(term.cache)) if term.cache else "")


def _absolute(name: str) -> str:
    if name.startswith(DATASET):
        dataset, config = split_configuration(name.removeprefix(DATASET))
        return ":".join([DATASET.rstrip(":"), _absolute(dataset), *filter(None, [config])])
    path = os.path.expanduser(name)
    known = name in ("", "shapes", BUILT_IN_DECODER, *BUILT_IN)
    return name if known or not os.path.exists(path) else os.path.abspath(path)


def settled(config: Config, ranks: Ranks) -> Config:
    """The configuration with what is chosen by measuring, as the main process measures it.

    ValueError where it contradicts what is asked of DeepSpeed.
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
    if context.device.type == "cpu":  # beside a GPU it is weights that are freed, once they are there
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
    return replace(model, lora=str(_saved_by(run))) if model.lora and _is_run(run) else model


def trained_policy(
    target: str,
    trained: Path | None,
    ranks: Ranks,
    revision: str = "",
    variant: str = "",
    negative_prompt: str = "",
) -> Policy:
    """A model by name, folder or hub id, or what a run folder has trained; `trained` may name a run or its LoRA folder.

    With a run's settings where one is named. ValueError for a run that is told to take what another trained, or another revision or
    variant of its model.
    """
    run, path = run_of(target, trained) or Config(), target
    if _is_run(Path(target)):
        if trained is not None:
            raise ValueError(
                f"--lora: {named(target)} is a run, with weights of its own; give its model, or leave --lora out"
            )
        if revision or variant:
            raise ValueError(
                f"--{'revision' if revision else 'variant'}: {named(target)} is a run, whose model's is in its config.json; leave it out"
            )
        trained, path = Path(target), run.model.path
        if path.endswith(FROM_PYTHON):
            raise ValueError(
                f"{named(target)} trained {path}, which no name loads; name the model it was: progrpo sample MODEL --lora {named(target)}"
            )
        revision, variant = run.model.revision, run.model.variant
    if trained is not None and _is_run(trained):
        trained = _saved_by(trained)
    # what a run saved has in it where it began, and is for the model as it is
    model = replace(run.model, path=path, revision=revision, variant=variant, lora="", quantize="none")
    context = PolicyContext(device=ranks.device, world_size=ranks.world, guide_away_from=negative_prompt)
    policy = policy_from(model, context, trained)
    require_same_model(ranks, policy)
    ranks.before_waiting = policy.drain_peer_calls
    return policy


def run_of(target: str, trained: Path | None = None) -> Config | None:
    """The configuration of the run that is meant by `trained_policy`'s arguments; None where a model alone is, or a LoRA of no run."""
    runs = [folder for folder in (Path(target), trained) if folder is not None and _is_run(folder)]
    return load_recipe(str(runs[0])) if runs else None


def _saved_by(run: Path) -> Path:
    saved = [run / name for name in ("lora", "transformer", "unet") if (run / name).is_dir()]
    if not saved:
        raise ValueError(f"{named(run)} has saved no trained weights yet; they are written when the run ends")
    return saved[0]


def config_of(target: str, trained: Path | None = None) -> Config:
    """The configuration of the run that is meant by `trained_policy`'s arguments, or the default one for a model."""
    return run_of(target, trained) or Config(model=ModelSettings(path=target))


def _is_run(folder: Path) -> bool:
    # as os.path asks: Path's own raises at a name that is too long
    return os.path.isfile(folder / "config.json") and os.path.isfile(folder / "summary.json")


def sampling_from(config: Config, policy: Policy, stores: Stored, iteration: int) -> Sampling:
    """How an iteration samples: stochastic where its window lies, storing what the objective needs of trained steps."""
    record = Record(
        steps=frozenset(trained_steps(config, iteration)),
        means=stores == "means",
        graphs=config.optim.reuse_rollout,
        latent_features=config.preview.probe,
    )
    return sampling_for(policy, config.sampling, stochastic_steps(config, iteration), record)


def ranking_from(objective: ObjectiveSettings, terms: Sequence[RewardTerm]) -> Ranking | None:
    """The function whose values selectors compare; None where they compare the weighted sum itself."""
    if objective.advantage != "gdpo":
        return None
    weights_R = torch.tensor([term.weight for term in terms], dtype=torch.float64)

    def normalised(rewards_NR: Tensor, group_N: Tensor) -> Tensor:
        return normalised_sum(rewards_NR, weights_R, group_N, int(group_N.max()) + 1, objective.adv_eps)

    return normalised


def train_order(prompts: PromptSettings, seed: int) -> PromptOrder:
    return make_order(prompts.order, load_prompts(prompts.source, "train", prompts.column), seed)


def eval_prompts(source: str, split: str, count: int, column: str = TEXT) -> list[Prompt]:
    """The same `count` prompts every time: of the built-in split by kind in turn, of a file from its start, again and again."""
    if source == "shapes":
        return world.sample_prompts(split, count, seed=0)
    (prompts,) = load_prompts(source, split, column).values()
    return [prompts[i % len(prompts)] for i in range(count)]


def judge_for(source: str) -> Judge | None:
    """The second opinion on pictures of the built-in prompts. Others have none."""
    if source != "shapes":
        return None
    return load_detector(WEIGHTS / "shapes-judge")
