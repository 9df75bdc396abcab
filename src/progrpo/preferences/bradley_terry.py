"""The Bradley-Terry model of pairs (doi 10.2307/2334029): its loss, and how good its predictions are.

A pair has two scores, and its margin is the first one's less the second's. The first picture is preferred with the
probability sigmoid(margin). A share e of the labels, the flip rate in [0, 0.5), may be swapped at random (the noise of
arXiv 2403.00409). A label is then the first picture's with the probability
(1 - e) sigmoid(margin) + e sigmoid(-margin).

Dimension letters: M pairs, B bins, T temperatures. A preference is in [0, 1]: 1 where the first picture is preferred, 0
where the second is, 0.5 for a tie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

_Z = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution
_RESAMPLES = 1000


def bradley_terry_loss(margin_M: Tensor, preference_M: Tensor, strength_M: Tensor, flip_rate: float = 0.0) -> Tensor:
    """Compute the mean cross-entropy of preferences in nats, weighted by the pairs' strengths."""
    return pair_losses(margin_M, preference_M, flip_rate) @ strength_M / strength_M.sum()


def pair_losses(margin_M: Tensor, preference_M: Tensor, flip_rate: float = 0.0) -> Tensor:
    """Compute the cross-entropy (M,) of each preference, in nats."""
    if not flip_rate:
        return softplus(margin_M) - preference_M * margin_M
    first_M, second_M = label_probability(margin_M, flip_rate), label_probability(-margin_M, flip_rate)
    return -preference_M * first_M.log() - (1 - preference_M) * second_M.log()


def loss_slopes(margin_M: Tensor, preference_M: Tensor, flip_rate: float = 0.0) -> Tensor:
    """Compute the derivative (M,) of each pair's loss by its margin."""
    chance_M = margin_M.sigmoid()
    if not flip_rate:
        return chance_M - preference_M
    first_M, second_M = label_probability(margin_M, flip_rate), label_probability(-margin_M, flip_rate)
    by_chance_M = (1 - preference_M) / second_M - preference_M / first_M
    return by_chance_M * (1 - 2 * flip_rate) * chance_M * (-margin_M).sigmoid()


def label_probability(margin_M: Tensor, flip_rate: float = 0.0) -> Tensor:
    """Compute the probability (M,) that a label is the first picture's."""
    return flip_rate + (1 - 2 * flip_rate) * margin_M.sigmoid()


@dataclass(frozen=True)
class Share:
    """A share of pairs with its 95 % interval."""

    value: float
    low: float
    high: float
    count: int


def agreement(margin_M: Tensor, preference_M: Tensor) -> Tensor:
    """Compute whether each margin has the side that is preferred (1 or 0); 0.5 for a margin of 0, NaN for a tie."""
    side_M = (preference_M - 0.5).sign()
    agreement_M = (margin_M.sign() * side_M + 1) / 2
    return agreement_M.where(side_M != 0, torch.nan)


def accuracy(margin_M: Tensor, preference_M: Tensor) -> Share:
    """Compute the share of pairs whose order the scores give, without ties, with Wilson's interval (1927).

    It is NaN where every pair is a tie.
    """
    agreement_M = agreement(margin_M, preference_M)
    agreement_M = agreement_M[~agreement_M.isnan()]
    count = len(agreement_M)
    if count == 0:
        return Share(math.nan, math.nan, math.nan, 0)
    share = float(agreement_M.mean())
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return Share(share, max(0.0, middle - half), min(1.0, middle + half), count)


def clustered_accuracy(margin_M: Tensor, preference_M: Tensor, cluster_M: Tensor, seed: int = 0) -> Share:
    """Compute the accuracy with an interval for pairs that resemble each other, such as those of one prompt.

    The interval is that of the percentile bootstrap over clusters (`cluster_M`, int64), 1,000 times. It needs two
    clusters at least, and is NaN with fewer.
    """
    agreement_M = agreement(margin_M, preference_M)
    there_M = ~agreement_M.isnan()
    if not there_M.any():
        return Share(math.nan, math.nan, math.nan, 0)
    _, cluster_M = cluster_M[there_M].unique(return_inverse=True)
    clusters = int(cluster_M.max()) + 1
    correct_C = torch.zeros(clusters, dtype=torch.float64).index_add_(0, cluster_M, agreement_M[there_M].double())
    count_C = cluster_M.bincount(minlength=clusters).double()
    share, count = float(correct_C.sum() / count_C.sum()), int(count_C.sum())
    if clusters == 1:
        return Share(share, math.nan, math.nan, count)
    drawn_RC = torch.randint(clusters, (_RESAMPLES, clusters), generator=torch.Generator().manual_seed(seed))
    share_R = correct_C[drawn_RC].sum(1) / count_C[drawn_RC].sum(1)
    low, high = share_R.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Share(share, low, high, count)


@dataclass(frozen=True)
class Calibration:
    """The frequency with which predictions come true, by their confidence: B bins of equal width from 0.5 to 1."""

    error: float
    """The expected calibration error (arXiv 1706.04599): the mean of |confidence - share|, by the bins' counts."""
    confidence_B: Tensor
    """The mean probability of the predicted side; NaN for an empty bin."""
    share_B: Tensor
    """The mean preference for the predicted side; NaN for an empty bin."""
    count_B: Tensor


def calibration(probability_M: Tensor, preference_M: Tensor, bins: int = 10) -> Calibration:
    """Compare the probabilities of the first pictures with the preferences; a tie counts as half."""
    probability_M, preference_M = probability_M.double(), preference_M.double()
    first_M = probability_M >= 0.5
    confidence_M = probability_M.where(first_M, 1 - probability_M)
    share_M = preference_M.where(first_M, 1 - preference_M)
    bin_M = ((confidence_M - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    count_B = bin_M.bincount(minlength=bins)
    confidence_B, share_B = (
        torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_M, values_M) / count_B
        for values_M in (confidence_M, share_M)
    )
    gap_B = (confidence_B - share_B).abs().nan_to_num(0.0)
    return Calibration(float((gap_B * count_B).sum() / count_B.sum()), confidence_B, share_B, count_B)


def temperature(margin_M: Tensor, preference_M: Tensor, strength_M: Tensor, flip_rate: float = 0.0) -> float:
    """Find the temperature whose margins / temperature have the least loss (temperature scaling, arXiv 1706.04599).

    It is the best of a coarse grid from 1e-3 to 1e3, refined to 1 %.
    """

    def best_of(temperature_T: Tensor) -> float:
        losses = [bradley_terry_loss(margin_M / t, preference_M, strength_M, flip_rate) for t in temperature_T.tolist()]
        return float(temperature_T[torch.stack(losses).argmin()])

    coarse = best_of(torch.logspace(-3, 3, 61, dtype=torch.float64))
    return best_of(coarse * torch.logspace(-0.1, 0.1, 41, dtype=torch.float64))
