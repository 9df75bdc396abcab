"""The gradient noise scale of a run (arXiv 1812.06162), from the gradients of two halves of each update's prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import Parameter

_DECAY = 0.95  # per update: an average over about twenty of them
_MEMBERS_DECAY = 0.7  # per update in which members are halved, an eighth of all
_EVERY = 8
_SETTLED = 20  # updates, before which a lucky one could make a plan of small groups look best
_Gradients = Sequence[Tensor | None]


class NoiseScaleState(TypedDict, total=False):
    """The running averages and the number of updates; a checkpoint of an older progrpo lacks some or all."""

    signal: float
    noise: float
    weight: float
    members: float | None
    updates: int


@dataclass(frozen=True)
class GradientMoments:
    """Unbiased estimates: the squared length of the true gradient, and the trace of one prompt's covariance around it.

    A single `signal` may be negative.
    """

    signal: float
    noise: float


def gradient_moments(first: _Gradients, second: _Gradients, prompts: tuple[float, float]) -> GradientMoments:
    """Estimate the moments from what two halves of these numbers of prompts, both above 0, add to a mean over all.

    With the halves' own means g_A and g_B the signal is <g_A, g_B>, and the noise is |g_A - g_B|^2 / (1/n_A + 1/n_B)
    (arXiv 1812.06162). A gradient that is missing counts as zero.
    """
    factors = [sum(prompts) / count for count in prompts]
    products, squares = [], []
    for parts in zip(first, second, strict=True):
        a, b = (None if part is None else part.flatten() * factor for part, factor in zip(parts, factors, strict=True))
        if a is not None and b is not None:
            products.append(torch.dot(a, b))
        difference = a if b is None else b if a is None else a - b
        if difference is not None:
            squares.append(torch.dot(difference, difference))
    return GradientMoments(_sum(products), _sum(squares) / sum(1 / count for count in prompts))


def _sum(numbers: list[Tensor]) -> float:
    return float(torch.stack(numbers).cpu().double().sum()) if numbers else 0.0


class NoiseScale:
    """Running averages of both moments over updates. Each alone is unbiased, and their ratio is far less noisy."""

    def __init__(self) -> None:
        self._signal = 0.0
        self._noise = 0.0
        self._weight = 0.0  # of what was added in both averages, which begin at 0
        self._members: float | None = None
        self._updates = 0

    @property
    def halves_members(self) -> bool:
        """Whether the next update's halves are of the members of each prompt: the second and then every eighth update.

        An objective may have to pass once more over groups that are dealt over passes, so that it should be seldom.
        """
        return self._updates % _EVERY == 1

    def add(self, moments: GradientMoments) -> None:
        """Note the moments of an update whose halves were of prompts."""
        self._signal += (1 - _DECAY) * (moments.signal - self._signal)
        self._noise += (1 - _DECAY) * (moments.noise - self._noise)
        self._weight += (1 - _DECAY) * (1 - self._weight)
        self._updates += 1

    def add_members(self, noise: float) -> None:
        """Note the noise of an update whose halves were of the members of each prompt."""
        before = noise if self._members is None else self._members
        self._members = before + (1 - _MEMBERS_DECAY) * (noise - before)
        self._updates += 1

    @property
    def own_direction(self) -> float | None:
        """The noise of prompts' own directions over that of their few members; None before enough updates.

        Prompts ask for different changes, and more members of a prompt do not average that out.
        """
        return self._own_noise / self._members if self._members and self._updates >= _SETTLED else None

    @property
    def _own_noise(self) -> float:
        """The noise that is not of members; 0 before that of members was measured."""
        if self._members is None or not self._weight:
            return 0.0
        return max(0.0, self._noise / self._weight - self._members)

    @property
    def prompts(self) -> float | None:
        """The number of prompts whose mean gradient is as long as its noise; None while the signal is not positive.

        Both averages begin at 0, and this bias is the same factor in both.
        """
        return self._noise / self._signal if self._signal > 0 else None

    @property
    def settled(self) -> float | None:
        """`prompts` once the averages are over enough updates to decide by; None before."""
        return self.prompts if self._updates >= _SETTLED else None

    def change_signal(self, factor: float) -> None:
        """Go on under a plan where a prompt's members have `factor` (above 0) times the signal.

        Their noise is divided by it, and that of own directions stays. Where members were measured to have more noise
        than there is, or not at all, all noise is taken to be theirs.
        """
        own = self._own_noise * self._weight if self._members is not None else 0.0
        self._noise = own + (self._noise - own) / factor
        if self._members is not None:
            self._members /= factor

    def state_dict(self) -> NoiseScaleState:
        return {
            "signal": self._signal,
            "noise": self._noise,
            "weight": self._weight,
            "members": self._members,
            "updates": self._updates,
        }

    def load_state_dict(self, state: NoiseScaleState) -> None:
        self._signal = state.get("signal", 0.0)
        self._noise = state.get("noise", 0.0)
        self._weight = state.get("weight", 1.0 if state else 0.0)
        self._members = state.get("members")
        self._updates = state.get("updates", 0)


def take_gradients(parameters: Iterable[Parameter]) -> list[Tensor | None]:
    """Take the gradients off the parameters, which have none then."""
    taken = []
    for parameter in parameters:
        taken.append(parameter.grad)
        parameter.grad = None
    return taken


def add_gradients(parameters: Iterable[Parameter], gradients: _Gradients) -> None:
    """Add gradients to those that the parameters have, in place."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            parameter.grad.add_(gradient)
