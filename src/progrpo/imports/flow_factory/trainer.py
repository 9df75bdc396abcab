"""Rules of the trainer: its loss, its averages of the weights and the noise levels that it trains."""

from __future__ import annotations

from collections.abc import Callable

from progrpo.imports.outcome import Outcome, Rule, Setting, counted_in, no_equal, not_needed, to_fields

# The settings of the averages with which nft, awm and dgpo compare, at the values of ours.
_AVERAGES: dict[str, dict[str, object]] = {
    "nft": {
        "train.ema_decay": 0.5,
        "train.ema_update_interval": 1,
        "train.ema_decay_schedule": "piecewise_linear",
        "train.flat_steps": 0,
        "train.ramp_rate": 1e-3,
    },
    "awm": {"train.ema_update_interval": 1, "train.ema_decay_schedule": "linear"},
    "dgpo": {"train.ema_ref_max_decay": 0.3, "train.ema_ref_ramp_rate": 1e-3},
}


def trainer_of(setting: Setting) -> str:
    return str(setting.all["train.trainer_type"])


def objective_of(setting: Setting) -> str:
    return trainer_of(setting).removesuffix("-guard").removeprefix("offline-")


def is_offline(setting: Setting) -> bool:
    """Whether the trainer learns from recorded pairs, and samples nothing."""
    return trainer_of(setting) == "offline-dpo"


def not_read(setting: Setting) -> Outcome:
    """The outcome of a setting that the trainer of the file does not read."""
    return not_needed(f"{trainer_of(setting)} does not read it")


def to_objective(field: str, *objectives: str) -> Rule:
    """The rule of a setting for which the objective in use has this field, if it is one of `objectives` (or any)."""

    def rule(setting: Setting) -> Outcome:
        if objectives and objective_of(setting) not in objectives:
            return not_read(setting)
        return to_fields({f"objective.{objective_of(setting)}.{field}": setting.value})

    return rule


def trainer_type(setting: Setting) -> Outcome:
    fields = {"objective.name": objective_of(setting)}
    if setting.value == "grpo-guard":
        fields["objective.grpo.ratio"] = "guard"
    return to_fields(fields)


def _end(setting: Setting, start: Callable[[float], float]) -> float | None:
    """The end of a range that begins at `start(end)`, or the number that stands for it; None for another range."""
    if isinstance(setting.value, list):
        low, high = setting.value if len(setting.value) == 2 else (None, None)
        return float(high) if isinstance(high, int | float) and low == start(high) else None
    return setting.number()


def _symmetric(setting: Setting) -> float | None:
    """The bound, if it is the same on both sides."""
    return _end(setting, lambda end: -end)


def clip_range(setting: Setting) -> Outcome:
    bound, objective = _symmetric(setting), objective_of(setting)
    if objective in ("nft", "dpo"):
        return not_read(setting)
    if bound is None:
        return no_equal("both sides have the same clip range here: the published one")
    return to_fields({f"objective.{objective}.clip_range": bound})


def adv_clip_range(setting: Setting) -> Outcome:
    if objective_of(setting) == "dpo":
        return not_read(setting)
    bound = _symmetric(setting)
    if bound is None:
        return no_equal("both sides have the same clip range here")
    return to_fields({f"objective.{objective_of(setting)}.adv_clip_max": bound})


def kl_type(setting: Setting) -> Outcome:
    form = setting.one_of({"x-based": "latent", "v-based": "velocity"})
    if objective_of(setting) == "grpo":
        return to_fields({"objective.grpo.kl_form": form})
    compared = "velocities are compared here"
    return not_needed(compared) if form == "velocity" else no_equal(compared)


def aggregation(setting: Setting) -> Outcome:
    if objective_of(setting) == "dpo":
        return _choice_of_pairs(setting)
    if setting.one_of({"sum": False, "gdpo": True}):
        return to_fields({"objective.advantage": "gdpo"}, "with the std of the batch")
    return to_fields({"objective.advantage": "batch" if setting.all.get("train.global_std") else "group"})


def _choice_of_pairs(setting: Setting) -> Outcome:
    """The outcome of `advantage_aggregation` for DPO, which takes the best and the worst advantage of a group."""
    fields = {"objective.advantage": "group"}
    rewards = [name for name in setting.all if name.startswith("rewards[") and name.endswith("].reward_model")]
    if setting.one_of({"sum": False, "gdpo": True}) and len(rewards) > 1:
        return no_equal(
            "pairs are chosen by the weighted sum here, and by rewards normalised in their group there", fields
        )
    return to_fields(fields, "all pairs have equal weight")


def preference_beta(setting: Setting) -> Outcome:
    if objective_of(setting) != "dpo":
        return not_read(setting)
    return to_fields({"objective.dpo.beta": setting.number() / 2}, "its loss halves it")


def level_weighting(setting: Setting) -> Outcome:
    """The outcome of the distribution of noise levels that DPO trains."""
    if objective_of(setting) != "dpo":
        return not_read(setting)
    return no_equal("noise levels are drawn evenly from the sampling grid here, with the model's own shift")


