"""The base class of rewards: pictures and prompts in, a score for each out. A failed score is missing, never zero."""

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
    """The score of one picture."""

    value: float | None
    """None where the score is missing."""
    passed: bool | None = None
    """The strict verdict of a reward that has one."""
    error: str | None = None
    """The failure that left the score missing. A retry may give a score."""

    def number(self) -> float:
        """The value, NaN where it is missing or not finite."""
        return self.value if self.value is not None and math.isfinite(self.value) else math.nan

    def plain(self) -> Score:
        """A score in Python's own numbers, for caches and servers. TypeError or ValueError where it has none."""
        passed = None if self.passed is None else bool(self.passed)
        return Score(None if self.value is None else float(self.value), passed, self.error)


class Refusal(ValueError):
    """A mistake that the user must mend: the reward cannot work with these prompts, or on this machine.

    Anything else that a reward raises is a failure of the pictures of that call.
    """


class WrongAnswer(Refusal):
    """A reward's answer that is no score for each picture: its author's mistake, whatever the pictures are."""


class Reward(ABC):
    """A function of pictures and their prompts. A user's plain function becomes one in `rewards.function`."""

    groupwise: bool = False
    """Whether a call must have all pictures of a group, as a ranking needs them."""
    video: bool = False
    """Whether a call has whole videos (N, F, H, W, 3). Other rewards see some of their frames."""
    waits_for_people: bool = False
    """Whether a call waits for people. It then keeps the term's time limit itself, is not repeated, and is made only
    for groups of two pictures or more."""
    needed: Sequence[str] = ()
    """The columns that every prompt must have."""
    takes_model: bool = False
    """Whether a term may name another model than the reward's own."""
    takes_sha256: bool = False
    """Whether that model is a file whose SHA-256 a term may state."""
    version: str = ""
    """A digest that tells its scores from those of other weights under the same name; caches keep them apart."""
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
        """Refuse prompts, or a machine, that the reward cannot work with. It runs before any picture is sampled."""

    def close(self) -> None:  # noqa: B027 (most rewards hold nothing)
        """Close connections, processes, and what a user's class holds."""


class RewardWrapper(Reward):
    """A reward that wraps another one and has its attributes."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.groupwise, self.video, self.needed = reward.groupwise, reward.video, reward.needed
        self.waits_for_people = reward.waits_for_people
        self.version = reward.version

    def check(self, prompts: Sequence[Prompt]) -> None:
        self._reward.check(prompts)

    def close(self) -> None:
        self._reward.close()


def require_columns(reward: str, needed: Iterable[str], prompts: Sequence[Prompt]) -> None:
    """Refuse the first prompt that lacks a needed column."""
    for prompt in prompts:
        missing = [name for name in needed if name not in prompt.columns]
        if missing:
            raise Refusal(
                f"reward {reward} takes {missing[0]!r}, but the prompt {quoted(prompt.text)} has no column of that name"
                f" ({named(', '.join(sorted(prompt.columns))) or 'none at all'}); give it to every prompt, or the"
                " parameter a default (the texts themselves are `prompts`)"
            )


class Scorer(Protocol):
    """The rewards of a run as one value."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The weights by the rewards' names, in the order of the columns of `rewards_NR`."""
        ...

    def score(
        self,
        pictures_NHWC: np.ndarray,
        prompts: Sequence[Prompt],
        group_N: Tensor,
        there_N: Tensor | None = None,
        fault: str = "",
    ) -> Scores:
        """Score N pictures (uint8), in order; `group_N` (int64) holds each picture's group.

        A picture is lost where `there_N` is False, and `fault` says why. No reward sees it, and its scores are missing.
        """
        ...


class Judge(Protocol):
    """A second opinion on pictures. It is reported and never trained on."""

    def passes(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[bool]: ...
