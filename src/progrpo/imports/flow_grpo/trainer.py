"""Rules of the trainer: its loss, its averages of the weights and the noise levels that it trains."""

from __future__ import annotations

from progrpo.imports.flow_grpo.sampling import batches_trained, updates
from progrpo.imports.flow_grpo.scripts import ALGORITHM, is_dpo, kind_of, reads_windows
from progrpo.imports.outcome import Outcome, Setting, no_equal, not_needed, to_fields
from progrpo.messages import quoted

ONLY_THESE = (
    "only GRPO and DPO are translated from flow_grpo, since the other settings mean something else under another"
    " algorithm"
)
_NEVER = 1_000_000
"""The number of updates from which on flow_grpo's DPO updates its reference in no real run."""


def algorithm(setting: Setting) -> Outcome:
    name = str(setting.value).lower()
    if name not in ("grpo", "dpo"):
        raise ValueError(f"{ALGORITHM} {quoted(setting.value)} has no equal here: {ONLY_THESE}")
    if name == "grpo":
        return not_needed("the same here")
    fields = {"objective.name": "dpo", "objective.advantage": "group", "sampling.sde_window": "all"}
    return to_fields(fields, "pairs of equal weight, sampled with noise")


def script(setting: Setting) -> Outcome:
    if is_dpo(setting):
        return not_needed("there is one script for DPO")
    if setting.one_of({"plain": False, "fast": False, "guard": True}):
        return to_fields({"objective.grpo.ratio": "guard", "objective.grpo.step_weights": "inverse_h"})
    if setting.value == "fast":
        return Outcome("translated", "a window of noisy steps, and only these are trained: sampling.sde_window_*")
    return Outcome("translated", "every step is noisy, and all but the last are trained; --script names another")


def timestep_fraction(setting: Setting) -> Outcome:
    if is_dpo(setting):
        draws = max(1, int(setting.count("sample.num_steps") * setting.number()))
        return to_fields({"objective.dpo.draws": draws}, "steps times the fraction")
    if reads_windows(setting):
        return not_needed("the window says which steps are trained")
    steps = setting.count("sample.num_steps")
    trained = int(steps * setting.number())
    if trained >= steps:
        return to_fields(
            {"sampling.train_last_step": True},
            "the last step is nearly deterministic and its log-prob overflows; better false",
        )
    all_but_last = "all steps but the last are trained"
    return not_needed(all_but_last) if trained == steps - 1 else no_equal(all_but_last)


def ema(setting: Setting) -> Outcome:
    if not setting.value:
        return to_fields({"optim.ema_decay": 0.0})
    if kind_of(setting).startswith("Qwen-Image"):
        return no_equal("its script for Qwen-Image keeps no average, and fails at it; none is kept here")
    if is_dpo(setting):
        return to_fields({"optim.ema_decay": round(0.9 ** (updates(setting) / 8), 4)}, "0.9 there every eighth update")
    # it takes a tenth at each batch from every eighth update to the next; ours is updated once per iteration
    decay = round(0.9 ** (batches_trained(setting) / 8), 4)
    return to_fields({"optim.ema_decay": decay}, "0.9 there at each batch of every eighth update")


def reference_updates(setting: Setting) -> Outcome:
    if not is_dpo(setting):
        return not_needed("only its script for DPO reads it")
    why = "the reference stays the model at its start"
    return not_needed(why) if setting.number() >= _NEVER else no_equal(why)


def beta(setting: Setting) -> Outcome:
    if is_dpo(setting):
        return to_fields({"objective.dpo.beta": setting.number() / 2}, "its loss halves it")
    fields: dict[str, object] = {"objective.grpo.kl_beta": setting.value}
    note = ""
    if setting.number() > 0 and setting.all.get("sample.sde_type") == "cps":
        note = "CPS's std is the step's, so its form is the exact one"
    elif setting.number() > 0 and kind_of(setting) == "Wan":
        fields["objective.grpo.kl_form"] = "exact"
    elif setting.number() > 0:
        fields["objective.grpo.kl_form"] = "flow_grpo"
    return to_fields(fields, note)


def advantage_std(setting: Setting) -> Outcome:
    if is_dpo(setting):
        return not_needed("all pairs have equal weight")
    advantage = "batch" if setting.value else "group"
    return to_fields({"objective.advantage": advantage}, "the std of all pictures, or of each group")


def betas(setting: Setting) -> Outcome:
    return to_fields({"optim.betas": [setting.number(), setting.number("train.adam_beta2")]})
