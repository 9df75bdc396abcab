"""The runs of an experiment: those that are missing are trained or resumed, and what all came to is one value."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TypedDict, cast

from progrpo.config import Config
from progrpo.repro.arms import Scale, arms, folder_of
from progrpo.repro.experiments import EXPERIMENTS
from progrpo.tracking.records import EvaluationRecord, Metrics, MetricValue, Summary
from progrpo.tracking.run_folder import RunFolder

STAGES = ("sample", "preview", "reward", "update")
"""The stages whose seconds count as training."""
_CURVES = ("eval/graded", "eval/strict", "reward/std")
_VERDICT = "shapes_strict"
"""The held-out reward that is shown by kind of prompt."""


class RunRecord(TypedDict):
    """The facts of a run that a page shows."""

    arm: str
    seed: int
    summary: Summary
    seconds: float
    """The seconds of sampling, previews, rewards and updates."""
    curves: dict[str, list[list[float]]]
    """Pairs of iteration and value."""
    by_kind: dict[str, dict[str, float]]
    """The share of pictures that pass the held-out verdict, by kind of prompt, before and after training."""


@dataclass(frozen=True)
class Campaign:
    """The folder of all runs, their scale and seeds."""

    folder: Path
    scale: Scale
    seeds: Sequence[int]

    def missing(self, experiment: str) -> Iterator[tuple[str, int, Config]]:
        """The arms, seeds and configurations of runs that have not come to their end."""
        configs = arms(self.scale)
        for seed in self.seeds:
            for arm in EXPERIMENTS[experiment].arms:
                if arm in configs and not finished(self.path(arm, seed)):
                    yield arm, seed, replace(configs[arm], seed=seed)

    def path(self, arm: str, seed: int) -> Path:
        return self.folder / self.scale / folder_of(arm) / f"seed{seed}"

    def train(self, experiment: str, minutes: float) -> int:
        """Train the missing runs until so many minutes are over; the number that is still missing."""
        started = time.monotonic()
        todo = list(self.missing(experiment))
        for done, (arm, seed, config) in enumerate(todo):
            if time.monotonic() - started > 60 * minutes:
                return len(todo) - done
            train_or_resume(config, self.path(arm, seed))
        return 0

    def records(self, experiment: str) -> list[RunRecord]:
        """The finished runs of an experiment, arm by arm."""
        paths = [(arm, seed, self.path(arm, seed)) for arm in EXPERIMENTS[experiment].arms for seed in self.seeds]
        return [record(arm, seed, path) for arm, seed, path in paths if finished(path)]


def train_or_resume(config: Config, path: Path) -> None:
    """Train a configuration into a folder, or go on with the run that it holds."""
    from progrpo.training.checkpoints import saved
    from progrpo.training.entry import resume_run, train_run

    if saved(path):
        resume_run(path)
    else:
        train_run(config, path, overwrite=True)


def finished(path: Path) -> bool:
    """Whether the run in a folder has come to its end."""
    return RunFolder(path).summary.read().get("status") == "finished"


_KEPT = (
    "iterations", "wall_seconds", "nfe", "cost", "seconds_by_stage", "versions", "device", "processes",
    *(f"{name}_{when}" for name in ("reward", "accuracy", "judge", "diversity", "held_out")
      for when in ("before", "after")),
)  # fmt: skip


def record(arm: str, seed: int, path: Path) -> RunRecord:
    """The record of the finished run in a folder."""
    folder = RunFolder(path)
    summary = folder.summary.read()
    kept = cast(Summary, {name: value for name, value in summary.items() if name in _KEPT})
    seconds = sum(summary["seconds_by_stage"].get(stage, 0.0) for stage in STAGES)
    metrics = folder.metrics.read()
    curves = {name: _curve(metrics, name) for name in _CURVES}
    by_kind = {when: _by_kind(folder.evaluations[when].read() or []) for when in ("before", "after")}
    return {"arm": arm, "seed": seed, "summary": kept, "seconds": seconds, "curves": curves, "by_kind": by_kind}


def _by_kind(evaluation: Sequence[EvaluationRecord]) -> dict[str, float]:
    """The mean verdict of each kind of prompt; empty where it was not measured."""
    values: dict[str, list[float]] = {}
    for picture in evaluation:
        kind, verdict = picture["kind"], picture["held_out"].get(_VERDICT)
        if kind is not None and verdict is not None:
            values.setdefault(kind, []).append(verdict)
    return {kind: round(mean(own), 4) for kind, own in values.items()}


def _curve(metrics: Sequence[Metrics], name: str) -> list[list[float]]:
    values: list[tuple[int, MetricValue]] = [(i + 1, record.get(name)) for i, record in enumerate(metrics)]
    return [[i, round(value, 4)] for i, value in values if isinstance(value, int | float)]


def as_json(experiment: str, campaign: Campaign) -> dict[str, object]:
    """The finished runs of an experiment, ready for JSON."""
    shown = {name: value for name, value in asdict(campaign).items() if name != "folder"}
    return {"experiment": experiment, **shown, "runs": campaign.records(experiment)}
