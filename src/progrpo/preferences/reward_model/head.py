"""The linear heads of a reward model: an ensemble, fitted to pairs by Bradley-Terry's loss with a penalty that
cross-validation chooses.

Dimension letters: N pictures, each with its prompt, M pairs, D features, J blocks of features, K members.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from progrpo.preferences.bradley_terry import loss_slopes, pair_losses, temperature
from progrpo.preferences.reward_model.backbone import Features

OFF = math.inf
"""The penalty of a block of features that is left out."""
_PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
FLIP_RATES = (0.0, 0.1, 0.2, 0.3)
_FOLDS = 5
_FEWEST = 2 * _FOLDS  # prompts: with fewer, folds and resamples are made of pairs
_ITERATIONS = 500
_RIDGE = 1e-9  # what a direction without penalty and without curvature is given, for the search alone
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
    flip_rate: float = 0.0
    """The share of the training labels that seem to be swapped."""

    def scores(self, features: Features) -> Tensor:
        """Compute the members' scores (K, N), in float64."""
        z_ND = (columns(features) - self.mean_D) / self.std_D
        return (z_ND @ self.weight_KD.T).T / self.scale


def columns(features: Features) -> Tensor:
    """The features as one matrix (N, D) in float64, the prior first."""
    prior = [] if features.prior_N is None else [features.prior_N[:, None]]
    return torch.cat([*prior, *features.blocks], 1).double()


@dataclass(frozen=True)
class Start:
    """Where a fit starts, and what makes it fast. It changes nothing else."""

    weight_D: Tensor
    curvature_DD: Tensor
    """The loss' second derivative where all margins are 0."""

    @classmethod
    def zero(cls, difference_MD: Tensor, pairs: Comparisons) -> Start:
        share_M = pairs.strength_M / pairs.strength_M.sum()
        curvature_DD = (difference_MD * share_M[:, None]).T @ difference_MD / 4
        return cls(torch.zeros(difference_MD.shape[1], dtype=torch.float64), curvature_DD)


def fit_head(
    difference_MD: Tensor, pairs: Comparisons, penalty_D: Tensor, flip_rate: float = 0.0, start: Start | None = None
) -> Tensor:
    """Find the weights (D,) with the least loss + sum(penalty w^2) / 2, by L-BFGS on all pairs.

    `difference_MD` is the features of the first pictures less those of the second. The loss is Bradley-Terry's. A
    weight is 0 where its penalty is infinite. The problem is convex without a flip rate. With one, a start from those
    weights finds a minimum near them. The search is along axes for which the curvature is that of a unit ball.
    """
    start = Start.zero(difference_MD, pairs) if start is None else start
    on_D = penalty_D.isfinite()
    weight_D = start.weight_D.where(on_D, 0.0)
    if not on_D.any():
        return weight_D
    x_MD, penalty_D = difference_MD[:, on_D], penalty_D[on_D]
    share_M = pairs.strength_M / pairs.strength_M.sum()
    curvature_DD = start.curvature_DD[on_D][:, on_D] + torch.diag(penalty_D + _RIDGE)
    root_DD = torch.linalg.cholesky(curvature_DD, upper=True)

    def loss_and_slope(values: np.ndarray) -> tuple[float, np.ndarray]:
        w_D = torch.linalg.solve_triangular(root_DD, torch.from_numpy(values)[:, None], upper=True)[:, 0]
        margin_M = x_MD @ w_D
        loss = pair_losses(margin_M, pairs.preference_M, flip_rate) @ share_M + (penalty_D * w_D.square()).sum() / 2
        slope_D = (share_M * loss_slopes(margin_M, pairs.preference_M, flip_rate)) @ x_MD + penalty_D * w_D
        along_D = torch.linalg.solve_triangular(root_DD.T, slope_D[:, None], upper=False)[:, 0]
        return float(loss), along_D.numpy()

    options = {"maxiter": _ITERATIONS, "ftol": 1e-10, "gtol": 1e-6}
    from_D = (root_DD @ weight_D[on_D]).numpy()
    best = minimize(loss_and_slope, from_D, jac=True, method="L-BFGS-B", options=options).x
    weight_D[on_D] = torch.linalg.solve_triangular(root_DD, torch.as_tensor(best)[:, None], upper=True)[:, 0]
    return weight_D


