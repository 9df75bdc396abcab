"""Rules of the algorithm: its loss, its advantages, and the noise levels that it trains."""

from __future__ import annotations

from progrpo.imports.outcome import Outcome, Rule, Setting, counted_in, no_equal, not_needed, to_fields

ALGORITHM = "actor_rollout_ref.model.algorithm"
LOSS = "actor_rollout_ref.actor.diffusion_loss.loss_mode"
"""The setting that names the loss; where it is left out, the algorithm names it."""
ALGORITHMS: dict[str, dict[str, object]] = {
    "flow_grpo": {"objective.name": "grpo"},
    "mix_grpo": {"objective.name": "grpo"},
    "dance_grpo": {"objective.name": "grpo"},
    "grpo_guard": {
        "objective.name": "grpo",
        "objective.grpo.ratio": "guard",
        "objective.grpo.step_weights": "inverse_h",
    },
    "diffusion_nft": {"objective.name": "nft"},
    "dgpo": {"objective.name": "dgpo"},
    "dpo": {"objective.name": "dpo", "objective.dpo.draws": 1},
}
"""verl-omni's algorithms and losses that have an objective here, and the fields that they set."""

_STEPS = "actor_rollout_ref.rollout.pipeline.num_inference_steps"
_SAME_AVERAGES = {"nft": "linear_to_0_5", "dgpo": "linear_to_0_3"}
"""The schedules of the averages with which objectives compare, as ours follow them."""


def objective_of(setting: Setting) -> str:
    return str(ALGORITHMS[str(setting.all[LOSS])]["objective.name"])


def is_offline(setting: Setting) -> bool:
    """Whether the settings learn from recorded pairs, and sample nothing."""
    return setting.all.get("algorithm.sample_source") == "offline"


def not_read(setting: Setting) -> Outcome:
    return not_needed(f"{setting.all[LOSS]} does not read it")


def loss(setting: Setting) -> Outcome:
    note = "one noise level for a pair" if setting.value == "dpo" else ""
    return to_fields(ALGORITHMS[str(setting.value)], note)


def named_again(setting: Setting) -> Outcome:
    """The outcome of an algorithm or an estimator of advantages, beside the loss."""
    own = str(setting.all[LOSS])
    known = ALGORITHMS.get(str(setting.value), {}).get("objective.name")
    same = known == objective_of(setting)
    return not_needed("the loss decides the objective") if same else no_equal(f"the loss decides the objective: {own}")


def of_objectives(field: str, *objectives: str) -> Rule:
    """The rule of a setting for which these objectives have this field."""

    def rule(setting: Setting) -> Outcome:
        objective = objective_of(setting)
        return (
            to_fields({f"objective.{objective}.{field}": setting.value})
            if objective in objectives
            else not_read(setting)
        )

    return rule


def sample_source(setting: Setting) -> Outcome:
    if setting.value == "online":
        return not_needed("the same here")
    if objective_of(setting) == "dpo" and setting.value == "offline":
        if "data.train_files" in setting.all:
            return counted_in("prompts.pairs")
        return no_equal(
            "the place of its pairs could not be read; write them (docs/preferences.md), and name them by"
            " --prompts.pairs",
            {"prompts.pairs": "pairs.jsonl"},
        )
    raise ValueError(f"algorithm.sample_source {setting.value!r} goes with the algorithm dpo alone here")


def preference_beta(setting: Setting) -> Outcome:
    if objective_of(setting) != "dpo":
        return not_read(setting)
    return to_fields({"objective.dpo.beta": setting.number() / 2}, "its loss halves it")


def advantage_std(setting: Setting) -> Outcome:
    if objective_of(setting) == "dpo":
        return to_fields({"objective.advantage": "group"}, "all pairs have equal weight")
    return to_fields({"objective.advantage": "batch" if setting.value else "group"})


def kl_coefficient(setting: Setting) -> Outcome:
    if objective_of(setting) != "grpo" or setting.all.get("actor_rollout_ref.actor.use_kl_loss") is not True:
        return not_needed("there is no distance to the reference")
    if setting.all.get("actor_rollout_ref.rollout.algo.sde_type") == "cps":
        return to_fields({"objective.grpo.kl_beta": setting.value}, "CPS's std is the step's, so its form is exact")
    return to_fields({"objective.grpo.kl_beta": setting.value, "objective.grpo.kl_form": "flow_grpo"})


def use_kl(setting: Setting) -> Outcome:
    if objective_of(setting) != "grpo" or setting.value is not True:
        return not_needed("there is no distance to the reference")
    return counted_in("objective.grpo.kl_beta")


def timestep_fraction(setting: Setting) -> Outcome:
    if objective_of(setting) != "nft":
        return not_read(setting)
    draws = max(1, int(setting.count(_STEPS) * setting.number()))
    return to_fields({"objective.nft.draws": draws}, "steps times the fraction, at any level here")


def trained_count(setting: Setting) -> Outcome:
    if objective_of(setting) != "dgpo":
        return not_read(setting)
    return to_fields({"objective.dgpo.draws": setting.value})


def trained_range(setting: Setting) -> Outcome:
    if objective_of(setting) != "dgpo":
        return not_read(setting)
    ends = setting.value
    if isinstance(ends, list) and len(ends) == 2 and ends[0] == 0 and isinstance(ends[1], int) and ends[1] > 0:
        return to_fields({"objective.dgpo.time_fraction": min(1.0, ends[1] / setting.count(_STEPS))})
    return no_equal("noise levels are drawn from the grid's noisy end here")


def average_schedule(setting: Setting) -> Outcome:
    ours = _SAME_AVERAGES.get(objective_of(setting))
    if ours is None:
        return not_read(setting)
    return not_needed("the same here") if setting.value == ours else no_equal(f"{ours} here, as published")


def average_interval(setting: Setting) -> Outcome:
    if objective_of(setting) not in _SAME_AVERAGES:
        return not_read(setting)
    return no_equal("averages follow once per iteration here, after all of its updates")
