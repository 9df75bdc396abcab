"""Selectors that allot survivors over all groups of an iteration: `keep` a group on average, and of each none or some.

They stand beside those that keep as many of every group, in benchmarks/when_pruning_pays.py. All scores must be there.
A group whose scores are all equal is kept last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from progrpo.rollout.prune import Selection

_FLAT = 1e-9  # a spread that is only rounding


def by_variance(scores_PG: Tensor, keep: int, present_PG: Tensor, seeds_P: Tensor) -> Selection:
    """Choose the survivors of all groups with the largest sum of k V: OVF where every group keeps as many."""
    groups, size = scores_PG.shape
    sorted_PG, member_PG = _standardised(scores_PG).sort(dim=1, stable=True)
    signal_PK, lows_PK = _best_subsets(sorted_PG)
    best = torch.full((groups + 1, groups * keep + 1), -torch.inf, dtype=torch.float64)
    best[0, 0] = 0.0
    taken = torch.zeros(groups + 1, groups * keep + 1, dtype=torch.int64)
    for group in range(groups):
        for count in (0, *range(2, min(size, groups * keep) + 1)):
            total = best[group, : best.shape[1] - count] + signal_PK[group, count]
            better = total > best[group + 1, count:]
            best[group + 1, count:][better] = total[better]
            taken[group + 1, count:][better] = count
    chosen_PG, left = torch.zeros_like(scores_PG, dtype=torch.bool), groups * keep
    for group in reversed(range(groups)):
        count = int(taken[group + 1, left])
        lows = int(lows_PK[group, count])
        chosen_PG[group, member_PG[group, :lows]] = True
        chosen_PG[group, member_PG[group, size - count + lows :]] = True
        left -= count
    return _selection(chosen_PG)


def by_advantage(scores_PG: Tensor, keep: int, present_PG: Tensor, seeds_P: Tensor) -> Selection:
    """Choose the survivors of all groups with the largest advantages by size, under the full group's statistics.

    The second member of a group comes with the first. Where only one of them would fit in, neither is kept.
    """
    size_PG = _standardised(scores_PG).abs()
    first_two_P2 = size_PG.topk(2, dim=1)
    size_PG = size_PG.scatter(1, first_two_P2.indices, first_two_P2.values[:, :1].expand(-1, 2))
    rank_N = size_PG.flatten().sort(descending=True, stable=True).indices
    chosen_N = torch.zeros(size_PG.numel(), dtype=torch.bool)
    chosen_N[rank_N[: keep * len(size_PG)]] = True
    chosen_PG = chosen_N.reshape(size_PG.shape)
    return _selection(chosen_PG & (chosen_PG.sum(1, keepdim=True) > 1))


def _standardised(scores_PG: Tensor) -> Tensor:
    """The scores in units of their group's spread, float64; 0 in a group whose scores are all equal."""
    centred_PG = scores_PG.double().nan_to_num()
    centred_PG = centred_PG - centred_PG.mean(1, keepdim=True)
    std_P1 = centred_PG.square().mean(1, keepdim=True).sqrt()
    return torch.where(std_P1 > _FLAT, centred_PG / std_P1.clamp(min=_FLAT), 0.0)


def _best_subsets(sorted_PG: Tensor) -> tuple[Tensor, Tensor]:
    """The largest k V of k members of each group, (P, G+1), and how many of these are its lowest."""
    size = sorted_PG.shape[1]
    sum_PG, square_PG = (
        torch.nn.functional.pad(values.cumsum(1), (1, 0)) for values in (sorted_PG, sorted_PG.square())
    )
    count_K1, lows_I = torch.arange(size + 1)[:, None], torch.arange(size + 1)
    high_from_KI = (size - count_K1 + lows_I).clamp(max=size)

    def total(prefix_PG: Tensor) -> Tensor:
        return prefix_PG[:, None, :] + prefix_PG[:, -1:, None] - prefix_PG[:, high_from_KI]

    spread_PKI = total(square_PG) - total(sum_PG).square() / count_K1.clamp(min=1)
    signal_PK, lows_PK = spread_PKI.masked_fill(lows_I > count_K1, -torch.inf).max(2)
    return signal_PK, lows_PK


def _selection(chosen_PG: Tensor) -> Selection:
    """The chosen members in the leading places of their group's row."""
    indices_PG = (~chosen_PG).int().argsort(dim=1, stable=True)
    valid_PG = chosen_PG.gather(1, indices_PG)
    return Selection(indices_PG.where(valid_PG, 0), valid_PG)
