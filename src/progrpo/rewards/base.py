"""What a reward is: pictures and their prompts in, a score for each out. A failed score is missing, never zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from progrpo.messages import named, quoted
from progrpo.types import Prompt, Scores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Score:
    """One picture's reward. `value` is None where it is missing; `error` says that it failed, and may be had by asking again.

    `passed` is a strict verdict, where the reward has one.
    """

    value: float | None
    passed: bool | None = None
    error: str | None = None

    def number(self) -> float:
        """The value, NaN where it is missing or not finite."""
        return self.value if self.value is not None and math.isfinite(self.value) else math.nan

    def plain(self) -> Score:
        """In Python's own numbers, which caches and servers can write; raises where it has none that are like them."""
        passed = None if self.passed is None else bool(self.passed)
        return Score(None if self.value is None else float(self.value), passed, self.error)


class Refusal(ValueError):
    """A reward cannot work with these prompts or on this machine at all: a mistake to be mended, not a failed score.

    Whatever else a reward raises is a failure of the pictures that it was asked about.
    """


class WrongAnswer(Refusal):
    """What a reward returned is no score for each picture, whichever the pictures are: its author's mistake."""


@dataclass(frozen=True)
class OneRewardSettings:
    """What a built-in reward is told. Those without a network, a choice of models or a server read none of it."""

    device: str = "auto"
    """By torch's name; `auto`: a GPU where there is one."""
    dtype: str = "auto"
    """By torch's name; `auto`: float16 on a GPU, float32 elsewhere."""
    batch_size: int | None = None
    """Pictures at once; empty: all of a function, else `batch`."""
    model: str = ""
    """Another model than the reward's own: a hub id, a folder, or the name that a server knows."""
    url: str = ""
    """Of a server."""
    timeout: float | None = None
    """Seconds that a call may take; empty: `patience` of a server, else as long as it wants."""

    @property
    def batch(self) -> int:
        """Pictures at once of a network or a server."""
        return 16 if self.batch_size is None else self.batch_size

    @property
    def patience(self) -> float:
        """Seconds for one answer of a server."""
        return 60.0 if self.timeout is None else self.timeout


class Reward(Protocol):
    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        """One score a picture (uint8, (N, H, W, 3)), in order.

        A reward with an attribute `video = True` is given videos (N, F, H, W, 3) whole; another sees some of their frames.
        """
        ...


def check(reward: Reward, prompts: Sequence[Prompt]) -> None:
    """Refusal, before a picture is drawn, where a reward can tell that it will not work with these prompts or here."""
    getattr(reward, "check", lambda prompts: None)(prompts)


def require_columns(reward: str, needed: Iterable[str], prompts: Sequence[Prompt]) -> None:
    """Refusal for the first prompt that lacks a column which a reward needs of all: a call may be of that prompt alone."""
    for prompt in prompts:
        if lacking := [name for name in needed if name not in prompt.columns]:
            raise Refusal(
                f"reward {reward} takes {lacking[0]!r}, but the prompt {quoted(prompt.text)} has no column of that name"
                f" ({named(', '.join(sorted(prompt.columns))) or 'none at all'}); give it to every prompt, or the"
                " parameter a default (the texts themselves are `prompts`)"
            )


def close(reward: Reward) -> None:
    """Let go of what a reward holds: a server's connection, processes, what a user's class wants closed."""
    getattr(reward, "close", lambda: None)()


class Scorer(Protocol):
    """What a run is rewarded by: one reward or several, as one value."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The rewards' names and weights, in the order of the columns of their parts."""
        ...

    def score(
        self,
        pictures_NHWC: np.ndarray,
        prompts: Sequence[Prompt],
        group_N: Tensor,
        there_N: Tensor | None = None,
        fault: str = "",
    ) -> Scores:
        """Score N pictures (uint8) of the groups that `group_N` (int64) says, in order.

        Where `there_N` is False there is none, as `fault` says: no reward sees it, and its scores are missing.
        """
        ...


class Judge(Protocol):
    """A second opinion that reports and never trains."""

    def passes(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[bool]: ...
