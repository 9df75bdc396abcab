"""What a reward is: pictures and their prompts in, a score for each out. A failed score is missing, never zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from progrpo.types import Prompt


@dataclass(frozen=True)
class Score:
    """One picture's reward. `value` is None where it is missing; `passed` is a strict verdict, where the reward has one."""

    value: float | None
    passed: bool | None = None

    def number(self) -> float:
        """The value, NaN where it is missing or not finite."""
        return self.value if self.value is not None and math.isfinite(self.value) else math.nan


class Reward(Protocol):
    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        """One score a picture (uint8, (N, H, W, 3)), in order."""
        ...


class Judge(Protocol):
    """A second opinion that reports and never trains."""

    def passes(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[bool]: ...
