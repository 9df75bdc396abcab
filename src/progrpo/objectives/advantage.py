"""Advantages of groups of any size: N rewards (float64, NaN or infinite = missing) and the group of each.

Groups may end with different counts, because rewards fail and members are pruned. Their members need not be
contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_ROUNDING = 16 * torch.finfo(torch.float64).eps  # a std below this share of the mean is rounding of sums


@dataclass(frozen=True)
class GroupStatistics:
    """Mean, std and count of the observed rewards of P groups.

    Mean and std (ddof 0) are float64, and NaN where none was observed. The count is int64.
    """

    mean_P: Tensor
    std_P: Tensor
    count_P: Tensor

    def with_mean(self, mean: Tensor) -> GroupStatistics:
        """The statistics with one mean, of shape (), for all groups.

        GDPO (arXiv 2601.05242) subtracts the mean of the whole batch in its last step.
        """
        return replace(self, mean_P=mean.expand_as(self.mean_P))

    @property
    def informative_P(self) -> Tensor:
        """The mask of groups that give a gradient: at least two observed rewards, and not all of them equal."""
        return (self.count_P >= 2) & (self.std_P > _ROUNDING * self.mean_P.abs().clamp(min=1))


def _group_sum(values_N: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    return values_N.new_zeros(num_groups).index_add(0, group_N, values_N)


def group_statistics(rewards_N: Tensor, group_N: Tensor, num_groups: int) -> GroupStatistics:
    """Mean, std and count of the observed rewards of each group; `group_N` int64 in [0, num_groups).

    Each group's lowest reward is subtracted before the sums, so that a number added to all rewards changes no std.
    """
    observed_N = rewards_N.isfinite()
    rewards = rewards_N[observed_N].double()
    group = group_N[observed_N]
    count_P = torch.bincount(group, minlength=num_groups)
    lowest_P = rewards.new_full((num_groups,), torch.inf).scatter_reduce(0, group, rewards, "amin")
    above_N = rewards - lowest_P[group]
    mean_P = _group_sum(above_N, group, num_groups) / count_P
    variance_P = _group_sum((above_N - mean_P[group]).square(), group, num_groups) / count_P
    return GroupStatistics(lowest_P + mean_P, variance_P.sqrt(), count_P)


def with_quorum(rewards_N: Tensor, group_N: Tensor, num_groups: int, quorum: float) -> Tensor:
    """The rewards, with NaN for every member of a group of which a smaller share than `quorum` was observed.

    The mean of such a group would rest on too few rewards.
    """
    observed_P = torch.bincount(group_N[rewards_N.isfinite()], minlength=num_groups)
    enough_P = observed_P >= quorum * torch.bincount(group_N, minlength=num_groups)
    return rewards_N.where(enough_P[group_N], torch.nan)


def normalised_sum(
    rewards_NR: Tensor, weights_R: Tensor, group_N: Tensor, num_groups: int, eps: float = 1e-4
) -> Tensor:
    """Sum over R rewards of weight (reward - group mean) / (group std + eps), (N,) float64 (GDPO, arXiv 2601.05242).

    A reward that does not differ within a group adds exactly 0 there. A member that lacks any reward gets NaN and
    counts in no mean or std.
    """
    complete_NR = rewards_NR.double().where(rewards_NR.isfinite().all(1, keepdim=True), torch.nan)
    total_N = complete_NR.new_zeros(len(complete_NR)).where(complete_NR.isfinite().all(1), torch.nan)
    for values_N, weight in zip(complete_NR.unbind(1), weights_R.double(), strict=True):
        statistics = group_statistics(values_N, group_N, num_groups)
        scaled_N = (values_N - statistics.mean_P[group_N]) / (statistics.std_P[group_N] + eps)
        total_N = total_N + weight * torch.where(statistics.informative_P[group_N], scaled_N, 0.0)
    return total_N


def posterior_means(rewards_N: Tensor, variance_N: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    """The expected rewards given observed ones and the variance of each one's noise, (N,) float64; both are normal.

    A reward is drawn to its group's mean by the share of noise in its variance. The variance without noise is one for
    all of these groups, by moments. It is at least a thousandth of the noise's, so that rewards of pure noise keep an
    order. A member that lacks either number gets NaN and counts in no mean.
    """
    known_N = rewards_N.isfinite() & variance_N.isfinite()
    rewards, noise, group = rewards_N[known_N].double(), variance_N[known_N].double(), group_N[known_N]
    count_P = torch.bincount(group, minlength=num_groups)
    offsets = rewards - group_statistics(rewards, group, num_groups).mean_P[group]
    freedom = (count_P - 1).clamp(min=0).sum().clamp(min=1)
    of_noise = (noise * (1 - 1 / count_P[group].double())).sum() / freedom
    own = (offsets.square().sum() / freedom - of_noise).clamp(min=float(of_noise) / 1000)
    precision = 1 / (own + noise).clamp(min=torch.finfo(torch.float64).tiny)
    total_P = _group_sum(precision, group, num_groups)
    mean_P = _group_sum(precision * offsets, group, num_groups) / total_P
    expected = rewards + (1 - own * precision) * (mean_P[group] - offsets)
    return rewards_N.new_full(rewards_N.shape, torch.nan, dtype=torch.float64).masked_scatter(known_N, expected)


def moments(rewards_N: Tensor, centre: Tensor | float = 0.0) -> Tensor:
    """Count, sum and sum of squares of the observed rewards minus `centre`, (3,) float64.

    The moments of several ranks are added up.
    """
    offsets = rewards_N[rewards_N.isfinite()].double() - centre
    return torch.stack([offsets.new_tensor(float(len(offsets))), offsets.sum(), offsets.square().sum()])


def batch_mean_std(rewards_N: Tensor, add_up: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and std (ddof 0) of all observed rewards of all ranks, of shape (), float64; 0 if there are none.

    `add_up` sums the `moments` of all ranks. It is called twice: the second call takes squares of distances to the
    mean, because the squares of large rewards lose their digits in a subtraction.
    """
    count, total, _ = add_up(moments(rewards_N)).unbind()
    centre = total / count.clamp(min=1)
    count, offset, squares = add_up(moments(rewards_N, centre)).unbind()
    mean_offset = offset / count.clamp(min=1)
    mean_square = squares / count.clamp(min=1)
    return centre + mean_offset, (mean_square - mean_offset.square()).clamp(min=0).sqrt()


