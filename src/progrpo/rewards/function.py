"""A plain Python function as a reward, the way TRL's users write them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from progrpo.rewards.base import Score
from progrpo.types import Prompt


class FunctionReward:
    """`function(images, prompts, **columns) -> sequence of float | None`.

    `images` are PIL pictures and `prompts` texts. A column reaches the function as a list under its own name if the
    function has a parameter of that name (or takes `**kwargs`). None, NaN and infinities are missing scores.
    """

    def __init__(self, function: Callable[..., Sequence[float | None]]):
        self.function = function
        self._called = getattr(function, "__qualname__", "function")
        parameters = list(inspect.signature(function).parameters.values())
        self._first_two = {p.name for p in parameters[:2] if p.kind is p.POSITIONAL_OR_KEYWORD}
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in named} - self._first_two
        self._needed = {p.name for p in named if p.default is p.empty} - self._first_two

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        images = [Image.fromarray(p) for p in pictures_NHWC]
        values = self.function(images, [p.text for p in prompts], **self._columns(prompts))
        if len(values) != len(prompts):
            raise ValueError(
                f"reward {self._called} returned {len(values)} scores for {len(prompts)} pictures; return one each"
            )
        return [Score(None if v is None else float(v)) for v in values]

    def _columns(self, prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
        """The columns that the function takes, as lists; None where a prompt has no such column."""
        there = {name for p in prompts for name in p.columns} - self._first_two
        lacking = sorted(self._needed - there)
        if lacking:
            raise ValueError(
                f"reward {self._called} takes {lacking[0]!r}, but these prompts have no column of that name"
                f" ({', '.join(sorted(there)) or 'none at all'}); add it to the prompt file or give it a default"
            )
        wanted = there if self._takes_all else there & self._names
        return {name: [p.columns.get(name) for p in prompts] for name in sorted(wanted)}
