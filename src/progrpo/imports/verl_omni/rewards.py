"""Rules of rewards: one function, or several with weights."""

from __future__ import annotations

import re

from progrpo.imports.outcome import Outcome, Setting, counted_in, no_equal, not_needed
from progrpo.imports.shared_rules import NearestReward, reward_outcome

_ONE = "reward.custom_reward_function"
_SEVERAL = "reward.reward_functions["
_READ_BY_A_MODEL = (
    "there a vision-language model reads the text, which is compared with the row's ground truth; ours reads by optical"
    " character recognition, and compares with the text that the prompt has in quotes"
)
_NOT_COMPARED = "its scale has not been compared with ours"
REWARDS = {
    "compute_score_ocr": NearestReward("ocr", difference=_READ_BY_A_MODEL),
    "compute_score_pickscore": NearestReward("pickscore"),
    "compute_score_hpsv2": NearestReward("hpsv2"),
    "compute_score_hpsv3": NearestReward("hpsv3", difference=_NOT_COMPARED),
    "compute_score_unified_reward": NearestReward("unifiedreward", difference=_NOT_COMPARED),
    "jpeg_compressibility": NearestReward("jpeg_compressibility", 1 / 500),
}
"""Rewards by the name of their function, or of its file where the function is `compute_score`."""


def _function(setting: Setting) -> str:
    """The name of the function that a setting's reward calls."""
    head = setting.name.rpartition(".")[0]
    name = str(setting.all.get(f"{head}.name", "compute_score"))
    file = re.split(r"[./:]", str(setting.all.get(f"{head}.path", "")).removesuffix(".py"))[-1]
    return file if name == "compute_score" and file else name


def _outcome(setting: Setting, place: str, weight: float) -> Outcome:
    function = _function(setting)
    nearest = REWARDS.get(function)
    own = nearest.name if nearest else f"my_rewards:{function if function.isidentifier() else 'reward'}"
    return reward_outcome(place, own, nearest, weight)


def _has_several(setting: Setting) -> bool:
    return any(name.startswith(_SEVERAL) for name in setting.all)


def one_function(setting: Setting) -> Outcome:
    """The outcome of the function's name, or of its path where there is no name."""
    if _has_several(setting):
        return not_needed("the functions of reward_functions are read instead")
    if setting.value is None:
        return no_equal("the data choose the reward there; give --reward.terms")
    if setting.name.endswith(".path") and f"{_ONE}.name" in setting.all:
        return counted_in("reward.terms")
    return _outcome(setting, "reward.terms[0]", 1.0)


def _place(setting: Setting) -> str:
    """The term of one of several functions, in their order."""
    heads = list(dict.fromkeys(name.partition("]")[0] for name in setting.all if name.startswith(_SEVERAL)))
    return f"reward.terms[{heads.index(setting.name.partition(']')[0])}]"


def function_of_several(setting: Setting) -> Outcome:
    head = setting.name.rpartition(".")[0]
    if setting.name.endswith(".path") and f"{head}.name" in setting.all:
        return counted_in(_place(setting))
    weight = Setting(f"{head}.weight", setting.all.get(f"{head}.weight", 1.0), setting.all)
    return _outcome(setting, _place(setting), weight.number() if weight.name in setting.all else 1.0)


def weight(setting: Setting) -> Outcome:
    head = setting.name.rpartition(".")[0]
    if f"{head}.path" not in setting.all and f"{head}.name" not in setting.all:
        return not_needed("it has no reward")
    return counted_in(f"{_place(setting)}.weight")


def aggregation(setting: Setting) -> Outcome:
    return not_needed("the same here") if setting.value == "weighted_sum" else no_equal("rewards are summed here")
