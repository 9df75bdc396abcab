"""What a reward is: pictures and their prompts in, a score for each out. A failed score is missing, never zero."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from progrpo.messages import named, quoted
from progrpo.rewards.settings import RewardTerm
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


class Reward(ABC):
    """A function of pictures and their prompts. A user's plain function becomes one in `rewards.function`."""

    groupwise: bool = False
    """Whether a call must have all pictures of a group, as a ranking needs them."""
    video: bool = False
    """Whether a call has whole videos (N, F, H, W, 3). Other rewards see some of their frames."""
    needed: Sequence[str] = ()
    """The columns that every prompt must have."""
    takes_model: bool = False
    """Whether a term may name another model than the reward's own."""
    parameters: int | None = None
    """The parameters of its network; None where they are not known."""

    @classmethod
    def make(cls, term: RewardTerm) -> Reward:
        """Make the reward that a configuration names. Refusal where that is impossible on this machine."""
        return cls()

    @abstractmethod
    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        """Score each picture (uint8, (N, H, W, 3)), in order."""

    def check(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027 (most rewards take any prompt)
        """Refuse, before a picture is drawn, prompts or a machine that the reward cannot work with."""

    def close(self) -> None:  # noqa: B027 (most rewards hold nothing)
        """Let go of connections, processes, and what a user's class wants closed."""


class RewardWrapper(Reward):
    """A reward around another one, with the same facts."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.groupwise, self.video, self.needed = reward.groupwise, reward.video, reward.needed

    def check(self, prompts: Sequence[Prompt]) -> None:
        self._reward.check(prompts)

    def close(self) -> None:
        self._reward.close()


def require_columns(reward: str, needed: Iterable[str], prompts: Sequence[Prompt]) -> None:
    """Refusal for the first prompt that lacks a column which a reward needs of all: a call may be of that prompt alone."""
    for prompt in prompts:
        if lacking := [name for name in needed if name not in prompt.columns]:
            raise Refusal(
                f"reward {reward} takes {lacking[0]!r}, but the prompt {quoted(prompt.text)} has no column of that name"
                f" ({named(', '.join(sorted(prompt.columns))) or 'none at all'}); give it to every prompt, or the"
                " parameter a default (the texts themselves are `prompts`)"
            )


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
