"""Figures of a comparison: numbers from runs, without HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from progrpo.pages import charts
from progrpo.pages.compare.recipes import Recipe
from progrpo.pages.run_data import RunData
from progrpo.tracking.records import EvaluationRecord, before_and_after, metric
from progrpo.tracking.statistics import Interval, Mean, difference_of_means, interval, mean_of, paired_difference

HOURS = "hours"
AXES = ("seconds", "nfe", "iteration", HOURS)
"""The axes: the training's seconds and NFE so far, the iteration, and hours of all processes together."""
EVALUATED = "eval/graded"
SHARES = (0.25, 0.5, 0.75, 1.0)
_OF_RECORDS = {"reward": "graded", "accuracy": "strict", "judge": "judge", "diversity": "diversity"}
"""The figures of an evaluation, and their fields in its records."""

Positions = Mapping[str, float]
"""A place on each of AXES."""


def processes_of(run: RunData) -> int:
    """The processes of a run, one as a rule per GPU. Runs of before this was recorded count as one."""
    return int(run.summary.get("processes") or 1)


# --- curves -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A value of a metric, and where it was measured."""

    at: Positions
    value: float


def curve(run: RunData, name: str) -> list[Point]:
    """The values of a metric over the run."""
    found = charts.positions(run.metrics)
    hours = [seconds * processes_of(run) / 3600 for seconds in found["seconds"]]
    places = {**found, HOURS: hours}
    return [
        Point({axis: float(places[axis][i]) for axis in AXES}, float(value))
        for i, record in enumerate(run.metrics)
        if (value := metric(record, name)) is not None
    ]


@dataclass(frozen=True)
class Spread:
    """A metric over the seeds of a recipe: the mean, the lowest and the highest, at the mean of their places."""

    at: Mapping[str, list[float]]
    mean: list[float]
    low: list[float]
    high: list[float]


def spread(curves: Sequence[Sequence[Point]]) -> Spread:
    """The spread at the iterations at which every one of the curves has a value."""
    by_iteration = [{point.at["iteration"]: point for point in points} for points in curves if points]
    shared = sorted(set.intersection(*map(set, by_iteration))) if by_iteration else []
    rows = [[points[iteration] for points in by_iteration] for iteration in shared]
    values = [[point.value for point in row] for row in rows]
    return Spread(
        at={axis: [float(np.mean([point.at[axis] for point in row])) for row in rows] for axis in AXES},
        mean=[float(np.mean(row)) for row in values],
        low=[min(row) for row in values],
        high=[max(row) for row in values],
    )


def metric_names(runs: Iterable[RunData], start: str) -> list[str]:
    """The metrics of this beginning that any of the runs has."""
    return sorted({name for run in runs for record in run.metrics for name in record if name.startswith(start)})


# --- time to equal reward ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """The place at which a run's evaluations first reach a level. `at_first`: the first of them is there already."""

    at: Positions
    at_first: bool


def arrival(points: Sequence[Point], level: float) -> Arrival | None:
    """The first place at which the line through the points is at the level or above; None if it never is."""
    if points and points[0].value >= level:
        return Arrival(points[0].at, at_first=True)
    for a, b in pairwise(points):
        if b.value >= level:
            share = (level - a.value) / (b.value - a.value)
            return Arrival({axis: a.at[axis] + share * (b.at[axis] - a.at[axis]) for axis in a.at}, at_first=False)
    return None


@dataclass(frozen=True)
class Levels:
    """Rewards that all compared recipes reach on average, and when each of their runs first does."""

    start: float
    end: float
    rewards: list[float]
    arrivals: Mapping[str, list[list[Arrival | None]]]
    """By the recipe's label: for each level the arrival of each of its runs."""


def levels(recipes: Sequence[Recipe]) -> Levels | None:
    """The levels between the lowest first evaluation and the lowest last one, each the mean over a recipe's seeds.

    None if no recipe has been evaluated twice during its runs, or if the lowest end is not above the lowest start.
    """
    curves = {recipe.label: [curve(run, EVALUATED) for run in recipe.runs] for recipe in recipes}
    curves = {label: [points for points in runs if len(points) > 1] for label, runs in curves.items()}
    evaluated = {label: runs for label, runs in curves.items() if runs}
    if not evaluated:
        return None
    start = min(float(np.mean([points[0].value for points in runs])) for runs in evaluated.values())
    end = min(float(np.mean([points[-1].value for points in runs])) for runs in evaluated.values())
    if end <= start:
        return None
    rewards = [start + share * (end - start) for share in SHARES]
    arrivals = {
        label: [[arrival(points, reward) for points in runs] for reward in rewards] for label, runs in evaluated.items()
    }
    return Levels(start, end, rewards, arrivals)


