"""The rules of a configuration: each value's own, each section's, and those between sections. It is free of torch."""

from __future__ import annotations

from dataclasses import fields

from progrpo.config import (
    Config,
    compares_equal_members,
    from_dict,
    last_equal_step,
    resolve_plan,
    stochastic_steps,
    to_dict,
    trains_transitions,
)
from progrpo.objectives.settings import OBJECTIVES, GRPOSettings
from progrpo.rollout.plan import Plan
from progrpo.rollout.settings import SAMPLERS
from progrpo.settings import check_kinds, check_rules


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
    if trains_transitions(config):
        _check_trained_steps(config)
        _check_sampler(config)
    plan = resolve_plan(config)
    _check_sampling(config, plan)
    _check_objective(config, plan)
    _check_processes(config, plan)
    if not config.prompts.pairs:  # the plan is not read for recorded pairs
        _check_plan(config, plan)


def _check_sampling(config: Config, plan: Plan) -> None:
    sampling = config.sampling
    if sampling.negative_prompt:
        _check_negative_prompt(config)
    if not sampling.same_latent:
        return
    if not stochastic_steps(config, 0):
        raise ValueError(
            "sampling.same_latent must be false where no step adds noise (sampling.sde_window): a group's members would"
            " be equal"
        )
    _check_same_latent(config, plan)


def _check_objective(config: Config, plan: Plan) -> None:
    objective = config.objective
    if config.prompts.pairs:
        _check_pairs(config)
    elif objective.loss.group_size is not None:
        _check_group_size(config, plan, objective.loss.group_size)
    if config.optim.reuse_rollout and not trains_transitions(config):
        raise ValueError(
            f"optim.reuse_rollout must be false for objective.name {objective.name}: it trains noise levels that were"
            " not sampled"
        )
    if config.reward.noise and objective.advantage == "gdpo":
        raise ValueError(
            "reward.noise must be empty for objective.advantage gdpo, where members are chosen by normalised rewards"
        )


def _check_processes(config: Config, plan: Plan) -> None:
    if config.prompts.split_groups:
        _check_split_groups(config, plan)
    if config.model.shard:
        _check_shard(config)


def _check_plan(config: Config, plan: Plan) -> None:
    """Refuse a plan without the audits that it follows, and one that leaves the objective too little to learn from."""
    settings, objective = config.plan, config.objective
    follower = "plan.adaptive" if settings.adaptive else "plan.preset auto"
    for name, active in ((follower, settings.follows_audits), ("preview.probe", config.preview.probe)):
        if active and not config.audit.every:
            raise ValueError(f"{name} must have audit.every above 0: audits measure how well previews rank")
    if settings.adaptive and plan.survivors == plan.group_size:
        raise ValueError(
            f"plan.adaptive must be false for a plan that trains on all {plan.group_size} members of a group: it takes"
            " plans with as many survivors or more, of which there is no other; plan.preset auto may take fewer"
        )
    if (settings.follows_audits or plan.finalists < plan.group_size) and objective.baseline == "group":
        raise ValueError(
            "objective.baseline must be survivors under a plan that prunes while sampling: "
            "the pruned members have no final rewards"
        )
    if settings.follows_audits and objective.advantage == "gdpo":
        raise ValueError(
            f"objective.advantage must be group or batch for {follower}, not gdpo: what a plan is worth is known for"
            " advantages of the sum of rewards, and gdpo gives each reward its own std"
        )
    if plan.keep_groups is not None:
        _check_keep_groups(config, plan.keep_groups)


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


def _check_group_size(config: Config, plan: Plan, group_size: int) -> None:
    """Refuse plans after which a group has another number of members than the objective takes."""
    if config.plan.follows_audits or plan.survivors != group_size:
        has = "one that follows audits" if config.plan.follows_audits else f"one of {plan.survivors}"
        raise ValueError(
            f"plan must keep {group_size} members of a group for objective.name {config.objective.name}, not be {has};"
            " --plan.preset custom --plan.group-size 12 --plan.final-keep 2 takes the best and the worst of twelve, and"
            " prompts.pairs learns from recorded pairs"
        )


def _check_trained_steps(config: Config) -> None:
    """Refuse sampling without a step that an objective of transitions can train."""
    sampling = config.sampling
    if not sampling.num_trainable_steps:
        raise ValueError(
            "sampling.num_inference_steps must be at least 2, not 1, since the last step is not trained"
            " (or set sampling.train_last_step)"
        )
    if sampling.sde_window == "none":
        raise ValueError(
            f"sampling.sde_window must leave objective.name {config.objective.name} stochastic steps to train, so not"
            f" be none; set it to auto, or take an objective that needs none: {', '.join(list(OBJECTIVES)[1:])}"
        )


def _check_sampler(config: Config) -> None:
    """Refuse GRPO's ratios and distances that the sampler does not have."""
    grpo = config.objective.loss
    if not isinstance(grpo, GRPOSettings):
        return
    section = "objective.grpo" if config.objective.name == "grpo" else "objective.custom"
    sampler, facts = config.sampling.sampler, config.sampling.sampler_facts
    if grpo.ratio == "guard" and not facts.has_density:
        raise ValueError(
            f"{section}.ratio guard must go with a sampler whose log-prob is a density, not {sampler}; take cps"
        )
    if grpo.kl_form == "flow_grpo" and sampler != "auto" and not facts.flow_only:
        with_rate = ", ".join(name for name, built_in in SAMPLERS.items() if built_in.facts.flow_only)
        raise ValueError(
            f"{section}.kl_form flow_grpo must go with a sampler that has a diffusion rate ({with_rate}), not"
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


def _check_same_latent(config: Config, plan: Plan) -> None:
    """Refuse a plan that prunes members with one initial latent before noise has made them differ."""
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
        "preview.latent_reward with prompts.order signal": (
            bool(config.preview.latent_reward) and config.prompts.order == "signal",
            "the head's scores of stopped groups do not compare with the rewards of the others",
        ),
    }
    for name, (active, reason) in conflicts.items():
        if active:
            raise ValueError(f"plan.keep_groups must be empty for {name}: {reason}")


def _check_split_groups(config: Config, plan: Plan) -> None:
    """Refuse split groups for what needs a whole group while it is sampled or trained."""
    whole = {
        f"objective.name {config.objective.name}": config.objective.loss.whole_groups,
        "objective.advantage gdpo": config.objective.advantage == "gdpo",
        "reward.noise": bool(config.reward.noise),
        "preview.probe": config.preview.probe,
        "optim.reuse_rollout": config.optim.reuse_rollout,
        "reward.waves above 1": config.reward.waves > 1,
        "plan.keep_groups": plan.keep_groups is not None,
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
