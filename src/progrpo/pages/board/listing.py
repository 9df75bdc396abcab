"""The list of the runs below a folder, a few figures each. Only what changed since the last list is read again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import cast

from progrpo.pages.run_data import RunData, flat, inside, readable
from progrpo.tracking.lock import is_held
from progrpo.tracking.records import Metrics, Summary

_DEPTH = 4
"""The most folders between the board's folder and a run."""
_FILES = ("config.json", "summary.json", "metrics.jsonl")
_TAIL = 1 << 16
"""The bytes at the end of metrics.jsonl in which the last record is looked for."""
_MOST_BYTES = 10_000_000
_LONGEST = 200

Row = Mapping[str, str | float | bool | None]
"""A run's line: `name` is its path from the board's folder. Texts are a stranger's."""

_Stamp = tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class _Known:
    """The data of a run as they were read when its files had these times and sizes."""

    stamp: _Stamp
    data: RunData
    error: str | None


class Listing:
    """The runs of a folder. Links are not followed, so that nothing outside of it is listed."""

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.realpath(root))
        self._known: dict[str, _Known] = {}
        self._lock = Lock()

    def rows(self) -> list[Row]:
        """The runs, running ones first, and then the latest first."""
        with self._lock:
            known = {name: self._read(name, path) for name, path in self.folders().items()}
            self._known = known
        rows = [_row(name, run) for name, run in known.items()]
        return sorted(rows, key=lambda row: (row["status"] != "running", -cast(float, row["updated"]), row["name"]))

    def folders(self) -> dict[str, Path]:
        """The folders of the runs by name."""
        return {path.relative_to(self._root).as_posix(): path for path in _run_folders(self._root, _DEPTH)}

    def _read(self, name: str, path: Path) -> _Known:
        stamp = tuple(_stamp(path / file) for file in _FILES)
        old = self._known.get(name)
        return old if old is not None and old.stamp == stamp else _read(path, stamp)


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    """The run folders in a folder and below it. What cannot be opened holds none."""
    try:
        with os.scandir(folder) as entries:
            folders = sorted((e for e in entries if e.is_dir(follow_symlinks=False)), key=lambda e: e.name)
    except OSError:
        return
    for entry in folders:
        if entry.name.startswith(".") or not entry.name.isprintable():
            continue
        if os.path.isfile(os.path.join(entry.path, "config.json")):
            yield Path(entry.path)
        elif depth > 1:
            yield from _run_folders(Path(entry.path), depth - 1)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


# --- one run ----------------------------------------------------------------------------------------------------------


def _read(path: Path, stamp: _Stamp) -> _Known:
    """The head of a run and the last record of its metrics. A damaged file becomes a sentence."""
    empty = RunData(path, {}, [], Summary(), [], [], [])
    try:
        with readable(path.name):
            config, summary = _object(path, "config.json"), cast(Summary, _object(path, "summary.json"))
            return _Known(stamp, RunData(path, config, _last_records(path), summary, [], [], []), None)
    except ValueError as error:
        return _Known(stamp, empty, str(error))


def _object(folder: Path, name: str) -> Mapping[str, object]:
    data = _bytes(folder, name, _MOST_BYTES)
    contents = json.loads(data) if data else {}
    if not isinstance(contents, Mapping):
        raise ValueError(f"{name} holds no object")
    return contents


def _last_records(folder: Path) -> list[Metrics]:
    """The last whole record of the metrics, as a list of one; empty without one."""
    for line in reversed(_bytes(folder, "metrics.jsonl", _TAIL).splitlines()):
        try:
            record = json.loads(line)
        except ValueError:  # the writer is at this line, or the tail begins inside it
            continue
        if isinstance(record, dict) and isinstance(record.get("iteration"), int):
            return [record]
    return []


def _bytes(folder: Path, name: str, most: int) -> bytes:
    """The last bytes of a file in the folder; none if it is not there."""
    path = folder / name
    if not inside(folder, path):
        raise ValueError(f"{name} is a link out of the run folder")
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return file.read(most)


def _row(name: str, known: _Known) -> Row:
    data, error = known.data, known.error
    updated = max((stamp[0] for stamp in known.stamp if stamp), default=0) / 1e9
    row: dict[str, str | float | bool | None] = {"name": name, "status": "damaged", "updated": updated, "error": error}
    if error is not None:
        return row
    try:
        with readable(name):
            return row | _figures(data)
    except ValueError as unreadable:
        return row | {"error": str(unreadable)}


def _figures(data: RunData) -> dict[str, str | float | bool | None]:
    if not data.ended:  # asked each time: a run dies without a word
        data = replace(data, held=is_held(data.path))
    summary: Mapping[str, object] = data.summary
    last: Mapping[str, object] = data.metrics[-1] if data.metrics else {}
    done = _number(summary.get("iterations")) or 0
    if not data.ended:
        done = max(done, (_number(last.get("iteration", -1)) or 0) + 1)
    terms = [str(value) for key, value in flat(data.config.get("reward")).items() if key.endswith(".name")]
    return {
        "recipe": _text(data.recipe),
        "model": _text(data.setting("model", "path")),
        "reward": _text(" + ".join(terms)),
        "seed": _text(data.config.get("seed")),
        "status": _text(data.status),
        "done": done,
        "iterations": _number(data.config.get("iterations")),
        "reward_before": _number(summary.get("reward_before")),
        "reward_after": _number(summary.get("reward_after")),
        "reward_now": _number(last.get("reward/mean")),
        "accuracy_before": _number(summary.get("accuracy_before")),
        "accuracy_after": _number(summary.get("accuracy_after")),
        "seconds": _number(last.get("seconds")),
        "wall_seconds": _number(summary.get("wall_seconds")),
    }


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _text(value: object) -> str:
    """A text that a page can show and JSON can hold."""
    return "" if value is None else str(value)[:_LONGEST].encode(errors="backslashreplace").decode()
