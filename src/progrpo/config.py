"""The configuration of a run: the rooms' settings together, and what follows from several. It is free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from progrpo.objectives.settings import (
    AWMSettings,
    DGPOSettings,
    DPOSettings,
    ELBOSettings,
    GRPOSettings,
    NFTSettings,
    ObjectiveSettings,
    SFTSettings,
)
from progrpo.policies.settings import ModelSettings
from progrpo.prompts.settings import PromptSettings
from progrpo.rewards.settings import RewardSettings, RewardTerm
from progrpo.rollout.plan import Plan, PlanCosts, summary
from progrpo.rollout.settings import PlanSettings, PreviewSettings, SamplingSettings
from progrpo.settings import (
    as_data,
    at_least,
    field_paths,
    from_json,
    matches,
    read_settings,
    setting,
)
from progrpo.tracking.settings import TrackingSettings
from progrpo.training.settings import AuditSettings, CheckpointSettings, EvalSettings, OptimSettings, WatchSettings
from progrpo.types import FROM_PYTHON, Cost

__all__ = [
    "AWMSettings",
    "AuditSettings",
    "CheckpointSettings",
    "Config",
    "DGPOSettings",
    "DPOSettings",
    "ELBOSettings",
    "EvalSettings",
    "GRPOSettings",
    "ModelSettings",
    "NFTSettings",
    "ObjectiveSettings",
    "OptimSettings",
    "PlanSettings",
    "PreviewSettings",
    "PromptSettings",
    "RewardSettings",
    "RewardTerm",
    "SFTSettings",
    "SamplingSettings",
    "TrackingSettings",
    "WatchSettings",
]

_LABEL = matches(r"\w[\w.-]{0,99}", "a name of letters, digits, dots and dashes, 100 at most")


@dataclass(frozen=True)
class Config:
    """All of a run's settings."""

    recipe: str = setting("custom", _LABEL)
    """A label for folders and reports: the name of the recipe that this configuration began as."""
    seed: int = setting(0, at_least(0))
    """The seed of everything random in a run."""
    iterations: int = setting(20, at_least(1))
    """The number of iterations."""
    model: ModelSettings = field(default_factory=ModelSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    plan: PlanSettings = field(default_factory=PlanSettings)
    preview: PreviewSettings = field(default_factory=PreviewSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)


# --- to JSON and back -------------------------------------------------------------------------------------------------


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as dicts and lists, ready for JSON."""
    return {part.name: as_data(getattr(config, part.name)) for part in fields(config)}


def config_to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def config_from_json(text: str, of_run: bool = False) -> Config:
    """The configuration of a file, or of a run's own config.json.

    The latter holds every field that existed when the run began.
    """
    try:
        data = from_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON, as a configuration must be: {error}") from None
    config = from_dict(data)
    return _as_begun(config, data) if of_run else config


def _as_begun(config: Config, data: object) -> Config:
    """The configuration with the behaviour of the run for fields that did not exist when it began."""
    model = data.get("model") if isinstance(data, Mapping) else None
    if isinstance(model, Mapping) and "step_ends" in model:
        return config
    return replace(config, model=replace(config.model, step_ends="next"))


def from_dict(data: object) -> Config:
    """The configuration that JSON data describe; missing fields keep their defaults.

    ValueError on an unknown field, with the nearest right name, and on a value of another type.
    """
    return read_settings(Config, data, options=field_paths(Config))


def from_python(config: Config) -> list[str]:
    """The fields whose values are objects that `progrpo.train` was given. Only the same call can give them again."""
    names = {
        "model.path": config.model.path,
        "prompts.source": config.prompts.source,
        "eval.prompts": config.eval.prompts,
    }
    objects = [field for field, name in names.items() if name.endswith(FROM_PYTHON)]
    return objects + ["reward.terms"] * any(term.from_python for term in config.reward.terms)


# --- values that follow from several fields ---------------------------------------------------------------------------


def resolve_plan(config: Config) -> Plan:
    """The plan of the run; ValueError if it cannot be run in `sampling.num_inference_steps`."""
    if config.prompts.pairs:
        return Plan(2, recorded=True)
    return config.plan.plan(config.sampling.num_inference_steps)


def learning_rate(config: Config, iteration: int) -> float:
    """The learning rate of a zero-based iteration."""
    return config.optim.learning_rate(iteration, config.iterations)


def negative_weight(config: Config, iteration: int) -> float:
    """The factor of negative advantages in a zero-based iteration."""
    return config.objective.loss.negative_weight_at(iteration / max(1, config.iterations - 1))


def trains_transitions(config: Config) -> bool:
    """Whether the objective trains stochastic steps, and not only final latents."""
    return config.objective.loss.trains_transitions


def stochastic_steps(config: Config, iteration: int) -> range:
    """The zero-based steps of an iteration at which sampling adds noise."""
    return config.sampling.stochastic_steps(iteration, trains_transitions(config), config.seed)


def trained_steps(config: Config, iteration: int) -> range:
    """The zero-based steps of an iteration whose transitions are trained: stochastic, and not the last."""
    steps = stochastic_steps(config, iteration) if trains_transitions(config) else range(0)
    return range(steps.start, min(steps.stop, config.sampling.num_trainable_steps))


def last_equal_step(config: Config) -> int:
    """The last zero-based step of any iteration at whose network call a group's members are equal; -1 for none."""
    sampling = config.sampling
    if not sampling.same_latent:
        return -1
    return sampling.last_start


def compares_equal_members(config: Config, plan: Plan) -> bool:
    """Whether in some iteration the plan's first prune point finds the members of a group equal."""
    return any(point.step <= last_equal_step(config) for point in plan.active_points())


def shared_calls(config: Config, iteration: int) -> int:
    """The number of first network calls of an iteration that are made once for a group, whose members are equal there.

    With `sampling.same_latent` they are those up to the first step with noise. It is 0 where a group's members may be
    in several processes. The call at that step does not count where its graph is kept: graphs are freed row by row.
    """
    if not config.sampling.same_latent or config.prompts.split_groups or config.prompts.pairs:
        return 0
    first = stochastic_steps(config, iteration).start
    return first if config.optim.reuse_rollout else first + 1


def prompt_cost(
    config: Config, plan: Plan, probed_steps: frozenset[int] = frozenset(), prompts: int = 1, iteration: int = 0
) -> Cost:
    """The cost of a plan for one prompt of the run, or for so many of a zero-based iteration.

    Network calls that are made once for all members of a group are counted once.
    """
    steps, pairs = config.sampling.num_inference_steps, config.sampling.in_pairs
    cost = plan.predict(steps, trained_items(config), pairs, config.preview.steps_to_picture, probed_steps, prompts)
    saved = sum(plan.living_at(step) - 1 for step in range(shared_calls(config, iteration))) * (2 if pairs else 1)
    return replace(cost, nfe=cost.nfe - saved * prompts)


def plan_costs(config: Config, plan: Plan) -> PlanCosts:
    """The costs of a plan of the run, for a prompt and for an iteration's prompts, ready for JSON.

    Where the calls that a group shares differ between iterations, they are those of the first one.
    """
    sampling, prompts = config.sampling, config.prompts.per_iteration
    per_prompt, per_iteration = prompt_cost(config, plan), prompt_cost(config, plan, prompts=prompts)
    return summary(plan, sampling.num_inference_steps, sampling.in_pairs, per_prompt, per_iteration, prompts)


def trained_items(config: Config) -> int:
    """The number of items that a trajectory is trained on in an iteration: transitions, or draws of a noise level."""
    return config.objective.loss.items_per_trajectory(len(trained_steps(config, 0)))
