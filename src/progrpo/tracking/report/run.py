"""What the report reads: a run folder in memory, as far as it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progrpo.tracking.run_folder import RunFolder
from progrpo.tracking.statistics import Mean, paired_difference, share

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    path: Path
    config: Mapping[str, Any]
    metrics: Records
    summary: Mapping[str, Any]
    before: Records
    after: Records
    audits: Records

    @property
    def recipe(self) -> str:
        return self.summary.get("recipe") or self.config.get("recipe") or self.path.name

    @property
    def iterations(self) -> int | None:
        return self.summary.get("iterations") or self.config.get("iterations")

    @property
    def status(self) -> str:
        return self.summary.get("status") or "running"

    @property
    def path_of_plan(self) -> list[int]:
        """The sizes of a group as it is pruned, [48, 24, 12]; empty if the plan is not known yet."""
        return self.summary["plan"]["path"] if self.summary.get("plan") else []

    @property
    def prune_steps(self) -> list[int]:
        return self.summary["plan"]["prune_steps"] if self.summary.get("plan") else []

    @property
    def paired(self) -> bool:
        """Before and after hold the same prompts in the same order: the trainer starts both from the same noise."""
        return bool(self.before) and [r["prompt"] for r in self.before] == [r["prompt"] for r in self.after]

    def accuracy_change(self) -> Mean | None:
        """The mean change of the strict verdict, picture by picture; None without a pair that has both verdicts."""
        pairs = zip(self.before, self.after, strict=True) if self.paired else ()
        verdicts = [(before["strict"], after["strict"]) for before, after in pairs]
        judged = [pair for pair in verdicts if None not in pair]
        return paired_difference(*zip(*judged, strict=True)) if judged else None


def accuracy(records: Records) -> Mean | None:
    return share(record["strict"] for record in records)


def read_run(path: Path) -> Run:
    folder = RunFolder(path)
    if not (folder.path / "config.json").exists():
        raise ValueError(f"{path} holds no run (no config.json); give the folder that `progrpo train --out` named")
    return Run(
        folder.path,
        folder.read_config(),
        folder.read_metrics(),
        folder.read_summary(),
        folder.read_evaluation("before"),
        folder.read_evaluation("after"),
        folder.read_audits(),
    )
