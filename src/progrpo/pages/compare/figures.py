"""Figures of a comparison: numbers from runs, without HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from progrpo.pages import charts
from progrpo.pages.compare.recipes import Recipe
from progrpo.pages.run_data import RunData
from progrpo.tracking.records import EvaluationRecord, metric
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
    positions = charts.positions(run.metrics)
    hours = [seconds * processes_of(run) / 3600 for seconds in positions["seconds"]]
    places = {**positions, HOURS: hours}
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
    """The arrivals of each run at each level, by the recipe's label."""


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


@dataclass(frozen=True)
class _Measured:
    """A figure's value of each picture of a run, before and after training."""

    run: RunData
    before: Sequence[float | None]
    after: Sequence[float | None]

    @property
    def mean_before(self) -> float | None:
        return _mean(self.before)

    @property
    def mean_after(self) -> float | None:
        return _mean(self.after)


def finals(recipes: Sequence[Recipe]) -> dict[str, list[Final]]:
    """The figures that any recipe has, for each recipe."""
    held_out = sorted({name for recipe in recipes for run in recipe.runs for name in _held_out_names(run)})
    names = [*_OF_RECORDS, *(f"held_out@{name}" for name in held_out)]
    figures = {name: _of_recipes(name, recipes) for name in names}
    return {name: of_each for name, of_each in figures.items() if any(f.before is not None or f.after for f in of_each)}


def _held_out_names(run: RunData) -> set[str]:
    return {name for record in [*run.before, *run.after] for name in record.get("held_out") or {}}


def _of_recipes(name: str, recipes: Sequence[Recipe]) -> list[Final]:
    measured = [
        [_Measured(run, _column(run.before, name), _column(run.after, name)) for run in recipe.runs]
        for recipe in recipes
    ]
    first = measured[0]
    return [
        Final(
            before=_mean([run.mean_before for run in runs]),
            after=None if (after := _after(runs)) is None else interval(after),
            change=_change(runs),
            against_first=None if runs is first else _against(first, runs),
        )
        for runs in measured
    ]


def _after(runs: Sequence[_Measured]) -> Mean | None:
    """The mean after training: over the means of seeds, or over the pictures of a single run."""
    measured = [run for run in runs if run.mean_after is not None]
    if len(measured) == 1:
        return mean_of(_known(measured[0].after))
    return mean_of(_known(run.mean_after for run in measured)) if measured else None


def _change(runs: Sequence[_Measured]) -> Interval | None:
    """The mean change: over seeds, or picture by picture of a single run."""
    measured = [run for run in runs if None not in (run.mean_before, run.mean_after)]
    if len(measured) == 1:
        (one,) = measured
        return _paired(one.before, one.after) if one.run.paired else None
    changes = [(run.mean_before, run.mean_after) for run in measured]
    return interval(paired_difference(*zip(*changes, strict=True))) if changes else None


def _against(first: Sequence[_Measured], other: Sequence[_Measured]) -> Interval | None:
    """The difference of two recipes: over seeds where both have several, and over pictures where both have one run.

    Otherwise the difference is given without an interval.
    """
    a, b = _after(first), _after(other)
    if a is None or b is None:
        return None
    one, two = ([run for run in runs if run.mean_after is not None] for runs in (first, other))
    if min(len(one), len(two)) > 1:
        return difference_of_means(a, b)
    if len(one) == len(two) and _prompts(one[0].run) == _prompts(two[0].run):
        return _paired(one[0].after, two[0].after)
    return Interval(b.value - a.value, float("nan"))


def _prompts(run: RunData) -> list[str]:
    return [record["prompt"] for record in run.after]


def _paired(before: Sequence[float | None], after: Sequence[float | None]) -> Interval | None:
    """The mean difference over the pictures that have both values."""
    known = [pair for pair in zip(before, after, strict=True) if None not in pair]
    return interval(paired_difference(*zip(*known, strict=True))) if known else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return float(np.mean(known)) if known else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


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
