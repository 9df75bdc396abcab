"""The configuration of a run: the rooms' settings together, and the rules between them. It is free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from progrpo.objectives.settings import (
    OBJECTIVES,
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
from progrpo.rollout.settings import SAMPLERS, PlanSettings, PreviewSettings, SamplingSettings
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
        raise ValueError(f"not JSON: {error}") from None
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


# --- checks -----------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raise ValueError, one sentence with the field and what it must be, for the first value that a run cannot use."""
    check_kinds(Config, config)
    from_dict(to_dict(config))  # refuses values of another type, which Python code may have set
    check_rules(config)
    for part in fields(config):
        check_part = getattr(getattr(config, part.name), "check", None)
        if check_part is not None:
            check_part()
    _check_between_rooms(config)


def _check_between_rooms(config: Config) -> None:
    objective = config.objective
    sampling = config.sampling
    plan = config.plan
    if sampling.negative_prompt:
        _check_negative_prompt(config)
    if config.prompts.pairs:
        _check_pairs(config)
    elif objective.loss.group_size is not None:
        _check_group_size(config, objective.loss.group_size)
    if trains_transitions(config):
        _check_trained_steps(sampling)
        _check_sampler(config)
    if sampling.same_latent and not stochastic_steps(config, 0):
        raise ValueError(
            "sampling.same_latent must be false where no step adds noise (sampling.sde_window): a group's members would"
            " be equal"
        )
    if config.optim.reuse_rollout and not trains_transitions(config):
        raise ValueError(
            f"optim.reuse_rollout must be false for objective.name {objective.name}: it trains noise levels that were"
            " not sampled"
        )
    if config.reward.noise and objective.advantage == "gdpo":
        raise ValueError(
            "reward.noise must be empty for objective.advantage gdpo, where members are chosen by normalised rewards"
        )
    if config.prompts.split_groups:
        _check_split_groups(config)
    if config.model.shard:
        _check_shard(config)
    if sampling.same_latent:
        _check_same_latent(config)
    follower = "plan.adaptive" if plan.adaptive else "plan.preset auto"
    for name, active in ((follower, plan.follows_audits), ("preview.probe", config.preview.probe)):
        if active and not config.audit.every and not config.prompts.pairs:
            raise ValueError(f"{name} must have audit.every above 0: audits measure how well previews rank")
    if (plan.follows_audits or resolve_plan(config).prune) and objective.baseline == "group":
        raise ValueError(
            "objective.baseline must be survivors under a plan that prunes while sampling: "
            "the pruned members have no final rewards"
        )
    if plan.follows_audits and objective.advantage == "gdpo":
        raise ValueError(
            f"objective.advantage must be group or batch for {follower}, not gdpo: what a plan is worth is known for"
            " advantages of the sum of rewards, and gdpo gives each reward its own std"
        )
    keep_groups = resolve_plan(config).keep_groups
    if keep_groups is not None:
        _check_keep_groups(config, keep_groups)


def _check_pairs(config: Config) -> None:
    """Refuse recorded pairs where learning needs what only sampling gives."""
    if trains_transitions(config):
        raise ValueError(
            f"objective.name must be one that learns from final pictures for prompts.pairs, such as dpo or sft, not"
            f" {config.objective.name}: a recorded picture has no trajectory"
        )
    conflicts = {
        "objective.advantage gdpo": config.objective.advantage == "gdpo",
        "prompts.split_groups": config.prompts.split_groups,
    }
    for name, active in conflicts.items():
        if active:
            raise ValueError(f"prompts.pairs must be empty for {name}: a pair has one preference and stays whole")


def _check_group_size(config: Config, group_size: int) -> None:
    """Refuse plans after which a group has another number of members than the objective takes."""
    survivors = resolve_plan(config).survivors
    if config.plan.follows_audits or survivors != group_size:
        has = "one that follows audits" if config.plan.follows_audits else f"one of {survivors}"
        raise ValueError(
            f"plan must keep {group_size} members of a group for objective.name {config.objective.name}, not be {has};"
            " --plan.preset custom --plan.group-size 12 --plan.final-keep 2 takes the best and the worst of twelve, and"
            " prompts.pairs learns from recorded pairs"
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
            f" set it to auto, or take an objective that needs none: {', '.join(list(OBJECTIVES)[1:])}"
        )


def _check_sampler(config: Config) -> None:
    """Refuse ratios and distances that the sampler does not have."""
    grpo = config.objective.grpo
    sampler, facts = config.sampling.sampler, config.sampling.sampler_facts
    if grpo.ratio == "guard" and not facts.has_density:
        raise ValueError(
            f"objective.grpo.ratio guard must go with a sampler whose log-prob is a density, not {sampler}; take cps"
        )
    if grpo.kl_form == "flow_grpo" and sampler != "auto" and not facts.flow_only:
        with_rate = ", ".join(name for name, built_in in SAMPLERS.items() if built_in.facts.flow_only)
        raise ValueError(
            f"objective.grpo.kl_form flow_grpo must go with a sampler that has a diffusion rate ({with_rate}), not"
            f" {sampler}; take exact"
        )


