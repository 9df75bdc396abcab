"""A run folder in memory, as far as it is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard, TypeVar

from progrpo.messages import named
from progrpo.tracking.lock import is_held, last_renewal
from progrpo.tracking.records import AuditRecord, EvaluationRecord, Metrics, Summary, iteration_of, metric
from progrpo.tracking.run_folder import RunFolder
from progrpo.tracking.statistics import Mean, paired_difference, share

T = TypeVar("T")


@dataclass(frozen=True)
class RunData:
    """A run's records. They may be a stranger's, so a field may hold another type than its annotation says."""

    path: Path
    config: Mapping[str, object]
    metrics: Sequence[Metrics]
    summary: Summary
    before: Sequence[EvaluationRecord]
    after: Sequence[EvaluationRecord]
    audits: Sequence[AuditRecord]
    held: bool = False
    """Whether a process writes to the folder now."""
    seconds_since_summary: float = 0.0
    """Seconds from the summary's writing to the last sign of life of a run that has not ended."""

    @property
    def recipe(self) -> str:
        return str(self.summary.get("recipe") or self.config.get("recipe") or self.path.name)

    def setting(self, part: str, name: str) -> object:
        """A setting of the configuration, such as ("model", "path"). None if config.json lacks it."""
        settings = self.config.get(part, {})
        if not isinstance(settings, Mapping):
            raise TypeError(f"config.json: {part} is no object")
        return settings.get(name)

    @property
    def pairs(self) -> str:
        """The pairs file that the run learns from; empty where pictures are sampled."""
        return str(self.setting("prompts", "pairs") or "")

    @property
    def iterations(self) -> object:
        """The iterations that are done, or the planned ones before there is a summary."""
        return self.summary.get("iterations") or self.config.get("iterations")

    @property
    def status(self) -> str:
        """The summary's status, or `killed` for a run that was running but has no process any more."""
        status = str(self.summary.get("status") or "running")
        return "killed" if status == "running" and not self.held else status

    @property
    def ended(self) -> bool:
        """Whether the run wrote the summary at its end."""
        return self.status not in ("running", "killed")

    @property
    def since_summary(self) -> Sequence[Metrics]:
        """The records of iterations that the summary does not count yet."""
        if self.ended:
            return []
        done = self.summary.get("iterations") or 0
        return [record for record in self.metrics if iteration_of(record) >= done]

    @property
    def wall_seconds(self) -> float | None:
        """The seconds of the whole run, or until the last sign of life of one that is running or was killed.

        The summary is written after every iteration, and the lock is renewed every few seconds. In a copied folder,
        whose files have other times, the iterations since the summary count.
        """
        since = 0.0 if self.ended else max(self.seconds_since_summary, total(self.since_summary, "seconds"))
        return (self.summary.get("wall_seconds") or 0) + since or None

    @property
    def path_of_plan(self) -> list[int]:
        """The sizes of a group as it is pruned, such as [48, 24, 12]. Empty if the plan is not known yet."""
        return [int(size) for size in self.summary["plan"]["path"]] if self.summary.get("plan") else []

    @property
    def groups_of_plan(self) -> list[int]:
        """The prompts of an iteration and, where whole groups stop, of those that go on. Empty if not known."""
        return [int(count) for count in self.summary["plan"].get("groups", [])] if self.summary.get("plan") else []

    @property
    def prune_steps(self) -> list[int]:
        return [int(step) for step in self.summary["plan"]["prune_steps"]] if self.summary.get("plan") else []

    @property
    def is_judged(self) -> bool:
        """Whether a plan's expected progress was estimated."""
        return any(metric(record, "plan/value") is not None for record in self.metrics)

    @property
    def paired(self) -> bool:
        """Whether before and after have the same prompts in the same order; they start from the same noise."""
        return bool(self.before) and [r["prompt"] for r in self.before] == [r["prompt"] for r in self.after]

    def accuracy_change(self) -> Mean | None:
        """The mean change of the strict verdict over pairs of pictures. None without a pair that has both verdicts."""
        pairs = zip(self.before, self.after, strict=True) if self.paired else ()
        verdicts = [(before["strict"], after["strict"]) for before, after in pairs]
        judged = [pair for pair in verdicts if None not in pair]
        return paired_difference(*zip(*judged, strict=True)) if judged else None


