"""A small head on the denoiser's own hidden states that ranks unfinished trajectories without a decoder or a reward.

Probes on activations rank final quality early in a trajectory (Probe-Select, arXiv 2603.02829). This one is learnt during the
run, in closed form: a ridge regression for each step, of rewards on features, both less their group's mean, since only the
ranking within a group counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_WIDTH = 512
"""Wider features are mapped to so many by a fixed random matrix: what is kept grows with the square."""
_RIDGE = 1.0
"""Times the mean square of the features. Of .1, .3, 1 and 3 the best for 20 groups; the choice hardly matters for 100."""
_REMEMBERED = 6
"""Audits whose mean agreement decides."""


class Probe:
    """Of T steps. Everything it knows is a sum over the rows it has seen, so the order of learning does not matter."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self._square: Tensor | None = None  # (T, F, F) float64
        self._product: Tensor | None = None  # (T, F)
        self._weights: dict[int, Tensor] = {}
        self._agreement: list[list[float | None]] = []

    def learn(self, features: Sequence[Tensor], rewards_N: Tensor, group_N: Tensor) -> None:
        """From N finished trajectories: their features (N, F) at each step, and rewards, of which NaN is missing."""
        there = rewards_N.isfinite()
        if not there.any():
            return
        group = group_N[there].unique(return_inverse=True)[1]
        y = _centred(rewards_N[there, None].double(), group)[:, 0]
        x = torch.stack([_centred(_narrow(f[there]), group) for f in features])
        if self._square is None or self._product is None:
            width = x.shape[2]
            self._square = x.new_zeros(self.num_steps, width, width)
            self._product = x.new_zeros(self.num_steps, width)
        self._square += x.transpose(1, 2) @ x
        self._product += (x.transpose(1, 2) @ y[:, None])[..., 0]
        self._weights.clear()

    @property
    def knows(self) -> bool:
        """Whether it has learnt anything."""
        return self._square is not None

    def score(self, step: int, features_NF: Tensor) -> Tensor:
        """float64 (N,), comparable within a group only."""
        assert self.knows, "learn first"
        if step not in self._weights:
            self._weights[step] = self._solve(step)
        return _narrow(features_NF) @ self._weights[step]

    def _solve(self, step: int) -> Tensor:
        assert self._square is not None and self._product is not None
        square, product = self._square[step], self._product[step]
        size = square.diagonal().clamp(min=1e-12)  # each feature in units of its own spread
        scale = size.rsqrt()
        ridge = torch.eye(len(size), dtype=square.dtype) * _RIDGE
        return scale * torch.linalg.solve(scale[:, None] * square * scale + ridge, scale * product)

    def watch(self, agreement: Sequence[float | None]) -> None:
        """Note how well it ranked a group that it had not learnt from: Spearman by step, None where there is none."""
        self._agreement = [*self._agreement, list(agreement)][-_REMEMBERED:]

    def agreement(self, step: int) -> float | None:
        """Mean over the last audits; None before three of them."""
        seen = [a for audit in self._agreement if (a := audit[step]) is not None]
        return sum(seen) / len(seen) if len(seen) >= 3 else None

    def trusted(self, step: int, threshold: float) -> bool:
        """Whether its agreement, as it was lately measured, reaches the threshold."""
        found = self.agreement(step)
        return self.knows and found is not None and found >= threshold

    def state_dict(self) -> dict[str, Any]:
        learnt = {} if self._square is None else {"square": self._square, "product": self._product}
        return {"agreement": self._agreement, **learnt}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._agreement = [list(audit) for audit in state["agreement"]]
        learnt = (state.get(name) for name in ("square", "product"))
        self._square, self._product = (None if sums is None else sums.clone() for sums in learnt)
        self._weights.clear()


def _centred(values_NF: Tensor, group_N: Tensor) -> Tensor:
    groups = int(group_N.max()) + 1 if len(group_N) else 0
    total = values_NF.new_zeros(groups, values_NF.shape[1]).index_add(0, group_N, values_NF)
    return values_NF - (total / torch.bincount(group_N, minlength=groups)[:, None])[group_N]


def _narrow(features_NF: Tensor) -> Tensor:
    features, width = features_NF.double(), features_NF.shape[1]
    if width <= _WIDTH:
        return features
    fixed = torch.randn(width, _WIDTH, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    return features @ fixed / width**0.5
