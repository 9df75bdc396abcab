"""The configuration of a run: the rooms' settings as one, and what must hold between them. It is free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from progrpo.objectives.settings import AWMSettings, DGPOSettings, GRPOSettings, NFTSettings, ObjectiveSettings
from progrpo.policies.settings import ModelSettings
from progrpo.prompts.settings import PromptSettings
from progrpo.rewards.settings import RewardSettings, RewardTerm
from progrpo.rollout.plan import Plan
from progrpo.rollout.settings import PlanSettings, PreviewSettings, SamplingSettings
from progrpo.settings import (
    as_data,
    at_least,
    check_kinds,
    check_rules,
    field_paths,
    from_json,
    matches,
    read_settings,
    setting,
)
from progrpo.tracking.settings import TrackingSettings
from progrpo.training.settings import AuditSettings, CheckpointSettings, EvalSettings, OptimSettings, WatchSettings
from progrpo.types import FROM_PYTHON

__all__ = [
    "AWMSettings",
    "AuditSettings",
    "CheckpointSettings",
    "Config",
    "DGPOSettings",
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
    "SamplingSettings",
    "TrackingSettings",
    "WatchSettings",
]

_LABEL = matches(r"\w[\w.-]{0,99}", "a name of letters, digits, dots and dashes, 100 at most")


@dataclass(frozen=True)
class Config:
    """All of a run's settings."""

    recipe: str = setting("custom", _LABEL)
    """A label for folders and reports: the recipe that this began as."""
    seed: int = setting(0, at_least(0))
    iterations: int = setting(20, at_least(1))
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
    data: dict[str, Any] = as_data(config)
    return data


def config_to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def config_from_json(text: str, of_run: bool = False) -> Config:
    """The configuration of a file, or of a run's own config.json, in which every field was written that there was then."""
    try:
        data = from_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    config = from_dict(data)
    return _as_begun(config, data) if of_run else config


def _as_begun(config: Config, data: Mapping[str, Any]) -> Config:
    """The configuration with what a run did before there was a field for it, where the field's default is another."""
    if "step_ends" in data.get("model", {}):
        return config
    return replace(config, model=replace(config.model, step_ends="next"))


def from_dict(data: Mapping[str, Any]) -> Config:
    """The configuration that JSON data describe; fields that are not there keep their defaults.

    ValueError on an unknown field, with the nearest right name, and on a value of another type.
    """
    return read_settings(Config, data, options=field_paths(Config))


# --- checks -----------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """ValueError, one sentence with the field and what it must be, for the first value that a run cannot use."""
    check_kinds(Config, config)
    from_dict(to_dict(config))  # refuses values of another type, which Python code can have put there
    check_rules(config)
    for part in fields(config):
        check_part = getattr(getattr(config, part.name), "check", None)
        if check_part is not None:
            check_part()
    _check_between_rooms(config)


def _check_between_rooms(config: Config) -> None:
    objective, sampling, plan = config.objective, config.sampling, config.plan
    if sampling.negative_prompt:
        _check_negative(config)
    if trains_transitions(config):
        _check_trained_steps(sampling)
        _check_sampler(config)
    if sampling.same_latent and not stochastic_steps(config, 0):
        raise ValueError(
            "sampling.same_latent must be false where no step adds noise (sampling.sde_window): a group's members would be equal"
        )
    if config.optim.reuse_rollout and not trains_transitions(config):
        raise ValueError(
            f"optim.reuse_rollout must be false for objective.name {objective.name}: it trains noise levels that were not sampled"
        )
    if config.prompts.split_groups:
        _check_split_groups(config)
    if config.model.shard:
        _check_shard(config)
    if sampling.same_latent:
        _check_parted(config)
    for name, asked in (("plan.adaptive", plan.adaptive), ("preview.probe", config.preview.probe)):
        if asked and not config.audit.every:
            raise ValueError(f"{name} must have audit.every above 0: audits measure how well previews rank")
    if (plan.adaptive or resolve_plan(config).prune) and objective.baseline == "group":
        raise ValueError(
            "objective.baseline must be survivors under a plan that prunes while sampling: "
            "the pruned members have no final rewards"
        )


def _check_trained_steps(sampling: SamplingSettings) -> None:
    if not sampling.num_trainable_steps:
        raise ValueError(
            "sampling.num_inference_steps must be at least 2, not 1, since the last step is not trained"
            " (or set sampling.train_last_step)"
        )
    if sampling.sde_window == "none":
        raise ValueError(
            "sampling.sde_window must leave objective.name grpo stochastic steps to train, so not be none;"
            " set it to auto, or take an objective that needs none: nft, awm, dgpo"
        )


