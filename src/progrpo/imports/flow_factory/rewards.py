"""Rules of rewards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from progrpo.imports.outcome import Outcome, Rule, Setting, counted_in, no_equal, not_needed, to_fields
from progrpo.imports.shared_rules import NearestReward, reward_outcome
from progrpo.messages import named

_ONLY_OURS = ("imagereward", "aesthetic", "clipscore")
_JUDGES = ("vllm_evaluate", "rational_rewards_t2i", "rational_rewards_edit")
_MISSING_MARKS = (
    "there a mark that is missing is left out of the mean, here the score is missing; name its model if the server"
    " knows it by another name than its hub id"
)
_UNREGISTERED = "it has no reward of this name, and the values of yours are not known here"
REWARDS = {
    "pickscore": NearestReward("pickscore"),
    "clip": NearestReward(
        "clipscore",
        1 / 2.5,
        "theirs is the cosine with the prompt, and of a video's first frame; ours is 2.5 times that, with"
        " 'A photo depicts ' before the prompt, and never below 0",
    ),
    "hpsv2": NearestReward("hpsv2"),
    "geneval2_soft_tifa": NearestReward(
        "soft_tifa",
        difference="theirs asks Qwen3-VL-8B in the run's own process; ours asks the server in OPENAI_BASE_URL, or in"
        " the term's url",
    ),
    "ocr": NearestReward(
        "ocr",
        difference="theirs compares with the whole prompt, or is a mean over quotes by the longer text; ours is"
        " 1 - edits / length of the text that the prompt has in quotes",
    ),
    "geneval": NearestReward(
        "geneval",
        difference="theirs is the mean over clauses of the least of number and colour, with a place by centres alone;"
        " both are in 0..1",
    ),
    "vllm_evaluate": NearestReward(
        "vlm",
        difference="theirs is P(yes) / (P(yes) + P(no)) of 'Is it a beautiful image?', without the prompt; ours is a"
        " mark of 0 to 10, over 10, and a column `question` holds the question",
    ),
    "rational_rewards_t2i": NearestReward("rationalrewards", difference=_MISSING_MARKS),
    "rational_rewards_edit": NearestReward("rationalrewards_edit", difference=_MISSING_MARKS),
    **{name: NearestReward(name, difference=_UNREGISTERED) for name in _ONLY_OURS},
}
"""Rewards by name in small letters, as Flow-Factory looks them up."""
_NOT_BUILT_IN = {
    "pickscore_rank": "PickScore's rank in its group over the group's size: a function with `groupwise = True`",
    "clap": "of sound",
    "imagebind": "of sound",
    "consistent_editing": "a judge of edits",
    "qwen_image_bench": "a judge's marks for the questions of a benchmark",
}


def _nearest(setting: Setting) -> NearestReward | None:
    """The reward of ours that is nearest; without its scale under gdpo, which divides the scale out."""
    nearest = REWARDS.get(setting.text().lower())
    scaled = setting.all.get("train.advantage_aggregation") != "gdpo"
    return nearest if nearest is None or scaled else replace(nearest, factor=1.0)


def soft_tifa_mean(setting: Setting) -> Outcome:
    """The outcome of the mean that GenEval 2's reward takes over a prompt's questions."""
    if setting.one_of({"gm": True, "am": False}):
        return not_needed("the same here: a geometric mean")
    return no_equal("name the reward soft_tifa_am for the arithmetic mean")


def _reward_name(setting: Setting) -> str:
    """The name of our reward, or of a function that the user writes."""
    last = re.split(r"[.:/]", setting.text())[-1]
    nearest = _nearest(setting)
    return nearest.name if nearest else f"my_rewards:{last if last.isidentifier() else 'reward'}"


def _applies(setting: Setting) -> bool:
    """Whether a reward applies to the data set that is read."""
    datasets = setting.all.get(setting.name.rpartition(".")[0] + ".applicable_datasets")
    return not isinstance(datasets, list) or setting.all.get("data.datasets[0].name") in datasets


def reward_model(setting: Setting) -> Outcome:
    own = _reward_name(setting)
    if not _applies(setting):
        return no_equal(
            f"it is for other data sets than the one that is read, {named(setting.all.get('data.datasets[0].name'))}"
        )
    if setting.name.startswith("eval_") and own in _trained_rewards(setting):
        return not_needed("the trained rewards are measured at every evaluation")
    what = _NOT_BUILT_IN.get(setting.text().lower(), "")
    return reward_outcome(_place(setting), own, _nearest(setting), _reward_weight(setting), what)


def _trained_rewards(setting: Setting) -> list[str]:
    """Our names of the rewards that are trained on."""
    names = [name for name in setting.all if re.fullmatch(r"rewards\[\d+\]\.reward_model", name)]
    trained = [Setting(name, setting.all[name], setting.all) for name in names]
    return [_reward_name(reward) for reward in trained if _applies(reward)]


def _reward_weight(setting: Setting) -> float | None:
    """The weight of a reward for the data set that is read; None for a reward that is only evaluated."""
    if setting.name.startswith("eval_"):
        return None
    head = setting.name.rpartition(".")[0] + ".weight"
    names = head, f"{head}[{setting.all.get('data.datasets[0].name')}]"
    return next((setting.number(name) for name in names if name in setting.all), 1.0)


def weight(setting: Setting) -> Outcome:
    if setting.name.startswith("eval_"):
        return not_needed("a reward that is only measured has no weight")
    dropped = _dropped_with_reward(setting)
    return counted_in(f"{_place(setting)}.weight") if dropped is None else dropped


def weight_of_set(setting: Setting) -> Outcome:
    own = setting.name.endswith(f"[{setting.all.get('data.datasets[0].name')}]")
    return weight(setting) if own else not_needed("for a data set that is not read")


def _dropped_with_reward(setting: Setting) -> Outcome | None:
    """The outcome of a setting whose reward is not used, or is measured as it is trained on; None for any other."""
    head = re.sub(r"(\[\d+\]).*", r"\1", setting.name)
    model = setting.all.get(f"{head}.reward_model")
    if model is None:
        return not_needed("it has no reward")
    reward = Setting(f"{head}.reward_model", model, setting.all)
    if not _applies(reward):
        return not_needed("its reward is not used")
    if reward_model(reward).status == "not needed here":
        return not_needed("this reward is measured as it is trained on")
    return None


def reward_field(field: str, names: Mapping[str, object] | None = None) -> Rule:
    """The rule of a reward's setting for which our rewards have this field."""

    def rule(setting: Setting) -> Outcome:
        dropped = _dropped_with_reward(setting)
        if dropped is not None:
            return dropped
        value = setting.one_of(names) if names else setting.value
        return to_fields({f"{_place(setting)}.{field}": value})

    return rule


_DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "float32": "float32",
    "fp32": "float32",
}


def reward_dtype(setting: Setting) -> Outcome:
    model = setting.all.get(setting.name.rpartition(".")[0] + ".reward_model")
    if str(model).lower() != "pickscore" or _dropped_with_reward(setting) is not None:
        return reward_field("dtype", _DTYPES)(setting)
    return to_fields({f"{_place(setting)}.dtype": "float32"}, "its PickScore always computes in float32")


def judge_field(field: str) -> Rule:
    """The rule of a setting of the server that a judge asks."""

    def rule(setting: Setting) -> Outcome:
        model = setting.all.get(setting.name.rpartition(".")[0] + ".reward_model")
        if str(model).lower() not in _JUDGES:
            return no_equal("a setting of a reward that you write")
        return reward_field(field)(setting)

    return rule


def _place(setting: Setting) -> str:
    index = re.findall(r"\[(\d+)\]", setting.name)[0]
    terms = "eval.rewards" if setting.name.startswith("eval_") else "reward.terms"
    return f"{terms}[{index}]"
