"""The result of a suite: each model's figures with intervals, by kind, and against the base on the same noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from progrpo.suites.formats import SuitePrompt
from progrpo.suites.records import Key, MeasuresRecord, PictureRecord
from progrpo.suites.statistics import Clusters, Estimate, estimate, holm, paired

ACCURACY, JUDGE, KL = "accuracy", "judge", "kl"
DIVERSITY = {"diversity": "pixels", "lpips": "LPIPS", "distance": "features", "vendi": "Vendi"}
"""The figures of several pictures of a prompt."""
VENDI_OF_ALL = "vendi of all"
SHARES = (ACCURACY, JUDGE)
"""The figures that are shares of pictures."""


class Figure(TypedDict):
    """A mean with its 95 % interval (None where it is not known) and the number of its pictures or prompts."""

    value: float
    low: float | None
    high: float | None
    count: int


class Change(Figure):
    """A difference to the base, its p-value, and that of all the model's figures together (Holm)."""

    p: float
    p_holm: float


class ModelResult(TypedDict):
    """The figures of one model."""

    name: str
    folder: str
    is_base: bool
    pictures: int
    missing: int
    figures: dict[str, Figure]
    by_kind: dict[str, dict[str, Figure]]
    """The figures of each kind, by the figure's name."""
    against: dict[str, Change]


class SuiteResults(TypedDict):
    """The result of a suite, in results.json."""

    suite: str
    paper: str
    score: str
    """The figure that the suite is about."""
    mean_of_kinds: bool
    prompts: int
    of_prompts: int
    """The prompts of the whole suite."""
    pictures_per_prompt: int
    prompts_digest: str
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str
    seed: int
    features: str
    kinds: list[str]
    models: list[ModelResult]
    notes: list[str]
    seconds: float
    device: str
    command: str


@dataclass(frozen=True)
class ModelRecords:
    """The records and measures of one model's pictures."""

    name: str
    folder: str
    records: Mapping[Key, PictureRecord]
    measures: MeasuresRecord
    is_base: bool = False


@dataclass(frozen=True)
class Grid:
    """The prompts of an evaluation, each with its number of pictures; columns of values follow this order."""

    prompts: Sequence[SuitePrompt]
    per_prompt: int
    mean_of_kinds: bool

    @property
    def keys(self) -> list[Key]:
        return [(item.place, member) for item in self.prompts for member in range(self.per_prompt)]

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(item.kind for item in self.prompts if item.kind))

    def clusters(self, each: int) -> Clusters:
        """The clusters of `each` values of every prompt."""
        items = [item for item in self.prompts for _ in range(each)]
        texts, kinds = [item.prompt.text for item in items], [item.kind for item in items]
        return Clusters.of(texts, kinds, self.mean_of_kinds)

    def rows_of_kind(self, kind: str, each: int) -> np.ndarray:
        return np.array([item.kind == kind for item in self.prompts for _ in range(each)])


def model_results(grid: Grid, models: Sequence[ModelRecords], rewards: Sequence[str]) -> list[ModelResult]:
    """The figures of each model, and its differences to the base, if one of them is it."""
    columns = [_columns(grid, model, rewards) for model in models]
    base = next((n for n, model in enumerate(models) if model.is_base), None)
    results: list[ModelResult] = []
    for n, model in enumerate(models):
        records = [model.records.get(key) for key in grid.keys]
        against = {} if base is None or base == n else _changes(grid, columns[base], columns[n])
        figures = {name: figure for name, c in columns[n].items() if (figure := _figure(grid, c)) is not None}
        if KL in figures:
            figures[KL] = figures.pop(KL)
        vendi = model.measures.get("vendi_of_all")
        if vendi is not None:
            figures[VENDI_OF_ALL] = {"value": vendi, "low": None, "high": None, "count": len(records)}
        results.append(
            {
                "name": model.name,
                "folder": model.folder,
                "is_base": model.is_base,
                "pictures": sum(1 for record in records if record and record["there"]),
                "missing": sum(1 for record in records if not record or not record["there"]),
                "figures": figures,
                "by_kind": {name: of for name, c in columns[n].items() if name != KL and (of := _by_kind(grid, c))},
                "against": against,
            }
        )
    return results


def score_of(models: Iterable[ModelResult], rewards: Sequence[str]) -> str:
    """The figure that a suite is about: the accuracy, where its reward has a verdict, else its first reward."""
    return ACCURACY if any(ACCURACY in model["figures"] for model in models) else rewards[0]


@dataclass(frozen=True)
class _Column:
    """The values of a figure, NaN where missing: `each` of every prompt."""

    values: np.ndarray
    each: int


def _columns(grid: Grid, model: ModelRecords, rewards: Sequence[str]) -> dict[str, _Column]:
    records: list[Mapping[str, Any]] = [model.records.get(key) or {} for key in grid.keys]
    per_picture = {
        ACCURACY: [record.get("strict") for record in records],
        **{name: [record.get("rewards", {}).get(name) for record in records] for name in rewards},
        JUDGE: [record.get("judge") for record in records],
    }
    places = [str(item.place) for item in grid.prompts]
    spread, kl = model.measures.get("diversity", {}), model.measures.get("kl", {})
    per_prompt = {name: [spread.get(place, {}).get(name) for place in places] for name in DIVERSITY}
    per_prompt[KL] = [kl.get(place) for place in places]
    columns = {name: _Column(_numbers(values), grid.per_prompt) for name, values in per_picture.items()}
    return columns | {name: _Column(_numbers(values), 1) for name, values in per_prompt.items()}


def _numbers(values: Iterable[float | bool | None]) -> np.ndarray:
    return np.array([math.nan if value is None else float(value) for value in values])


def _figure(grid: Grid, column: _Column) -> Figure | None:
    estimated = estimate(column.values, grid.clusters(column.each))
    return None if estimated is None else _plain(estimated)


def _by_kind(grid: Grid, column: _Column) -> dict[str, Figure]:
    clusters = grid.clusters(column.each)
    figures: dict[str, Figure] = {}
    for kind in grid.kinds:
        rows = grid.rows_of_kind(kind, column.each)
        of_kind = estimate(column.values[rows], clusters.take(rows))
        if of_kind is not None:
            figures[kind] = _plain(of_kind)
    return figures


def _changes(grid: Grid, base: Mapping[str, _Column], model: Mapping[str, _Column]) -> dict[str, Change]:
    differences = {
        name: difference
        for name, column in model.items()
        if name != KL
        and (difference := paired(base[name].values, column.values, grid.clusters(column.each))) is not None
    }
    adjusted = holm([difference.p for difference in differences.values()])
    return {
        name: Change(**_plain(difference), p=difference.p, p_holm=p)
        for (name, difference), p in zip(differences.items(), adjusted, strict=True)
    }


def _plain(estimated: Estimate) -> Figure:
    low, high = (None if math.isnan(end) else end for end in (estimated.low, estimated.high))
    return {"value": estimated.value, "low": low, "high": high, "count": estimated.count}
