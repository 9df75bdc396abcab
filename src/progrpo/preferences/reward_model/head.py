"""The linear heads of a reward model: an ensemble, fitted to pairs by Bradley-Terry's loss with a penalty that
cross-validation chooses.

Dimension letters: N pictures, each with its prompt, M pairs, D features, J blocks of features, K members.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from progrpo.preferences.bradley_terry import bradley_terry_loss, pair_losses, temperature
from progrpo.preferences.reward_model.backbone import Features

OFF = math.inf
"""The penalty of a block of features that is left out."""
_PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
_FOLDS = 5
_FEWEST = 2 * _FOLDS  # prompts: with fewer, folds and resamples are made of pairs
_ITERATIONS = 100
_CONSTANT = 1e-6  # the spread of a feature, by its mean where that is above 1, that is rounding alone


@dataclass(frozen=True)
class Comparisons:
    """M pairs, as rows of N pictures."""

    first_M: Tensor
    """The rows of the first pictures, int64."""
    second_M: Tensor
    preference_M: Tensor
    """Float64, 1 where the first picture is preferred."""
    strength_M: Tensor
    """Float64, above 0."""
    prompt_M: Tensor
    """The number of each pair's prompt, int64."""

    def __len__(self) -> int:
        return len(self.first_M)

    def margins(self, score_N: Tensor) -> Tensor:
        return score_N[self.first_M] - score_N[self.second_M]

    def take(self, rows: Tensor) -> Comparisons:
        tensors = (self.first_M, self.second_M, self.preference_M, self.strength_M, self.prompt_M)
        return Comparisons(*(tensor[rows] for tensor in tensors))

    def clusters(self) -> Tensor:
        """The numbers 0, 1, ... of what folds and resamples keep together: prompts, or pairs if prompts are few."""
        cluster_M = self.prompt_M.unique(return_inverse=True)[1]
        return cluster_M if int(cluster_M.max()) + 1 >= _FEWEST else torch.arange(len(self))


@dataclass(frozen=True)
class Ensemble:
    """K linear heads on features that are standardised. Mean scores of the training pictures have mean 0 and std 1."""

    weight_KD: Tensor
    mean_D: Tensor
    std_D: Tensor
    """Infinite for a feature that is constant."""
    scale: Tensor
    """The standard deviation of the mean member's scores before they were scaled, of no dimension."""
    temperature: float
    """A first picture is preferred with the probability sigmoid(margin / temperature)."""

    def scores(self, features: Features) -> Tensor:
        """Compute the members' scores (K, N), in float64."""
        z_ND = (columns(features) - self.mean_D) / self.std_D
        return (z_ND @ self.weight_KD.T).T / self.scale


def columns(features: Features) -> Tensor:
    """The features as one matrix (N, D) in float64, the prior first."""
    prior = [] if features.prior_N is None else [features.prior_N[:, None]]
    return torch.cat([*prior, *features.blocks], 1).double()


def fit_head(difference_MD: Tensor, pairs: Comparisons, penalty_D: Tensor, flip_rate: float = 0.0) -> Tensor:
    """Find the weights (D,) with the least loss + sum(penalty w^2) / 2, by LBFGS on all pairs, from 0.

    `difference_MD` is the features of the first pictures less those of the second. The loss is Bradley-Terry's. A
    weight is 0 where its penalty is infinite. Without a flip rate the problem is convex.
    """
    on_D = penalty_D.isfinite()
    out_D = torch.zeros(len(on_D), dtype=torch.float64)
    if not on_D.any():
        return out_D
    difference_MD, penalty_D = difference_MD[:, on_D], penalty_D[on_D]
    weight_D = torch.zeros_like(penalty_D, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_D], max_iter=_ITERATIONS, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bradley_terry_loss(difference_MD @ weight_D, pairs.preference_M, pairs.strength_M, flip_rate)
        loss = loss + (penalty_D * weight_D.square()).sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    out_D[on_D] = weight_D.detach()
    return out_D


def fold_of_pairs(pairs: Comparisons, seed: int) -> Tensor:
    """The fold (M,) of each pair. Pairs of one prompt have one fold."""
    cluster_M = pairs.clusters()
    order_C = torch.randperm(int(cluster_M.max()) + 1, generator=torch.Generator().manual_seed(seed))
    return (order_C % _FOLDS)[cluster_M]


