"""Scores on disk, so that a judge is paid for each once."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path, PurePath

import numpy as np
from PIL import Image
from torch import Tensor

from progrpo.messages import quoted
from progrpo.prompts.pictures import IMAGE_COLUMN, open_pictures, picture_key
from progrpo.rewards.base import Refusal, Reward, RewardWrapper, Score
from progrpo.types import Prompt


def stamp_of(model: Path) -> str:
    """A digest of the names, sizes and times of change of a model's files, which are not read; empty without files."""
    files = sorted(path for path in (model.rglob("*") if model.is_dir() else [model]) if path.is_file())
    stats = [(path.relative_to(model).as_posix(), path.stat()) for path in files]
    facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12] if facts else ""


class CachedReward(RewardWrapper):
    """A reward that scores only pictures and prompts without a stored score. Failures are not stored.

    The key of a score is the sha256 of the reward's `identity` (its name, model and version), the picture's pixels and
    size, the prompt, and its columns (of pictures in them the pixels, not a path). The file is `folder`/NAME.sqlite;
    several processes may use it at once. Refusal where the file cannot be used, or where a column's value has no text
    of its own.
    """

    def __init__(self, reward: Reward, identity: str, folder: Path) -> None:
        super().__init__(reward)
        self._identity = identity
        self._folder = folder
        self._file = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', identity).strip('-')}.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, value REAL, passed INTEGER)")
        except OSError as error:
            raise self._unusable(error) from error

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        sources = [
            None if source is None else picture_key(source)
            for source in open_pictures([p.columns.get(IMAGE_COLUMN) for p in prompts])
        ]
        keys = [self._key(*row) for row in zip(pictures_NHWC, prompts, sources, strict=True)]
        stored = self._read(keys)
        first = {
            key: i for i, key in reversed(list(enumerate(keys))) if key not in stored
        }  # equal rows are scored once
        rows = sorted(first.values())
        if rows:
            scores = self._reward.score(pictures_NHWC[rows], [prompts[i] for i in rows])
            new = {keys[i]: score for i, score in zip(rows, scores, strict=True)}
            self._write(new)
            stored |= new
        return [stored[key] for key in keys]

    def _key(self, picture_HWC: np.ndarray, prompt: Prompt, source: str | None) -> str:
        columns = dict(prompt.columns) if source is None else {**prompt.columns, IMAGE_COLUMN: source}
        text = self._as_json([self._identity, picture_HWC.shape, prompt.text, columns], prompt)
        return hashlib.sha256(text.encode() + b"\0" + np.ascontiguousarray(picture_HWC).tobytes()).hexdigest()

    def _as_json(self, value: object, prompt: Prompt) -> str:
        try:
            return json.dumps(value, sort_keys=True, default=_exact)
        except (TypeError, ValueError, RecursionError) as error:
            raise Refusal(
                f"reward {self._identity!r}: the columns of the prompt {quoted(prompt.text)} cannot be told from others"
                f" ({error}), so its scores cannot be kept; leave out its cache"
            ) from error

    def _read(self, keys: Sequence[str]) -> dict[str, Score]:
        with self._open() as database:
            rows = [
                database.execute("SELECT key, value, passed FROM scores WHERE key = ?", (k,)).fetchone() for k in keys
            ]
        return {
            key: Score(value, None if passed is None else bool(passed)) for key, value, passed in filter(None, rows)
        }

    def _write(self, scores: dict[str, Score]) -> None:
        rows = [(key, s.value, s.passed) for key, s in scores.items() if np.isfinite(s.number())]
        with self._open() as database:
            database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self._as_json(dict(prompt.columns), prompt)
        super().check(prompts)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # one for each use: a connection belongs to the thread that made it, and waves score in several
        try:
            with closing(sqlite3.connect(self._file, timeout=60)) as database, database:
                yield database
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> Refusal:
        return Refusal(
            f"reward {self._identity!r}: its cache {self._folder} cannot be used ({error}); name another folder"
        )


def _exact(value: object) -> object:
    """A value that JSON does not know, such that different values stay different.

    `str` would not do: of an array it leaves most numbers out, and of an object it gives the place in memory.
    """
    if isinstance(value, Image.Image):
        return picture_key(value)
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, bytes | date | time | timedelta | Decimal | PurePath):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no text of its own")
