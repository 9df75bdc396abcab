"""Scores that were paid for once, on disk."""

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
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from progrpo.messages import quoted
from progrpo.prompts.pictures import COLUMN, key, pictures
from progrpo.rewards.base import Refusal, Reward, RewardWrapper, Score
from progrpo.types import Prompt


class CachedReward(RewardWrapper):
    """Asks `reward` only about pictures and prompts that it has not scored before; failures are asked about again.

    A score is found by the sha256 of the reward's `identity` (its name and model), the picture's pixels and size, the prompt and its columns
    (of pictures in them their pixels, not a path). The file is `folder`/NAME.sqlite, and several processes may use it at once. Refusal
    where that cannot be used, or a column has a value that cannot be told from others.
    """

    def __init__(self, reward: Reward, identity: str, folder: Path) -> None:
        super().__init__(reward)
        self._identity, self._folder = identity, folder
        self._file = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', identity).strip('-')}.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, value REAL, passed INTEGER)")
        except OSError as error:
            raise self._unusable(error) from error

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        sources = [
            None if source is None else key(source) for source in pictures([p.columns.get(COLUMN) for p in prompts])
        ]
        keys = [self._key(*row) for row in zip(pictures_NHWC, prompts, sources, strict=True)]
        known = self._known(keys)
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in known}  # of equal ones one is asked
        rows = sorted(first.values())
        if rows:
            asked = self._reward.score(pictures_NHWC[rows], [prompts[i] for i in rows])
            new = {keys[i]: score for i, score in zip(rows, asked, strict=True)}
            self._keep(new)
            known |= new
        return [known[key] for key in keys]

    def _key(self, picture_HWC: np.ndarray, prompt: Prompt, source: str | None) -> str:
        columns = dict(prompt.columns) if source is None else {**prompt.columns, COLUMN: source}
        told = self._written([self._identity, picture_HWC.shape, prompt.text, columns], prompt)
        return hashlib.sha256(told.encode() + b"\0" + np.ascontiguousarray(picture_HWC).tobytes()).hexdigest()

    def _written(self, told: Any, prompt: Prompt) -> str:
        try:
            return json.dumps(told, sort_keys=True, default=_exactly)
        except (TypeError, ValueError, RecursionError) as error:
            raise Refusal(
                f"reward {self._identity!r}: the columns of the prompt {quoted(prompt.text)} cannot be told from others"
                f" ({error}), so its scores cannot be kept; leave out its cache"
            ) from error

    def _known(self, keys: Sequence[str]) -> dict[str, Score]:
        with self._open() as database:
            rows = [
                database.execute("SELECT key, value, passed FROM scores WHERE key = ?", (k,)).fetchone() for k in keys
            ]
        return {
            key: Score(value, None if passed is None else bool(passed)) for key, value, passed in filter(None, rows)
        }

    def _keep(self, scores: dict[str, Score]) -> None:
        whole = [(key, s.value, s.passed) for key, s in scores.items() if np.isfinite(s.number())]
        with self._open() as database:
            database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", whole)

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self._written(dict(prompt.columns), prompt)
        super().check(prompts)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # one for each use: connections belong to the thread that made them, and waves ask from several
        try:
            with closing(sqlite3.connect(self._file, timeout=60)) as database, database:
                yield database
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> Refusal:
        return Refusal(
            f"reward {self._identity!r}: its cache {self._folder} cannot be used ({error}); name another folder"
        )


def _exactly(value: Any) -> Any:
    """What JSON does not know, so that values that differ stay so: a text of an array leaves most of it out, an object's is its place in memory."""
    if isinstance(value, Image.Image):
        return key(value)
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, bytes | date | time | timedelta | Decimal | PurePath):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no text of its own")