def out_of_fold_margins(
    difference_MD: Tensor, pairs: Comparisons, fold_M: Tensor, penalty_D: Tensor, flip_rate: float = 0.0
) -> Tensor:
    """The margin of each pair by a head that was fitted to the other folds."""
    margin_M = torch.zeros(len(pairs), dtype=torch.float64)
    for fold in fold_M.unique():
        out = fold_M == fold
        weight_D = fit_head(difference_MD[~out], pairs.take(~out), penalty_D, flip_rate)
        margin_M[out] = difference_MD[out] @ weight_D
    return margin_M


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


def choose_penalties(difference_MD: Tensor, pairs: Comparisons, fold_M: Tensor, blocks: Blocks) -> tuple[float, ...]:
    """Choose each block's penalty in turn, with those of the blocks before it held, by the loss out of the folds.

    A block is off where it lowers that loss by less than a standard error of the difference: with few or noisy pairs
    many features would fit the noise.
    """

    def losses_of(penalty_J: Sequence[float]) -> Tensor:
        margin_M = out_of_fold_margins(difference_MD, pairs, fold_M, blocks.penalties(penalty_J))
        return pair_losses(margin_M, pairs.preference_M) * pairs.strength_M

    chosen: list[float] = []
    best_M = losses_of(chosen)
    for _ in blocks.size_J:
        losses = {penalty: losses_of([*chosen, penalty]) for penalty in _PENALTIES}
        penalty = min(losses, key=lambda p: float(losses[p].sum()))
        gain_M = best_M - losses[penalty]
        if gain_M.sum() > gain_M.std() * math.sqrt(len(gain_M)):
            best_M = losses[penalty]
            chosen.append(penalty)
        else:
            chosen.append(OFF)
    return tuple(chosen)


@dataclass(frozen=True)
class Fit:
    """An ensemble, and what cross-validation said of it."""

    ensemble: Ensemble
    penalty_J: tuple[float, ...]
    """The penalty of each block, infinite where it is off."""
    margin_M: Tensor
    """The margin of each pair by a head that did not see its prompt, in the unit of the ensemble's scores."""


def fit_ensemble(features: Features, pairs: Comparisons, members: int, seed: int) -> Fit:
    """Fit `members` heads, each to a bootstrap resample of the prompts; a single one to all of them.

    Features are standardised by the pictures of these pairs.
    """
    column_ND, blocks = columns(features), Blocks.of(features)
    row_ND = column_ND[torch.cat([pairs.first_M, pairs.second_M]).unique()]
    mean_D, std_D = row_ND.mean(0), row_ND.std(0)
    std_D = std_D.where(std_D > _CONSTANT * mean_D.abs().clamp(min=1), math.inf)
    difference_MD = (column_ND[pairs.first_M] - column_ND[pairs.second_M]) / std_D
    fold_M = fold_of_pairs(pairs, seed)
    penalty_J = choose_penalties(difference_MD, pairs, fold_M, blocks)
    penalty_D = blocks.penalties(penalty_J)
    margin_M = out_of_fold_margins(difference_MD, pairs, fold_M, penalty_D)
    weight_KD = torch.stack(
        [_fit_weighted(difference_MD, pairs, penalty_D, times_M) for times_M in _resamples(pairs, members, seed)]
    )
    scale = ((row_ND - mean_D) / std_D @ weight_KD.mean(0)).std().clamp(min=_CONSTANT)
    slack = temperature(margin_M, pairs.preference_M, pairs.strength_M) / float(scale)
    return Fit(Ensemble(weight_KD, mean_D, std_D, scale, slack), penalty_J, margin_M / scale)


def _fit_weighted(difference_MD: Tensor, pairs: Comparisons, penalty_D: Tensor, times_M: Tensor) -> Tensor:
    drawn = times_M > 0
    resample = replace(pairs.take(drawn), strength_M=(pairs.strength_M * times_M)[drawn])
    return fit_head(difference_MD[drawn], resample, penalty_D)


def _resamples(pairs: Comparisons, members: int, seed: int) -> Iterator[Tensor]:
    """How often each pair (M,) is in each member's resample."""
    if members == 1:
        yield torch.ones(len(pairs), dtype=torch.float64)
        return
    cluster_M = pairs.clusters()
    count, generator = int(cluster_M.max()) + 1, torch.Generator().manual_seed(seed)
    for _ in range(members):
        drawn_C = torch.randint(count, (count,), generator=generator)
        yield drawn_C.bincount(minlength=count)[cluster_M].double()
