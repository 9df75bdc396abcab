"""The experience of a rollout: the survivors whose rewards are known, with their advantages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from progrpo.config import ObjectiveSettings
from progrpo.objectives.advantage import (
    GroupStatistics,
    advantages,
    batch_mean_std,
    group_statistics,
    normalised_sum,
    with_negative_weight,
    with_quorum,
)
from progrpo.objectives.base import Experience, Noise
from progrpo.rollout.sampling import Sampling
from progrpo.rollout.sharding import NOT_SHARDED, GroupSharding
from progrpo.training.distributed import Ranks, Tally
from progrpo.types import GroupScores, Rollout


@dataclass(frozen=True)
class AdvantageEstimator:
    """The rule by which rewards become advantages.

    `weights` are those of the mixed rewards, by name. A group that misses the `quorum` is left out. Where processes
    share the members of a group (`sharding`), each knows all its rewards and learns from its own share.
    """

    objective: ObjectiveSettings
    clip_max: float
    weights: Mapping[str, float]
    ranks: Ranks
    quorum: float = 0.0
    sharding: GroupSharding = NOT_SHARDED

    def experience(
        self, rollout: Rollout, sampling: Sampling, noise: Noise, negative_weight: float = 1.0
    ) -> tuple[Experience, Tally]:
        """Every survivor whose reward is known, with its advantage; and metrics of the rewards.

        Advantages below 0 are multiplied by `negative_weight`, and all of a group by its weight, if it has one.
        """
        num_groups = len(rollout.prompts)
        shares = self.sharding.gather([rollout.survivors])
        first_own = sum(len(share.group_N) for share in shares[: self.sharding.rank])
        own = torch.arange(len(rollout.group_N)) + first_own
        scores = GroupScores.cat(shares)
        rewards_N = with_quorum(scores.value_N, scores.group_N, num_groups, self.quorum)
        scores = replace(scores, value_N=rewards_N)
        survivors = group_statistics(rewards_N, scores.group_N, num_groups)
        finalist_scores = GroupScores.cat(self.sharding.gather([rollout.finalists]))
        finalists = group_statistics(finalist_scores.value_N, finalist_scores.group_N, num_groups)
        rewarded = scores.group_N[rewards_N.isfinite()].unique()
        if self.objective.advantage == "gdpo":
            advantages_N, known_N, taught = self._normalised_advantages(scores, num_groups)
        else:
            members, taught = (
                (finalist_scores, finalists) if self.objective.baseline == "group" else (scores, survivors)
            )
            std = None
            # what a vote's share means does not depend on other pairs
            if self.objective.advantage == "batch" and rollout.weight_P is None:
                of_taught_N = torch.isin(members.group_N, rewarded)
                std = batch_mean_std(members.value_N[of_taught_N], self._add_up)[1]
            advantages_N, known_N = self._advantages(scores, taught, std)
        tally = self._metrics(rollout, survivors, finalists)
        if self.sharding.rank == 0:  # what all of them know is counted once
            finished = finalist_scores.group_N.unique()
            tally.count("reward/skipped_groups", len(finished) - len(rewarded))
            tally.count("advantage/zero_variance_groups", len(finished) - int(taught.informative_P[rewarded].sum()))
            if len(finished) < num_groups:
                tally.count("rollout/stopped_groups", num_groups - len(finished))
        own_advantages_N = with_negative_weight(advantages_N[own], negative_weight)
        if rollout.weight_P is not None:
            own_advantages_N = own_advantages_N * rollout.weight_P[rollout.group_N].to(own_advantages_N)
        experience = Experience(
            rollout.trajectories,
            own_advantages_N,
            rollout.condition,
            sampling.process,
            noise,
            sampling.guidance_scale,
        )
        return experience.take(known_N[own].nonzero().flatten()), tally

    def _advantages(self, scores: GroupScores, baseline: GroupStatistics, std: Tensor | None) -> tuple[Tensor, Tensor]:
        """Advantages within groups, over their own std or the given one, and whose rewards are known."""
        return advantages(
            scores.value_N,
            scores.group_N,
            baseline,
            std=std,
            eps=self.objective.adv_eps,
            clip_max=self.clip_max,
        )

    def _normalised_advantages(self, scores: GroupScores, num_groups: int) -> tuple[Tensor, Tensor, GroupStatistics]:
        """GDPO's advantages, whose rewards are known, and the statistics of the normalised sums (arXiv 2601.05242)."""
        eps = self.objective.adv_eps
        rewards_NR = scores.rewards_NR.where(scores.value_N.isfinite()[:, None], torch.nan)
        weights_R = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        values_N = normalised_sum(rewards_NR, weights_R, scores.group_N, num_groups, eps)
        mean, std = batch_mean_std(values_N, self._add_up)
        statistics = group_statistics(values_N, scores.group_N, num_groups)
        advantages_N, known_N = advantages(
            values_N, scores.group_N, statistics.with_mean(mean), std=std, eps=eps, clip_max=self.clip_max
        )
        return advantages_N, known_N, statistics

    def _add_up(self, moments_3: Tensor) -> Tensor:
        """The sum over processes; those that share groups know the same rewards, which count once."""
        return self.ranks.sum(moments_3 / self.sharding.world).cpu()

    def _metrics(self, rollout: Rollout, survivors: GroupStatistics, finalists: GroupStatistics) -> Tally:
        tally = Tally()
        if rollout.weight_P is not None:  # preferences, which have no mean
            return tally
        tally.add_finite("reward/mean", rollout.finalists.value_N)
        tally.add_finite("reward/std", survivors.std_P)
        tally.add_finite("reward/strict", rollout.survivors.passed_N)
        if len(self.weights) > 1:
            for name, values_N in zip(self.weights, rollout.survivors.rewards_NR.unbind(1), strict=True):
                tally.add_finite(f"reward/mean@{name}", values_N)
        if not rollout.previews:
            tally.add_finite("reward/group_std_full", finalists.std_P)
        tally.count("reward/missing", int((~rollout.finalists.value_N.isfinite()).sum()))
        return tally
