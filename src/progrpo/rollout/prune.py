"""Selectors: which members to keep, by the scores of P groups of at most G members.

A selector gets `scores_PG` (a score that is NaN or infinite is missing), how many to keep, `present_PG` (False where a
ragged group has no such member, whatever the score says) and `seeds_P` (int64, one per group). All selectors prefer
members that have a score: those without one are taken, lowest member first, only where the scored ones are too few.

All rank the scored members of a group by a key, then take so many from the low end and the rest from the high end. They
differ in the key and in the split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_TIE = 1e-13  # variances of splits that differ by less than this share of the largest are equal but for rounding


@dataclass(frozen=True)
class Selection:
    """The kept members, in K = keep places per group: indices (int64), ascending, in the leading places that are valid.

    Where a group has fewer present members than places, `valid_PK` is False and the index 0 in the places left over."""

    indices_PK: Tensor
    valid_PK: Tensor


Selector = Callable[[Tensor, int, Tensor, Tensor], Selection]


@dataclass(frozen=True)
class _Ranking:
    """The members of each group by ascending key, scored ones first: `member_PG[p, r]` is the member of rank r."""

    keys_PG: Tensor
    member_PG: Tensor
    count_P: Tensor


_Split = Callable[[_Ranking, Tensor, int], Tensor]


def _rank(keys_PG: Tensor, scored_PG: Tensor) -> _Ranking:
    keys, member = keys_PG.masked_fill(~scored_PG, torch.inf).sort(dim=1, stable=True)
    return _Ranking(keys, member, scored_PG.sum(1))


def _ends(ranking: _Ranking, lows_P: Tensor, highs_P: Tensor) -> Tensor:
    """The `lows_P` lowest and `highs_P` highest scored members of each group, as a mask (P, G) by member."""
    rank_G = torch.arange(ranking.member_PG.shape[1], device=lows_P.device)
    count_P1 = ranking.count_P[:, None]
    taken_PG = (rank_G < lows_P[:, None]) | ((rank_G >= count_P1 - highs_P[:, None]) & (rank_G < count_P1))
    return torch.zeros_like(taken_PG).scatter(1, ranking.member_PG, taken_PG)


def _prefix_sums(values_PG: Tensor) -> Tensor:
    """The prefix sums (P, G+1): entry r is the sum of the first r values."""
    return torch.nn.functional.pad(values_PG.cumsum(1), (1, 0))


def _centred(ranking: _Ranking) -> Tensor:
    """The sorted keys less their group's median, in float64, 0 where there is no key.

    Squares of raw rewards such as 26 +- 0.01 differ in digits that float32 does not have: their sums pick other splits.
    The median, unlike the mean, is one of the keys, so that equal keys give 0 exactly and near ones lose no digit.
    """
    keys = ranking.keys_PG.double()
    scored = torch.arange(keys.shape[1], device=keys.device) < ranking.count_P[:, None]
    middle = ranking.count_P[:, None] // 2  # of no scored key: inf, which `where` drops
    return (keys - keys.gather(1, middle)).where(scored, 0.0)


def _best_lows(ranking: _Ranking, kept_P: Tensor, keep: int) -> Tensor:
    """The i at which a group's i lowest and kept - i highest keys have the largest variance; the lowest i on ties."""
    kept_P1, size = kept_P[:, None], ranking.keys_PG.shape[1]
    lows_PK = torch.arange(keep + 1, device=kept_P.device).expand(len(kept_P), -1)
    low_to = lows_PK.clamp(max=size)
    high_from = (ranking.count_P[:, None] - kept_P1 + lows_PK).clamp(max=size)

    def mean(values_PG: Tensor) -> Tensor:
        prefix = _prefix_sums(values_PG)
        return (prefix.gather(1, low_to) + prefix[:, -1:] - prefix.gather(1, high_from)) / kept_P1.clamp(min=1)

    centred = _centred(ranking)
    variance = (mean(centred.square()) - mean(centred).square()).masked_fill(lows_PK > kept_P1, -torch.inf)
    best = variance.amax(1, keepdim=True)
    return (variance >= best - _TIE * best.abs()).int().argmax(1)


def _half_lows(ranking: _Ranking, kept_P: Tensor, keep: int) -> Tensor:
    return kept_P // 2


def _all_lows(ranking: _Ranking, kept_P: Tensor, keep: int) -> Tensor:
    return kept_P


def _no_lows(ranking: _Ranking, kept_P: Tensor, keep: int) -> Tensor:
    return torch.zeros_like(kept_P)


def _choose(keys_PG: Tensor, scored_PG: Tensor, keep: int, split: _Split) -> Tensor:
    """The mask (P, G) of min(keep, scored) members of each group: `split` from the low end, others from the high."""
    ranking = _rank(keys_PG, scored_PG)
    kept_P = ranking.count_P.clamp(max=keep)
    lows_P = split(ranking, kept_P, keep)
    return _ends(ranking, lows_P, kept_P - lows_P)


