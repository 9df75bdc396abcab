"""The value of a plan: the learning signal that it is expected to give per second, over plain GRPO's.

Score-function estimators over k independent rewards have SNR^2 in proportion to k V, V being the variance of the kept
rewards in units of the variance of all. So a plan gives a signal of k V per prompt, and k V / seconds per second. A
subset never has more signal than its group: pruning wins by saving seconds.

The agreement of previews is measured in audit groups, and the groups in which plans are compared are simulated. Final
rewards are normal, and a preview is the knowledge of them at its step. So previews at steps s < t correlate as
rho_s / rho_t with each other and as rho with the end: a random walk W, seen at the times rho^2, and at 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.prune import Selector

_GROUPS = 512  # of the simulation: its own error is then above one per cent, and the same draws serve all plans


def pearson(spearman: float) -> float:
    """Pearson's correlation of two normal variables with this rank correlation."""
    return 2 * math.sin(math.pi * spearman / 6)


@dataclass(frozen=True)
class Simulation:
    """P simulated groups of G members: previews at each of T steps, and in the last column final rewards."""

    previews_PGT1: Tensor
    _living: dict[tuple[tuple[int, int], ...], Tensor] = field(default_factory=dict)
    """The members left after some points: plans share their beginnings."""

    @classmethod
    def of(cls, agreement_T: Sequence[float], group_size: int, seed: int = 0) -> Simulation:
        """Simulate groups from Spearman's correlation of previews with final rewards, by step.

        A later preview is taken to know no less than an earlier one.
        """
        known = torch.tensor([min(max(pearson(a), 0.0), 1.0) for a in agreement_T] + [1.0], dtype=torch.float64)
        times = known.square().cummax(0).values
        generator = torch.Generator().manual_seed(seed)
        steps = torch.randn(_GROUPS, group_size, len(times), generator=generator, dtype=torch.float64)
        walk = (steps * times.diff(prepend=times.new_zeros(1)).sqrt()).cumsum(2)
        # where nothing is known all would be equal, and the selectors' rule for ties would decide: there it is a draw
        blind = torch.randn(walk.shape, generator=generator, dtype=torch.float64)
        return cls(torch.where(times > 0, walk, blind))

    def signal(self, plan: Plan, selector: Selector) -> float:  # one selector a simulation
        """The signal k V of the plan: SNR^2 per prompt, to which each member of a full group adds nearly 1."""
        points = [(point.step, point.keep) for point in plan.active_points()]
        if plan.final_keep is not None:
            points.append((-1, plan.final_keep))
        kept = self._after(plan.group_size, tuple(points), selector)
        value: float = kept.shape[1] * kept[:, :, -1].var(dim=1, correction=0).mean().item()
        return round(value, 9)  # sums go by how memory lies, and must not make two equal runs differ

    def _after(self, group_size: int, points: tuple[tuple[int, int], ...], selector: Selector) -> Tensor:
        if not points:
            return self.previews_PGT1[:, :group_size]
        key = ((group_size, 0), *points)
        if key not in self._living:
            living = self._after(group_size, points[:-1], selector)
            step, keep = points[-1]
            scores_PG, seeds_P = living[:, :, step], torch.arange(len(living))
            chosen_PK = selector(scores_PG, keep, torch.ones_like(scores_PG, dtype=torch.bool), seeds_P).indices_PK
            self._living[key] = living.gather(1, chosen_PK[..., None].expand(-1, -1, living.shape[2]))
        return self._living[key]


def plans(group_size: int, survivors: int, num_inference_steps: int, most_points: int = 2) -> Iterator[Plan]:
    """The plans from a group to at least so many survivors.

    They have up to `most_points` prune points, and some of them a choice by final rewards.
    """
    keeps = sorted({round(survivors + (group_size - survivors) * part / 3) for part in range(4)} - {group_size})
    for count in range(most_points + 1):
        for steps in combinations(range(num_inference_steps - 1), count):
            for falling in combinations(reversed(keeps), count):
                points = tuple(PrunePoint(step, keep) for step, keep in zip(steps, falling, strict=True))
                left = points[-1].keep if points else group_size
                yield Plan(group_size, points)
                yield from (Plan(group_size, points, keep) for keep in keeps if keep < left)
