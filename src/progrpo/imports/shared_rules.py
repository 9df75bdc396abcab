"""Rules that settings of several frameworks share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from progrpo.imports.outcome import Outcome, Rule, Setting, counted_in, no_equal, not_needed, to_fields


def to_field(path: str, note: str = "") -> Rule:
    """The rule of a setting for which we have a field of the same meaning."""
    return lambda setting: to_fields({path: setting.value}, note)


def to_choice(path: str, choices: Mapping[str, object]) -> Rule:
    """The rule of a setting for which we have a field of the same meaning, with other names for its values."""
    return lambda setting: to_fields({path: setting.one_of(choices)})


def mixed_precision(setting: Setting) -> Outcome:
    """The outcome of accelerate's `mixed_precision`."""
    dtype = setting.one_of({"fp16": "float16", "bf16": "bfloat16", "no": "float32"})
    return to_fields({"model.dtype": dtype}, "losses are scaled, as there" if dtype == "float16" else "")


def lora_to_train_further(setting: Setting) -> Outcome:
    """The outcome of a LoRA that is trained further; in all frameworks the reference is the model without it."""
    return to_fields(
        {"model.lora": setting.text()},
        "it keeps its rank, alpha and layers; a KL is measured from the model with it, there from the model without",
    )


def group_outcome(size: object, pairs: bool, note: str = "no pruning; --plan.preset late prunes") -> Outcome:
    """The outcome of a group's size, without pruning. Where `pairs` are learnt, they are a group's best and worst."""
    fields: dict[str, object] = {"plan.preset": "custom", "plan.group_size": size}
    if not pairs:
        return to_fields(fields, note)
    if isinstance(size, int) and size > 2:
        fields["plan.final_keep"] = 2
    return to_fields(fields, "the best and the worst of a group are its pair")


def part_of(path: str) -> Rule:
    """The rule of a setting that enters a field of ours which another setting's rule sets."""
    return lambda setting: counted_in(path)


def ignored(why: str) -> Rule:
    return lambda setting: not_needed(why)


def named_below(section: str, names: str, rule: Rule) -> dict[str, Rule]:
    """The rule for each of these names, which spaces divide, in a section of settings."""
    return dict.fromkeys((f"{section}{name}" for name in names.split()), rule)


def only_at(*values: object, why: str, otherwise: str) -> Rule:
    """The rule of a setting that is not needed at these values and has no equal at any other."""
    return lambda setting: not_needed(why) if setting.value in values else no_equal(otherwise)


UNIPC_LEVELS = (
    "its levels are .999 (1 - i / T) before the shift; ours are Euler's, from 1 to .001, with the model's own shift"
)
"""The difference of Wan's scheduler in both frameworks."""


# --- rewards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NearestReward:
    """Our reward that is nearest to one of another framework, whose value is `factor` times ours.

    `difference` is a clause with any other difference; empty if there is none.
    """

    name: str
    factor: float = 1.0
    difference: str = ""


def reward_outcome(
    place: str, own: str, nearest: NearestReward | None, weight: float | None, what: str = ""
) -> Outcome:
    """The outcome of a reward that becomes the term `own` at `place`.

    Its weight, if any, is converted so that both frameworks add the same numbers. A reward without an equal still gets
    a term: the nearest of ours, or a function that the user writes. `what` describes what that function computes.
    """
    factor = nearest.factor if nearest else 1.0
    fields: dict[str, object] = {f"{place}.name": own}
    if weight is not None:
        fields[f"{place}.weight"] = weight if factor == 1 else round(weight * factor, 9)
    scale = ""
    if factor != 1 and weight is not None:
        scale = f"weight {weight:g} there, whose reward is {factor:.6g} times ours"
    if nearest is None:
        described = f" ({what})" if what else ""
        return no_equal(
            f"no built-in reward{described}; the configuration names {own}, a function for you to write"
            " (docs/rewards.md)",
            fields,
        )
    if nearest.difference:
        return no_equal("; ".join(filter(None, (f"{own} is nearest: {nearest.difference}", scale))), fields)
    return to_fields(fields, scale)