def fold_of_pairs(pairs: Comparisons, seed: int) -> Tensor:
    """The fold (M,) of each pair. Pairs of one prompt have one fold."""
    cluster_M = pairs.clusters()
    order_C = torch.randperm(int(cluster_M.max()) + 1, generator=torch.Generator().manual_seed(seed))
    return (order_C % _FOLDS)[cluster_M]


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
    """What cross-validation chose."""

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
        rest = [self.fold_M != fold for fold in range(_FOLDS)]
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


@dataclass(frozen=True)
class Fit:
    """An ensemble, and what cross-validation said of it."""

    ensemble: Ensemble
    choice: Choice
    judged: Comparisons
    margin_M: Tensor
    """The margin of each judged pair by a head that did not see its prompt, in the unit of the ensemble's scores."""


@dataclass(frozen=True)
class FitSettings:
    members: int = 8
    flip_rate: float | None = None
    """The share of labels that are swapped; None: as cross-validation says."""
    seed: int = 0


def fit_ensemble(features: Features, pairs: Comparisons, settings: FitSettings, judged_M: Tensor | None = None) -> Fit:
    """Fit each head to a bootstrap resample of the prompts; a single one to all of them.

    Features are standardised by the pictures of these pairs. Penalties, flip rate and temperature are chosen by the
    pairs in `judged_M` (bool), those that the features have not learned from; None: by all.
    """
    column_ND = columns(features)
    row_ND = column_ND[torch.cat([pairs.first_M, pairs.second_M]).unique()]
    mean_D, std_D = row_ND.mean(0), row_ND.std(0)
    std_D = std_D.where(std_D > _CONSTANT * mean_D.abs().clamp(min=1), math.inf)
    difference_MD = (column_ND[pairs.first_M] - column_ND[pairs.second_M]) / std_D
    judged_M = torch.ones(len(pairs), dtype=torch.bool) if judged_M is None else judged_M
    folds = CrossValidation(difference_MD, pairs, fold_of_pairs(pairs, settings.seed), judged_M, Blocks.of(features))
    choice = folds.choose(FLIP_RATES if settings.flip_rate is None else (settings.flip_rate,))
    weight_KD = torch.stack(
        [
            _fit_resample(difference_MD, pairs, times_M, folds.blocks, choice)
            for times_M in _resamples(pairs, settings.members, settings.seed)
        ]
    )
    scale = ((row_ND - mean_D) / std_D @ weight_KD.mean(0)).std().clamp(min=_CONSTANT)
    margin_M, judged = folds.margins(choice.weight_FD) / scale, pairs.take(judged_M)
    warmth = temperature(margin_M, judged.preference_M, judged.strength_M, choice.flip_rate)
    return Fit(Ensemble(weight_KD, mean_D, std_D, scale, warmth, choice.flip_rate), choice, judged, margin_M)


def _fit_resample(difference_MD: Tensor, pairs: Comparisons, times_M: Tensor, blocks: Blocks, choice: Choice) -> Tensor:
    drawn, penalty_D = times_M > 0, blocks.penalties(choice.penalty_J)
    resample = replace(pairs.take(drawn), strength_M=(pairs.strength_M * times_M)[drawn])
    start = Start.zero(difference_MD[drawn], resample)
    for rate in dict.fromkeys((0.0, choice.flip_rate)):
        start = replace(start, weight_D=fit_head(difference_MD[drawn], resample, penalty_D, rate, start))
    return start.weight_D


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
