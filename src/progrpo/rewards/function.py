"""A plain Python function or class as a reward, the way TRL's users write them."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from progrpo.rewards.base import Refusal, Score, require_columns
from progrpo.sources import COLUMN, pictures
from progrpo.types import Prompt


class FunctionReward:
    """`function(images, prompts, **columns) -> sequence of float | None`, plain or async, or an object with it as `score`.

    `images` are PIL pictures and `prompts` texts. A column reaches the function as a list under its own name if the
    function has a parameter of that name (or takes `**kwargs`); that of source pictures, `image`, holds PIL pictures in RGB.
    None, NaN and infinities are missing scores; a `Score` may be returned for a number, to say more. An object's `load()` is
    called once before its first score, its `close()` when the run ends. `needed` names the columns that every prompt must have, which `check` sees to. With an attribute `groupwise = True` the pictures of one call are a group's, as a ranking needs them.
    With `video = True` an image is a whole video, a uint8 array (F, H, W, 3), and a picture one of a single frame.
    """

    def __init__(self, function: Any, batch_size: int | None = None) -> None:
        """`batch_size`: pictures of a call at most; None: all that there are."""
        self.function: Callable[..., Any] = getattr(function, "score", function)
        if not callable(self.function):
            raise Refusal(f"reward {function!r} is neither a function nor an object with a method score")
        self.groupwise = bool(getattr(function, "groupwise", False))
        self.video = bool(getattr(function, "video", False))
        self._whole, self._batch_size = function, batch_size
        self._loaded, self._one = False, threading.Lock()
        self._called = getattr(self.function, "__qualname__", "function")
        parameters = list(inspect.signature(self.function).parameters.values())
        self._first_two = {p.name for p in parameters[:2] if p.kind is p.POSITIONAL_OR_KEYWORD}
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in named} - self._first_two
        self.needed = sorted({p.name for p in named if p.default is p.empty} - self._first_two)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        self._load()
        columns = self._columns(prompts)
        size = len(prompts) if self._batch_size is None or self.groupwise else self._batch_size
        parts = [slice(i, i + size) for i in range(0, len(prompts), size)] if prompts else []
        return [score for part in parts for score in self._call(pictures_NHWC[part], prompts[part], columns, part)]

    def check(self, prompts: Sequence[Prompt]) -> None:
        require_columns(self._called, self.needed, prompts)
        self._load()

    def close(self) -> None:
        if hasattr(self._whole, "close"):
            self._whole.close()

    def _load(self) -> None:
        with self._one:
            if not self._loaded and hasattr(self._whole, "load"):
                self._whole.load()
            self._loaded = True

    def _call(
        self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt], columns: dict[str, list[Any]], part: slice
    ) -> list[Score]:
        if self.video:
            images: list[Any] = list(pictures_NHWC if pictures_NHWC.ndim == 5 else pictures_NHWC[:, None])
        else:
            images = [Image.fromarray(p) for p in pictures_NHWC]
        told = {name: pictures(values[part]) if name == COLUMN else values[part] for name, values in columns.items()}
        values = self.function(images, [p.text for p in prompts], **told)
        if inspect.iscoroutine(values):
            values = _finished(values)
        if not hasattr(values, "__len__") or len(values) != len(prompts):
            count = f"{len(values)} scores" if hasattr(values, "__len__") else f"{type(values).__name__!r}, no scores"
            raise Refusal(f"reward {self._called} returned {count} for {len(prompts)} pictures; return one each")
        return [v if isinstance(v, Score) else Score(None if v is None else float(v)) for v in values]

    def _columns(self, prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
        """The columns that the function takes, as lists; None where a prompt has no such column."""
        there = {name for p in prompts for name in p.columns} - self._first_two
        wanted = (there if self._takes_all else there & self._names).union(self.needed)
        return {name: [p.columns.get(name) for p in prompts] for name in sorted(wanted)}


def _finished(answer: Coroutine[Any, Any, Any]) -> Any:
    """What an async function returns in the end; in a notebook, whose own loop runs in this thread, by another thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(answer)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, answer).result()
