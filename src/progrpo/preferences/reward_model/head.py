"""The linear heads of a reward model: an ensemble's scores, and the fit of one head to pairs by Bradley-Terry's loss.

Dimension letters: N pictures, each with its prompt, M pairs, D features, K members.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from progrpo.preferences.bradley_terry import loss_slopes, pair_losses
from progrpo.preferences.reward_model.backbone import Features

FOLDS = 5
_FEWEST = 2 * FOLDS  # prompts: with fewer, folds and resamples are made of pairs
_ITERATIONS = 500
_RIDGE = 1e-9  # what a direction without penalty and without curvature is given, for the search alone


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
    """The start of a fit, and what makes it fast. It changes nothing else."""

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