def flat(settings: object, prefix: str = "") -> dict[str, object]:
    """Nested settings under dotted names, such as `optim.lr` and `reward.terms.0.name`."""
    if isinstance(settings, Mapping):
        parts: Iterable[tuple[object, object]] = settings.items()
    elif _is_list_of_objects(settings) and settings:
        parts = enumerate(settings)
    else:
        return {prefix.removesuffix("."): settings}
    return {name: value for key, part in parts for name, value in flat(part, f"{prefix}{key}.").items()}


def accuracy(records: Iterable[EvaluationRecord]) -> Mean | None:
    return share(record["strict"] for record in records)


def total(records: Iterable[Metrics], name: str) -> float:
    """The sum of a metric over records, in which a missing value counts as 0."""
    return sum(metric(record, name) or 0 for record in records)


def read_run_data(path: Path) -> RunData:
    folder = RunFolder(path)
    if not (folder.path / "config.json").exists():
        raise ValueError(
            f"{named(path)} holds no run (no config.json); give the folder that `progrpo train --out` named"
        )
    return RunData(
        path=folder.path,
        config=_read(folder, "config.json", folder.config.read),
        metrics=_read(folder, "metrics.jsonl", folder.metrics.read),
        summary=_read(folder, "summary.json", folder.summary.read),
        before=_read(folder, "evaluation/before.json", folder.evaluations["before"].read),
        after=_read(folder, "evaluation/after.json", folder.evaluations["after"].read),
        audits=[_checked_audit(record) for record in _read(folder, "audit", folder.read_audits)],
        held=is_held(folder.path),
        seconds_since_summary=_seconds_since_summary(folder),
    )


def _seconds_since_summary(folder: RunFolder) -> float:
    alive, written = last_renewal(folder.path), folder.summary.written
    return 0.0 if alive is None or written is None else max(0.0, alive - written)


_LISTS = ("metrics.jsonl", "evaluation/before.json", "evaluation/after.json", "audit")


def _read(folder: RunFolder, name: str, read: Callable[[], T]) -> T:
    """The contents of a file, or of the files of a folder: an object, or a list of objects."""
    path = folder.path / name
    for file in (path, *path.glob("*.json")):
        if not inside(folder.path, file):
            raise ValueError(f"{named(file)} is a link out of the run folder; put the file itself there")
    with readable(named(path)):
        contents = read()
        if not (_is_list_of_objects(contents) if name in _LISTS else isinstance(contents, Mapping)):
            raise ValueError("it holds something else than a run's records")
        return contents


def _is_list_of_objects(contents: object) -> TypeGuard[list[Mapping[str, object]]]:
    return isinstance(contents, list) and all(isinstance(record, Mapping) for record in contents)


def _checked_audit(record: AuditRecord) -> AuditRecord:
    """The record with whole numbers where it names steps and members."""
    with readable("an audit's record"):
        return {
            **record,
            "iteration": int(record["iteration"]),
            "steps": [int(step) for step in record["steps"]],
            "kept_uniform": [int(member) for member in record["kept_uniform"]],
            "kept_ovf": [int(member) for member in record["kept_ovf"]],
            "stopped_at": [None if step is None else int(step) for step in record["stopped_at"]],
        }


def inside(folder: Path, file: Path) -> bool:
    """Whether a file lies in the folder, with links resolved: a stranger's records may name any path."""
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))


_ERRORS_OF_BAD_RECORDS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


@contextmanager
def readable(subject: str) -> Iterator[None]:
    """Turn any error that records of a stranger cause into a ValueError of one sentence."""
    try:
        yield
    except _ERRORS_OF_BAD_RECORDS as error:
        reason = named(f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise ValueError(
            f"{subject} cannot be read as progrpo writes it ({reason}); take the file that the run wrote"
        ) from error
