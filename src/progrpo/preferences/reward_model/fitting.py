"""The fitting of a reward model's ensemble: standardised features, chosen penalties, a head for each resample.

Dimension letters: M pairs, D features, K members.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from progrpo.preferences.bradley_terry import temperature
from progrpo.preferences.reward_model.backbone import Features
from progrpo.preferences.reward_model.cross_validation import Blocks, Choice, CrossValidation, fold_of_pairs
from progrpo.preferences.reward_model.head import Comparisons, Ensemble, Start, columns, fit_head

FLIP_RATES = (0.0, 0.1, 0.2, 0.3)
"""The shares of flipped labels among which cross-validation chooses."""
_CONSTANT = 1e-6  # the spread of a feature, by its mean where that is above 1, that is rounding alone


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
    """Draw each member's resample: the number of times that it holds each pair (M,)."""
    if members == 1:
        yield torch.ones(len(pairs), dtype=torch.float64)
        return
    cluster_M = pairs.clusters()
    count, generator = int(cluster_M.max()) + 1, torch.Generator().manual_seed(seed)
    for _ in range(members):
        drawn_C = torch.randint(count, (count,), generator=generator)
        yield drawn_C.bincount(minlength=count)[cluster_M].double()
