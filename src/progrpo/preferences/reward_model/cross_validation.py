"""The choice by cross-validation for the heads of a reward model: the penalty of each block of features, and how many
labels are taken for flipped ones.

Dimension letters: M pairs, D features, J blocks of features, F folds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from progrpo.preferences.bradley_terry import pair_losses
from progrpo.preferences.reward_model.backbone import Features
from progrpo.preferences.reward_model.head import FOLDS, Comparisons, Start, fit_head

OFF = math.inf
"""The penalty of a block of features that is left out."""
_PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)


def fold_of_pairs(pairs: Comparisons, seed: int) -> Tensor:
    """The fold (M,) of each pair. Pairs of one prompt have one fold."""
    cluster_M = pairs.clusters()
    order_C = torch.randperm(int(cluster_M.max()) + 1, generator=torch.Generator().manual_seed(seed))
    return (order_C % FOLDS)[cluster_M]


@dataclass(frozen=True)
class Blocks:
    """The columns of features: a prior or none, which has no penalty, and then blocks of these sizes."""

    prior: bool
    size_J: tuple[int, ...]

    @classmethod
    def of(cls, features: Features) -> Blocks:
        return cls(features.prior_N is not None, tuple(block.shape[1] for block in features.blocks))

    def penalties(self, penalty_J: Sequence[float]) -> Tensor:
        """The penalty of each column (D,). Blocks without one are off."""
        of_blocks = [*penalty_J, *[OFF] * (len(self.size_J) - len(penalty_J))]
        each = torch.tensor([0.0] * self.prior + of_blocks, dtype=torch.float64)
        return each.repeat_interleave(torch.tensor([1] * self.prior + [*self.size_J]))


@dataclass(frozen=True)
class Choice:
    """The choice of cross-validation, with the heads and losses by which it was made."""

    penalty_J: tuple[float, ...]
    """The penalty of each block, infinite where it is off."""
    flip_rate: float
    weight_FD: Tensor
    """The heads that were fitted to all pairs but those of a fold."""
    loss_M: Tensor
    """The losses of the judged pairs out of their folds."""

    @property
    def loss(self) -> float:
        return float(self.loss_M.sum())


@dataclass(frozen=True)
class CrossValidation:
    """M pairs in F folds. Losses are those of judged pairs, by the heads that were not fitted to their folds."""

    difference_MD: Tensor
    pairs: Comparisons
    fold_M: Tensor
    judged_M: Tensor
    """The pairs that the features have not learned from (bool)."""
    blocks: Blocks

    def choose(self, flip_rates: Sequence[float]) -> Choice:
        """Choose the flip rate with the first block's penalty, and then each further block's penalty in turn.

        The first block is always used. A later one is off where it lowers the loss by less than two standard errors
        of the difference: with few or noisy pairs many features would fit the noise.
        """
        rest = [self.fold_M != fold for fold in range(FOLDS)]
        starts = [Start.zero(self.difference_MD[others], self.pairs.take(others)) for others in rest]
        first = [self._best((), rate, starts) for rate in flip_rates]
        chosen = min(first, key=lambda choice: choice.loss)
        for _ in self.blocks.size_J[1:]:
            warm = [replace(start, weight_D=w_D) for start, w_D in zip(starts, chosen.weight_FD, strict=True)]
            choice = self._best(chosen.penalty_J, chosen.flip_rate, warm)
            if _helps(chosen.loss_M - choice.loss_M):
                chosen = choice
            else:
                chosen = replace(chosen, penalty_J=(*chosen.penalty_J, OFF))
        return chosen

    def margins(self, weight_FD: Tensor) -> Tensor:
        """The margins of the judged pairs by the heads that were not fitted to their folds."""
        return (self.difference_MD * weight_FD[self.fold_M]).sum(1)[self.judged_M]

    def _best(self, before: tuple[float, ...], flip_rate: float, starts: Sequence[Start]) -> Choice:
        """The best penalty of the next block. Penalties fall until the loss has risen twice."""
        judged = self.pairs.take(self.judged_M)
        choices: list[Choice] = []
        best = 0
        for penalty in _PENALTIES:
            penalty_D = self.blocks.penalties((*before, penalty))
            for rate in dict.fromkeys((0.0, flip_rate)):
                weight_FD = self._fit(penalty_D, rate, starts)
                starts = [replace(start, weight_D=w_D) for start, w_D in zip(starts, weight_FD, strict=True)]
            loss_M = pair_losses(self.margins(weight_FD), judged.preference_M, flip_rate) * judged.strength_M
            choices.append(Choice((*before, penalty), flip_rate, weight_FD, loss_M))
            best = min(range(len(choices)), key=lambda i: choices[i].loss)
            if len(choices) - best > 2:
                break
        return choices[best]

    def _fit(self, penalty_D: Tensor, flip_rate: float, starts: Sequence[Start]) -> Tensor:
        """The weights (F, D) of heads that are fitted to all pairs but those of a fold."""
        weights = []
        for fold, start in enumerate(starts):
            others = self.fold_M != fold
            weights.append(fit_head(self.difference_MD[others], self.pairs.take(others), penalty_D, flip_rate, start))
        return torch.stack(weights)


def _helps(gain_M: Tensor) -> bool:
    """Whether a gain is more than two of its standard errors, over pairs."""
    return bool(gain_M.sum() > 2 * gain_M.std() * math.sqrt(len(gain_M)))
