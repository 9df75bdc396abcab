"""What the report reads: a run folder in memory, as far as it is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from progrpo.messages import named
from progrpo.tracking.lock import is_held
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
    held: bool = False
    """Whether a process writes to the folder at this moment."""

    @property
    def recipe(self) -> str:
        return str(self.summary.get("recipe") or self.config.get("recipe") or self.path.name)

    @property
    def iterations(self) -> int | None:
        return self.summary.get("iterations") or self.config.get("iterations")

    @property
    def status(self) -> str:
        """`killed` for a run that was under way when it was last heard of, and of which no process is there any more."""
        status = str(self.summary.get("status") or "running")
        return "killed" if status == "running" and not self.held else status

    @property
    def since_summary(self) -> Records:
        """The records of iterations that the summary does not count yet."""
        if self.status not in ("running", "killed"):  # which was written when the run ended
            return []
        return [r for r in self.metrics if r["iteration"] >= (self.summary.get("iterations") or 0)]

    @property
    def wall_seconds(self) -> float | None:
        """Seconds of the whole run; of one that has not ended, until its last iteration."""
        return (self.summary.get("wall_seconds") or 0) + sum(r.get("seconds") or 0 for r in self.since_summary) or None

    @property
    def path_of_plan(self) -> list[int]:
        """The sizes of a group as it is pruned, [48, 24, 12]; empty if the plan is not known yet."""
        return [int(size) for size in self.summary["plan"]["path"]] if self.summary.get("plan") else []

    @property
    def prune_steps(self) -> list[int]:
        return [int(step) for step in self.summary["plan"]["prune_steps"]] if self.summary.get("plan") else []

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
        raise ValueError(
            f"{named(path)} holds no run (no config.json); give the folder that `progrpo train --out` named"
        )
    return Run(
        path=folder.path,
        config=_read(folder, "config.json", folder.read_config, dict),
        metrics=_read(folder, "metrics.jsonl", folder.read_metrics, list),
        summary=_read(folder, "summary.json", folder.read_summary, dict),
        before=_read(folder, "evaluation/before.json", partial(folder.read_evaluation, "before"), list),
        after=_read(folder, "evaluation/after.json", partial(folder.read_evaluation, "after"), list),
        audits=[_audit(record) for record in _read(folder, "audit", folder.read_audits, list)],
        held=is_held(folder.path),
    )


def _read(folder: RunFolder, name: str, read: Callable[[], Any], kind: Any) -> Any:
    """What a file (or the files of a folder) holds: an object, or a list of objects."""
    path = folder.path / name
    for file in (path, *path.glob("*.json")):
        if not inside(folder.path, file):
            raise ValueError(f"{named(file)} is a link out of the run folder; put the file itself there")
    with readable(named(path)):
        found = read()
        if not isinstance(found, kind) or (kind is list and not all(isinstance(record, Mapping) for record in found)):
            raise ValueError("it holds something else than a run's records")
        return found


def _audit(record: Mapping[str, Any]) -> dict[str, Any]:
    with readable("an audit's record"):
        lists = {name: [int(i) for i in record[name]] for name in ("steps", "kept_uniform", "kept_ovf")}
        stopped = [None if step is None else int(step) for step in record["stopped_at"]]
        return {**record, **lists, "iteration": int(record["iteration"]), "stopped_at": stopped}


def inside(folder: Path, file: Path) -> bool:
    """Whether a file lies in the folder, links followed: a stranger's records may name any path."""
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))


_WRONG = (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError)


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Whatever comes of records that no run wrote, as a ValueError of one sentence."""
    try:
        yield
    except _WRONG as error:
        reason = named(f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise ValueError(
            f"{what} cannot be read as progrpo writes it ({reason}); take the file that the run wrote"
        ) from error