# --- final figures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Final:
    """A figure of the evaluations before and after training, on the test prompts."""

    before: float | None
    after: Interval | None
    change: Interval | None
    """From before to after: over seeds, or over the pictures of a single run."""
    against_first: Interval | None
    """From the first recipe to this one."""


def finals(recipes: Sequence[Recipe]) -> dict[str, list[Final]]:
    """The figures that any recipe has, for each recipe."""
    held_out = sorted({name for recipe in recipes for run in recipe.runs for name in _held_out_names(run)})
    names = [*_OF_RECORDS, *(f"held_out@{name}" for name in held_out)]
    found = {name: [_final(name, recipe, recipes[0]) for recipe in recipes] for name in names}
    return {name: of_each for name, of_each in found.items() if any(f.before is not None or f.after for f in of_each)}


def _held_out_names(run: RunData) -> set[str]:
    return {name for record in [*run.before, *run.after] for name in record.get("held_out") or {}}


def _final(name: str, recipe: Recipe, first: Recipe) -> Final:
    before = [mean for run in recipe.runs if (mean := _mean(run.before, name)) is not None]
    after = _after(name, recipe)
    compared = None if recipe is first else _against(name, first, recipe)
    return Final(
        before=float(np.mean(before)) if before else None,
        after=None if after is None else interval(after),
        change=_change(name, recipe),
        against_first=compared,
    )


def _after(name: str, recipe: Recipe) -> Mean | None:
    """The mean after training: over the means of seeds, or over the pictures of a single run."""
    runs = [run for run in recipe.runs if _mean(run.after, name) is not None]
    if len(runs) == 1:
        return mean_of([value for value in _column(runs[0].after, name) if value is not None])
    return mean_of([_mean(run.after, name) for run in runs]) if runs else None


def _change(name: str, recipe: Recipe) -> Interval | None:
    runs = [run for run in recipe.runs if None not in (_mean(run.before, name), _mean(run.after, name))]
    if len(runs) == 1:
        return _paired(name, runs[0].before, runs[0].after)
    changes = [(_mean(run.before, name), _mean(run.after, name)) for run in runs]
    return interval(paired_difference(*zip(*changes, strict=True))) if changes else None


def _against(name: str, first: Recipe, other: Recipe) -> Interval | None:
    """The difference of two recipes: over seeds where both have several, and over pictures where both have one run."""
    a, b = _after(name, first), _after(name, other)
    if a is None or b is None:
        return None
    sizes = [sum(_mean(run.after, name) is not None for run in recipe.runs) for recipe in (first, other)]
    if min(sizes) > 1:
        return difference_of_means(a, b)
    if max(sizes) == 1:
        one, two = (next(run for run in recipe.runs if run.after) for recipe in (first, other))
        return _paired(name, one.after, two.after)
    return Interval(b.value - a.value, float("nan"))


def _paired(name: str, before: Sequence[EvaluationRecord], after: Sequence[EvaluationRecord]) -> Interval | None:
    """The mean difference over pictures of the same prompts. None where the prompts are others."""
    if [record["prompt"] for record in before] != [record["prompt"] for record in after]:
        return None
    pairs = zip(_column(before, name), _column(after, name), strict=True)
    known = [pair for pair in pairs if None not in pair]
    return interval(paired_difference(*zip(*known, strict=True))) if known else None


def _mean(records: Sequence[EvaluationRecord], name: str) -> float | None:
    values = [value for value in _column(records, name) if value is not None]
    return float(np.mean(values)) if values else None


def _column(records: Sequence[EvaluationRecord], name: str) -> list[float | None]:
    """The value of each picture. ValueError for one that is no number."""
    return [None if (value := _of(record, name)) is None else float(value) for record in records]


def _of(record: EvaluationRecord, name: str) -> float | None:
    if name.startswith("held_out@"):
        return (record.get("held_out") or {}).get(name.removeprefix("held_out@"))
    values: Mapping[str, object] = record
    value = values.get(_OF_RECORDS[name])
    if value is None or isinstance(value, int | float):
        return value
    raise ValueError(f"{_OF_RECORDS[name]} is no number")