def _pack(chosen_PG: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The chosen members of each group, ascending, in the leading places of (P, keep), and which places are filled."""
    row, member = chosen_PG.nonzero(as_tuple=True)
    indices_PK = row.new_zeros(chosen_PG.shape[0], keep)
    valid_PK = torch.arange(keep, device=row.device) < chosen_PG.sum(1, keepdim=True)
    indices_PK[valid_PK] = member
    return indices_PK, valid_PK


def _select(keys_PG: Tensor, scores_PG: Tensor, keep: int, present_PG: Tensor, split: _Split) -> Selection:
    """Choose among the scored members, and fill up from those without a score, lowest first, where they are few."""
    scored_PG = scores_PG.isfinite() & present_PG
    chosen_PG = _choose(keys_PG, scored_PG, keep, split)
    missing_PG = present_PG & ~scored_PG
    filled_PG = missing_PG & (missing_PG.cumsum(1) <= keep - chosen_PG.sum(1, keepdim=True))
    indices_PK, valid_PK = _pack(chosen_PG | filled_PG, keep)
    return Selection(indices_PK, valid_PK)


def ovf(scores_PG: Tensor, keep: int, present_PG: Tensor, seeds_P: Tensor) -> Selection:
    """Optimal variance filtering (Pro-GRPO, arXiv 2512.15347): the subset of largest score variance.

    Such a subset is the i lowest and keep - i highest scores for some i (PODS, arXiv 2504.13818, Lemma 3.1), and prefix
    sums of the sorted scores weigh every i at once: O(G log G) per group. Among equal variances the lowest i wins (more
    high scores); among equal scores the low end takes the first members and the high end the last.
    """
    return _select(scores_PG, scores_PG, keep, present_PG, _best_lows)


def top_bottom(scores_PG: Tensor, keep: int, present_PG: Tensor, seeds_P: Tensor) -> Selection:
    """The ceil(keep / 2) highest and floor(keep / 2) lowest scores, however skewed they are."""
    return _select(scores_PG, scores_PG, keep, present_PG, _half_lows)


def furthest(scores_PG: Tensor, keep: int, present_PG: Tensor, seeds_P: Tensor) -> Selection:
    """The scores furthest from their group's mean: the largest advantages by size (CPPO, arXiv 2503.22342).

    Its advantages have mean and std of the full group (`objective.baseline` group), where all have final rewards.
    """
    scored_PG = scores_PG.isfinite() & present_PG
    known_PG = scores_PG.double().where(scored_PG, 0.0)
    mean_P1 = known_PG.sum(1, keepdim=True) / scored_PG.sum(1, keepdim=True).clamp(min=1)
    return _select((known_PG - mean_P1).abs(), scores_PG, keep, present_PG, _no_lows)


def uniform(scores_PG: Tensor, keep: int, present_PG: Tensor, seeds_P: Tensor) -> Selection:
    """A uniform draw from the scored members: a function of the group's own seed, not of the groups beside it."""
    keys_PG, generator = torch.empty(scores_PG.shape), torch.Generator()
    for keys_G, seed in zip(keys_PG, seeds_P.tolist(), strict=True):
        keys_G.uniform_(generator=generator.manual_seed(seed))
    return _select(keys_PG.to(scores_PG.device), scores_PG, keep, present_PG, _all_lows)


def none(scores_PG: Tensor, keep: int, present_PG: Tensor, seeds_P: Tensor) -> Selection:
    """The first scored members, in order: the control whose choice carries no information about the scores."""
    keys_PG = torch.arange(scores_PG.shape[1], device=scores_PG.device).float().expand_as(scores_PG)
    return _select(keys_PG, scores_PG, keep, present_PG, _all_lows)


def survivors(group_N: Tensor, scores_N: Tensor, keep: int, selector: Selector, seeds_P: Tensor) -> Tensor:
    """The rows of N members, prompt-major, that the selector keeps: prompt-major, members ascending.

    The selector sees the groups that have members.
    """
    living_P, group_N = group_N.unique(return_inverse=True)
    if not len(living_P):
        return group_N
    row_PG, present_PG = to_groups(group_N, len(living_P))
    seeds_P = seeds_P[living_P]
    scores_PG = scores_N[row_PG].masked_fill(~present_PG, torch.nan)
    selection = selector(scores_PG, keep, present_PG, seeds_P)
    return row_PG.gather(1, selection.indices_PK)[selection.valid_PK]


def widest_groups(group_N: Tensor, scores_N: Tensor, keep: int) -> Tensor:
    """The `keep` of P groups, numbered from 0, whose scores have the largest variance, ascending (int64).

    Among equal variances the lower group wins. A group with fewer than two finite scores comes last. Rows are by group.
    The choice does not depend on the order of rows within a group. A verdict that p of the members pass has the same
    variance as one that 1 - p pass.
    """
    row_PG, present_PG = to_groups(group_N, int(group_N.max()) + 1)
    scores_PG = scores_N.double()[row_PG]
    scored_PG = scores_PG.isfinite() & present_PG
    count_P = scored_PG.sum(1)
    ascending_PG = scores_PG.masked_fill(~scored_PG, torch.inf).sort(1).values
    above_PG = (ascending_PG - ascending_PG[:, :1]).where(ascending_PG.isfinite(), 0.0)
    # whole numbers stay exact, so that equal variances of verdicts are equal
    squares_P, total_P = above_PG.square().sum(1), above_PG.sum(1)
    variance_P = (count_P * squares_P - total_P.square()) / count_P.square()
    order_P = variance_P.where(count_P >= 2, -1.0).sort(descending=True, stable=True).indices
    return order_P[:keep].sort().values


def to_groups(group_N: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The row number of every member of every group (P, G), and where there is one; G is the largest group's size."""
    count_P = torch.bincount(group_N, minlength=num_groups)
    place_G = torch.arange(int(count_P.max()))
    present_PG = place_G < count_P[:, None]
    row_PG = (count_P.cumsum(0) - count_P)[:, None] + place_G
    return row_PG.where(present_PG, 0), present_PG