def kl_beta(setting: Setting) -> Outcome:
    return not_read(setting) if objective_of(setting) == "dpo" else to_objective("kl_beta")(setting)


def global_std(setting: Setting) -> Outcome:
    if objective_of(setting) == "dpo":
        return not_needed("all pairs have equal weight")
    if setting.all.get("train.advantage_aggregation") == "gdpo":
        return not_needed("gdpo normalizes by group, then by batch")
    return counted_in("objective.advantage")


def iterations(setting: Setting) -> Outcome:
    if is_offline(setting):
        return no_equal("an epoch is a pass over all pairs there; --iterations counts updates of prompts.per_iteration")
    if setting.value is None or setting.number() < 0:
        return to_fields({"iterations": 100_000}, "without end there; stop the run by hand")
    return to_fields({"iterations": setting.value})


def average(setting: Setting) -> Outcome:
    """The outcome of a setting of the average with which the objective compares."""
    ours = _AVERAGES.get(objective_of(setting), {})
    if setting.name not in ours:
        return not_read(setting)
    here = ours[setting.name]
    return not_needed("the same here") if setting.value == here else no_equal(f"{here} here, as published")


def _averages_for_evaluations(setting: Setting) -> bool:
    """Whether the average of `train.ema_decay` is only for evaluations."""
    return objective_of(setting) in ("grpo", "dgpo", "dpo")


def ema_decay(setting: Setting) -> Outcome:
    if objective_of(setting) == "awm":
        return _awm_average(setting)
    if not _averages_for_evaluations(setting):
        return average(setting)
    decay, every = setting.number(), setting.count("train.ema_update_interval")
    each = round(decay ** (1 / every), 6) if 0 < decay < 1 else decay
    return to_fields({"optim.ema_decay": each}, f"{decay:g} at every {every} epochs there")


def _awm_average(setting: Setting) -> Outcome:
    """The outcome of a decay that rises to this value over `warmup_steps` epochs in equal steps."""
    if not _rises_in_equal_steps(setting):
        return no_equal("the average with which awm compares has a decay of min(.0003 n, .3) here after epoch n")
    ramp = round(setting.number() / setting.count("train.warmup_steps"), 9)
    return to_fields({"objective.awm.average_limit": setting.number(), "objective.awm.average_ramp": ramp})


def ema_interval(setting: Setting) -> Outcome:
    if not _averages_for_evaluations(setting):
        return average(setting)
    return counted_in("optim.ema_decay")


def ema_schedule(setting: Setting) -> Outcome:
    if not _averages_for_evaluations(setting):
        return average(setting)
    same = setting.value in ("constant", "power")  # `power` begins lower, and is constant after some epochs
    return not_needed("the same here") if same else no_equal("an average has one decay")


def _rises_in_equal_steps(setting: Setting) -> bool:
    return setting.all.get("train.ema_decay_schedule") == "linear" and "train.warmup_steps" in setting.all


def warmup(setting: Setting) -> Outcome:
    if objective_of(setting) == "awm" and _rises_in_equal_steps(setting):
        return counted_in("objective.awm.average_ramp")
    return not_needed("of a schedule that is not used")


def off_policy(setting: Setting) -> Outcome:
    """The outcome of a choice that is fixed here: NFT samples from its old policy, others from the current weights."""
    nft = objective_of(setting) == "nft"
    if bool(setting.value) is nft:
        return not_needed("the same here")
    return no_equal(f"pictures are sampled from the {'old policy' if nft else 'current weights'} here")


def draws(setting: Setting) -> Outcome:
    objective = objective_of(setting)
    if objective == "grpo":
        return not_needed("grpo trains the noisy steps")
    if setting.value in (None, 0):
        share = Setting("train.timestep_range", setting.all.get("train.timestep_range"), setting.all)
        draws = max(1, int(setting.count("train.num_inference_steps") * (_from_the_start(share) or 1)))
        return to_fields({f"objective.{objective}.draws": draws}, "all steps of train.timestep_range")
    return to_fields({f"objective.{objective}.draws": setting.value})


def _from_the_start(setting: Setting) -> float | None:
    """The share of the grid that the range covers, if it begins at the noisy end."""
    return _end(setting, lambda end: 0)


def timestep_range(setting: Setting) -> Outcome:
    objective, share = objective_of(setting), _from_the_start(setting)
    if objective == "grpo":
        return not_needed("grpo trains the noisy steps")
    if share is None:
        return no_equal("noise levels are drawn from the grid's noisy end here")
    return to_fields({f"objective.{objective}.time_fraction": share})


def weighting(setting: Setting) -> Outcome:
    if objective_of(setting) != "awm":
        return not_read(setting)
    names = {"uniform": "uniform", "t": "t", "t2": "t2", "t**2": "t2", "huber": "huber", "ghuber": "ghuber"}
    ours = names.get(str(setting.value).lower())
    return to_fields({"objective.awm.weighting": ours}) if ours else no_equal("our default is used: uniform")