def with_negative_weight(advantages_N: Tensor, weight: float) -> Tensor:
    """The advantages, with a factor for those below 0."""
    return torch.where(advantages_N < 0, weight * advantages_N, advantages_N)


def advantages(
    rewards_N: Tensor,
    group_N: Tensor,
    statistics: GroupStatistics,
    *,
    std: Tensor | None = None,
    eps: float = 1e-4,
    clip_max: float = 5.0,
) -> tuple[Tensor, Tensor]:
    """Advantages (reward - group mean) / (std + eps), clipped to +-clip_max: (advantages_N float32, trained_N bool).

    The divisor is the group's std (Pro-GRPO, arXiv 2512.15347, over survivors) or, if given, `std` of shape () for all
    groups (flow_grpo's global_std). `statistics` may come from more rewards than these, such as those of the full
    group before it was pruned. Members of a group that is not informative get exactly 0: they count but give no
    gradient. `trained_N` is False where the reward is missing, and the advantage there is 0.
    """
    divisor_N = statistics.std_P[group_N] if std is None else std
    raw_N = (rewards_N.double() - statistics.mean_P[group_N]) / (divisor_N + eps)
    trained_N = rewards_N.isfinite()
    usable_N = trained_N & statistics.informative_P[group_N]
    return torch.where(usable_N, raw_N.clamp(-clip_max, clip_max), 0.0).float(), trained_N