def _check_negative_prompt(config: Config) -> None:
    if config.sampling.embedded_guidance:
        raise ValueError(
            "sampling.negative_prompt must be empty for sampling.embedded_guidance: a model whose guidance scale is an"
            " input leads away from no text"
        )
    if max(config.sampling.guidance_scale, config.eval.guidance_scale) <= 1:
        raise ValueError(
            "sampling.negative_prompt must be empty where sampling.guidance_scale and eval.guidance_scale are 1, since"
            " it would have no effect; raise one of them, or leave it out"
        )


def _check_same_latent(config: Config) -> None:
    """Refuse a plan that prunes members with one initial latent before noise has made them differ."""
    plan = resolve_plan(config)
    if compares_equal_members(config, plan):
        latest = last_equal_step(config)
        raise ValueError(
            f"plan.prune must begin after step {latest} for sampling.same_latent, not at step"
            f" {plan.active_points()[0].step}: a group's members are equal until the noise of step {latest}"
            + (" where the window comes last" if latest else "")
        )


def _check_keep_groups(config: Config, keep_groups: int) -> None:
    """Refuse to stop groups where their scores cannot be compared, or where not all groups are sampled together."""
    prompts = config.prompts.per_iteration
    if keep_groups >= prompts:
        raise ValueError(
            f"plan.keep_groups must be below the {prompts} prompts of an iteration (prompts.per_iteration), not"
            f" {keep_groups}; leave it out to stop no group"
        )
    conflicts = {
        "plan.adaptive": (config.plan.adaptive, "plans are judged by one group"),
        "reward.waves above 1": (config.reward.waves > 1, "a wave has only a part of the groups"),
        "preview.probe": (config.preview.probe, "its scores compare the members of one group alone"),
        "objective.advantage gdpo": (
            config.objective.advantage == "gdpo",
            "its sums are normalised in each group, and do not say how far the rewards differ",
        ),
    }
    for name, (active, reason) in conflicts.items():
        if active:
            raise ValueError(f"plan.keep_groups must be empty for {name}: {reason}")


def _check_split_groups(config: Config) -> None:
    """Refuse split groups for what needs a whole group while it is sampled or trained."""
    whole = {
        f"objective.name {config.objective.name}": config.objective.loss.whole_groups,
        "objective.advantage gdpo": config.objective.advantage == "gdpo",
        "reward.noise": bool(config.reward.noise),
        "preview.probe": config.preview.probe,
        "optim.reuse_rollout": config.optim.reuse_rollout,
        "reward.waves above 1": config.reward.waves > 1,
        "plan.keep_groups": resolve_plan(config).keep_groups is not None,
    }
    for name, active in whole.items():
        if active:
            raise ValueError(f"prompts.split_groups must be false for {name}, which takes whole groups")


def _check_shard(config: Config) -> None:
    """Refuse sharded weights for what needs them after a call, or in calls of one process alone."""
    gathered = "a block's weights are gathered on the device for a call, and gone after it"
    whole = "weights in 8 bits are not sharded"
    full_in_8_bits = config.optim.name == "adamw_8bit" and config.model.weights == "full"
    conflicts = {
        "model.compile": (config.model.compile, gathered),
        "optim.reuse_rollout": (config.optim.reuse_rollout, gathered),
        "model.offload": (config.model.offload, gathered),
        "model.quantize": (config.model.quantize != "none", whole),
        "optim.name adamw_8bit with model.weights full": (full_in_8_bits, whole),
    }
    for name, (active, reason) in conflicts.items():
        if active:
            raise ValueError(f"model.shard must be false for {name}: {reason}")
    for name, size in (
        ("sampling.microbatch", config.sampling.microbatch),
        ("optim.microbatch", config.optim.microbatch),
    ):
        if size is None:  # measuring goes on until memory runs out, and there the other processes would wait forever
            raise ValueError(f"{name} must be given for model.shard: processes that share a network cannot measure it")


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
    return sampling.window_end - sampling.sde_window_size if sampling.sde_window in ("sliding", "random") else 0


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
    of_one, of_all = prompt_cost(config, plan), prompt_cost(config, plan, prompts=prompts)
    return summary(plan, sampling.num_inference_steps, sampling.in_pairs, of_one, of_all, prompts)


def trained_items(config: Config) -> int:
    """The number of items that a trajectory is trained on in an iteration: transitions, or draws of a noise level."""
    return config.objective.loss.items_per_trajectory(len(trained_steps(config, 0)))
