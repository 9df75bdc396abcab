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
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in parameters} - {"images", "prompts"}

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        columns = {name for p in prompts for name in p.columns}
        wanted = columns if self._takes_all else columns & self._names
        arguments: dict[str, Any] = {name: [p.columns.get(name) for p in prompts] for name in sorted(wanted)}
        values = self.function([Image.fromarray(p) for p in pictures_NHWC], [p.text for p in prompts], **arguments)
        if len(values) != len(prompts):
            name = getattr(self.function, "__qualname__", "the reward function")
            raise ValueError(
                f"reward {name} returned {len(values)} scores for {len(prompts)} pictures; return one each"
            )
        return [Score(None if v is None else float(v)) for v in values]
