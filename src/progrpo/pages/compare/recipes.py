"""Recipes among runs: those whose configurations differ in the seed and in what the machine chose alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from progrpo.pages.run_data import RunData, flat
from progrpo.tracking.wording import MISSING

_MACHINES_CHOICE = ("model.dtype", "sampling.microbatch", "optim.microbatch")
_WITHOUT_EFFECT = ("tracking.", "checkpoint.")
_MEASURE = ("reward.terms.", "eval.")
_HOW_IT_RUNS = ("device", "dtype", "batch_size", "retries", "timeout", "processes", "cache", "url")
_WHEN_IT_IS = ("eval.every", "eval.keep_best", "eval.best_by")
_MOST_NAMED = 3
"""The most settings that a label names."""
_LONGEST = 40
"""The most characters of a value in a label."""


@dataclass(frozen=True)
class Recipe:
    """The runs of one recipe, a seed each as a rule."""

    label: str
    runs: Sequence[RunData]

    @property
    def settings(self) -> Mapping[str, object]:
        return _settings(self.runs[0])

    @property
    def seeds(self) -> list[object]:
        return [seed_of(run) for run in self.runs]


def seed_of(run: RunData) -> object:
    return run.config.get("seed", run.summary.get("seed"))


def grouped(runs: Sequence[RunData]) -> list[Recipe]:
    """The recipes of runs in the order of their first runs, each with a label of its own."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        chosen = {name: value for name, value in _settings(run).items() if name not in _MACHINES_CHOICE}
        groups.setdefault(_text(chosen), []).append(run)
    members = list(groups.values())
    return [Recipe(label, group) for label, group in zip(_labels(members), members, strict=True)]


def differences(recipes: Sequence[Recipe]) -> dict[str, list[str]]:
    """The settings that differ between recipes, with the value of each. One that a run does not record is a dash."""
    named = [recipe.settings for recipe in recipes]
    names = dict.fromkeys(name for settings in named for name in settings)
    values = {name: [_value(settings, name) for settings in named] for name in names}
    return {name: of_each for name, of_each in values.items() if len(set(of_each)) > 1}


def measures_that_differ(recipes: Sequence[Recipe]) -> list[str]:
    """The settings that make rewards incomparable: the reward itself, and the prompts and noise of evaluations."""
    return [name for name in differences(recipes) if _is_measure(name)]


def _is_measure(name: str) -> bool:
    if name in _WHEN_IT_IS or name.rpartition(".")[2] in _HOW_IT_RUNS:
        return False
    return name.startswith(_MEASURE) and not name.startswith("eval.rewards")


def _settings(run: RunData) -> dict[str, object]:
    """The settings of a run that may change what it comes to, without its seed."""
    return {
        name: value
        for name, value in flat(run.config).items()
        if name != "seed" and not name.startswith(_WITHOUT_EFFECT)
    }


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _value(settings: Mapping[str, object], name: str) -> str:
    if name not in settings:
        return MISSING
    value = settings[name]
    return value if isinstance(value, str) and value else _text(value)


# --- labels -----------------------------------------------------------------------------------------------------------


def _labels(groups: Sequence[Sequence[RunData]]) -> list[str]:
    """A name for each group: its recipe's, with the settings that tell it from others, or else its first folder's."""
    names = [group[0].recipe for group in groups]
    if len(set(names)) == len(names):
        return names
    unlike = differences([Recipe("", group) for group in groups])
    named = {name: of_each for name, of_each in unlike.items() if name not in ("recipe", *_MACHINES_CHOICE)}
    if len(named) > _MOST_NAMED:
        return _unique([group[0].path.resolve().name for group in groups])
    words = [
        [f"{key.rpartition('.')[2]} {_short(of_each[i])}" for key, of_each in named.items()] for i in range(len(groups))
    ]
    return _unique([", ".join([name, *of_group]) for name, of_group in zip(names, words, strict=True)])


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _unique(labels: Sequence[str]) -> list[str]:
    """The labels, each with a number where another is equal."""
    return [
        f"{label} ({labels[: i + 1].count(label)})" if labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    ]