def _check_sampler(config: Config) -> None:
    """Of ratios and distances that not every sampler has."""
    grpo, sampler = config.objective.grpo, config.sampling.sampler
    if grpo.ratio == "guard" and sampler == "cps_reduced":
        raise ValueError(
            "objective.grpo.ratio guard must go with a sampler whose log-prob is a density, not cps_reduced; take cps"
        )
    if grpo.kl_form == "flow_grpo" and sampler in ("ddim", "cps", "cps_reduced"):
        raise ValueError(
            "objective.grpo.kl_form flow_grpo must go with a sampler that has a diffusion rate (flow_grpo, dance, flow_grpo_wan), not"
            f" {sampler}; take exact"
        )


def _check_negative(config: Config) -> None:
    if config.sampling.embedded_guidance:
        raise ValueError(
            "sampling.negative_prompt must be empty for sampling.embedded_guidance: a model that is told the guidance scale leads away"
            " from no text"
        )
    if max(config.sampling.guidance_scale, config.eval.guidance_scale) <= 1:
        raise ValueError(
            "sampling.negative_prompt must be empty where sampling.guidance_scale and eval.guidance_scale are 1, since it would have no"
            " effect; raise one of them, or leave it out"
        )


def _check_parted(config: Config) -> None:
    """Where a group's members begin as one, noise must have parted them before the first of them is let go."""
    points, sampling = resolve_plan(config).active_points(), config.sampling
    moves = sampling.sde_window in ("sliding", "random")
    latest = sampling.window_end - sampling.sde_window_size if moves else 0
    if points and points[0].step <= latest:
        raise ValueError(
            f"plan.prune must begin after step {latest} for sampling.same_latent, not at step {points[0].step}: a group's members are"
            f" equal until the noise of step {latest}" + (" where the window comes last" if moves else "")
        )


def _check_split_groups(config: Config) -> None:
    """What looks at a whole group while it is sampled or trained cannot have a part of it."""
    whole = {
        f"objective.name {config.objective.name}": config.objective.loss.whole_groups,
        "objective.advantage gdpo": config.objective.advantage == "gdpo",
        "preview.probe": config.preview.probe,
        "optim.reuse_rollout": config.optim.reuse_rollout,
        "reward.waves above 1": config.reward.waves > 1,
    }
    for name, asked in whole.items():
        if asked:
            raise ValueError(f"prompts.split_groups must be false for {name}, which takes groups whole")


def _check_shard(config: Config) -> None:
    """Gathered weights are gone after a call, and all processes make the same calls."""
    gathered = "a block's weights are gathered on the device when it is called, and gone after it"
    whole = "what is kept in 8 bits is not shared out"
    full_in_8_bits = config.optim.name == "adamw_8bit" and config.model.weights == "full"
    against = {
        "model.compile": (config.model.compile, gathered),
        "optim.reuse_rollout": (config.optim.reuse_rollout, gathered),
        "model.offload": (config.model.offload, gathered),
        "model.quantize": (config.model.quantize != "none", whole),
        "optim.name adamw_8bit with model.weights full": (full_in_8_bits, whole),
    }
    for name, (asked, why) in against.items():
        if asked:
            raise ValueError(f"model.shard must be false for {name}: {why}")
    for name, size in (
        ("sampling.microbatch", config.sampling.microbatch),
        ("optim.microbatch", config.optim.microbatch),
    ):
        if size is None:  # it is measured up to where memory ends, and there the others would wait for ever
            raise ValueError(f"{name} must be given for model.shard: processes that share a network cannot measure it")


def from_python(config: Config) -> list[str]:
    """The fields that hold what `progrpo.train` was given as objects, which only the same call can give again."""
    names = {
        "model.path": config.model.path,
        "prompts.source": config.prompts.source,
        "eval.prompts": config.eval.prompts,
    }
    objects = [field for field, name in names.items() if name.endswith(FROM_PYTHON)]
    return objects + ["reward.terms"] * any(term.from_python for term in config.reward.terms)


# --- what the fields mean together ------------------------------------------------------------------------------------


def resolve_plan(config: Config) -> Plan:
    """The plan of the run; ValueError if it cannot be run in `sampling.num_inference_steps`."""
    return config.plan.plan(config.sampling.num_inference_steps)


def learning_rate(config: Config, iteration: int) -> float:
    """The learning rate of a zero-based iteration."""
    return config.optim.learning_rate(iteration, config.iterations)


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


def trained_items(config: Config) -> int:
    """What is trained of a trajectory, in every iteration: transitions, or draws of a noise level."""
    return config.objective.loss.items_per_trajectory(len(trained_steps(config, 0)))
