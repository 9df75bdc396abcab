"""The value of a plan: the learning signal that it is expected to give per second, over plain GRPO's.

Score-function estimators over k independent rewards have SNR^2 in proportion to k V, V being the variance of the kept
rewards in units of the variance of all. So a plan gives a signal of k V per prompt, and k V / seconds per second. A
subset never has more signal than its group: pruning wins by saving seconds.

Advantages are in units of their own group's std, so that every group that teaches has the same noise, and a signal in
proportion to sqrt(V). V is then the squared mean of these roots. Advantages in units of one std for all groups leave a
group whose rewards have std s a signal in proportion to s V and a noise of s^2 V / k (`Simulation.of_batch`). Prompts
ask for different changes, and no number of members averages that out, so that the signal of a prompt is bounded
(`prompt_signal`).

Audits measure how previews agree with final rewards, and how these are spread within a group. The groups in which plans
are compared are simulated from both. Each has the final rewards of one audit, so that a verdict stays a verdict: of one
that half the members pass V is 1 whatever is chosen, where normal rewards reach 1.86 at half. Behind the rewards stand
normal variables (a Gaussian copula), and a preview is the knowledge of them at its step. So previews at steps s < t
correlate as rho_s / rho_t with each other and as rho with the end: a random walk W, seen at the times rho^2, and at 1.
The scores of a step are the group's rewards, shared out by the ranks of W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from progrpo.rollout.plan import Plan
from progrpo.rollout.prune import Selector

_GROUPS = 512  # of the simulation: its own error is then above one per cent, and the same draws serve all plans
_EQUAL = 1e-9  # a std that is only rounding
_ANGLES = 17  # at which agreement is tabled, as sin(angle): that of verdicts is linear in the angle, of others smooth


def prompt_signal(signal: float, own_direction: float) -> float:
    """The SNR^2 of a prompt, from the `signal` k V of its members, in the same units.

    It is d^2 / (t^2 + s^2 / (k V)) for a mean direction d, prompts' own directions of variance t^2 around it, and
    members of variance s^2. `own_direction` is t^2 / s^2.
    """
    return 1 / (1 / signal + own_direction) if signal > 0 else 0.0


@dataclass(frozen=True)
class Simulation:
    """P simulated groups of G members: previews at each of T steps, and in the last column final rewards.

    All are in units of the standard deviation within a group.
    """

    previews_PGT1: Tensor
    std_P: Tensor | None = None
    """The std of each group's rewards where advantages are in units of one std for all; None where of their own."""
    _living: dict[tuple[int, tuple[tuple[int, int], ...]], Tensor] = field(default_factory=dict)
    """The members of a group left after some points, by their places: plans share their beginnings."""

    @classmethod
    def of(
        cls,
        agreement_T: Sequence[float],
        finals: Sequence[Sequence[float]],
        group_size: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> Simulation:
        """Simulate groups from Spearman's correlation of previews with final rewards by step, and from these rewards.

        `finals` are those of audits, each of one group and standardised. An audit shapes a share of the groups, in
        proportion to its weight. A later preview is taken to know no less than an earlier one.
        """
        generator = torch.Generator().manual_seed(seed)
        of_P = _audit_of_each(weights or [1.0] * len(finals))
        audited = _Groups.of(finals, of_P, max(map(len, finals)), generator)
        known_T = audited.correlations(agreement_T, generator)
        times = torch.cat([known_T.square(), torch.ones(1, dtype=torch.float64)]).cummax(0).values
        groups = _Groups.of(finals, of_P, group_size, generator)
        steps = _normals((_GROUPS, group_size, len(times)), generator)
        walk = (steps * times.diff(prepend=times.new_zeros(1)).sqrt()).cumsum(2)
        walk = walk + times * (groups.latents_PG[..., None] - walk[..., -1:])  # to the end that is given
        # where nothing is known all would be equal, and the selectors' rule for ties would decide: there it is a draw
        blind = _normals(walk.shape, generator)
        seen = groups.by_rank(torch.where(times > 0, walk, blind)[..., :-1])
        return cls(torch.cat([seen, groups.rewards_PG[..., None]], dim=2))

    def of_batch(self, stds: Sequence[float], weights: Sequence[float] | None = None) -> Simulation:
        """A simulation of these groups with advantages over one std for all; `stds` are of the audits' rewards."""
        of_P = _audit_of_each(weights or [1.0] * len(stds))
        return replace(self, std_P=torch.tensor(stds, dtype=torch.float64)[of_P])

    def signal(self, plan: Plan, selector: Selector) -> float:  # one selector a simulation
        """The signal k V of the plan: SNR^2 per prompt, to which each member of a full group adds nearly 1."""
        points = [(point.step, point.keep) for point in plan.active_points()]
        if plan.final_keep is not None:
            points.append((-1, plan.final_keep))
        members_PK = self._after(plan.group_size, tuple(points), selector)
        std_P = self._scores(members_PK, -1).std(dim=1, correction=0)
        std_P = std_P.where(std_P > _EQUAL, 0.0)  # a group whose rewards are equal adds neither signal nor noise
        if self.std_P is None:
            signal_P, noise_P = std_P, (std_P > 0).double()
        else:
            signal_P, noise_P = self.std_P * std_P.square(), (self.std_P * std_P).square()
        noise = noise_P.mean().item()
        value = members_PK.shape[1] * signal_P.mean().item() ** 2 / noise if noise else 0.0
        return round(value, 9)  # sums go by how memory lies, and must not make two equal runs differ

    def _after(self, group_size: int, points: tuple[tuple[int, int], ...], selector: Selector) -> Tensor:
        """The members of each group that are left after some points, by their places (P, K)."""
        if not points:
            return torch.arange(group_size).expand(len(self.previews_PGT1), -1)
        beginning = (group_size, points[:-1])
        if beginning not in self._living:
            self._living[beginning] = self._after(*beginning, selector)
        living_PG = self._living[beginning]
        step, keep = points[-1]
        scores_PG, seeds_P = self._scores(living_PG, step), torch.arange(len(living_PG))
        chosen_PK = selector(scores_PG, keep, torch.ones_like(scores_PG, dtype=torch.bool), seeds_P).indices_PK
        return living_PG.gather(1, chosen_PK)

    def _scores(self, members_PK: Tensor, step: int) -> Tensor:
        return self.previews_PGT1[:, :, step].gather(1, members_PK)


@dataclass(frozen=True)
class _Groups:
    """P groups of G members in random order: their final rewards, and the normal variables behind these."""

    rewards_PG: Tensor
    latents_PG: Tensor

    @classmethod
    def of(
        cls, finals: Sequence[Sequence[float]], of_P: Tensor, group_size: int, generator: torch.Generator
    ) -> _Groups:
        """Give each group the rewards of its audit, or their quantiles where the group has another size.

        The normal variables have the places that the rewards have among those of all audits; equal rewards share out
        the places between the next lower and higher one.
        """
        places_G = (torch.arange(group_size, dtype=torch.float64) + 0.5) / group_size
        shapes = [torch.tensor(final, dtype=torch.float64).sort().values for final in finals]
        rewards_PG = torch.stack([shape[(places_G * len(shape)).long()] for shape in shapes])[of_P]
        rewards_PG = rewards_PG.gather(1, _normals(rewards_PG.shape, generator).argsort(1))
        pool = torch.cat(shapes).sort().values
        lower, upper = (torch.searchsorted(pool, rewards_PG, right=right) for right in (False, True))
        within = torch.rand(rewards_PG.shape, generator=generator, dtype=torch.float64)
        return cls(rewards_PG, torch.special.ndtri((lower + within * (upper - lower)) / len(pool)))

    def by_rank(self, values: Tensor) -> Tensor:
        """The rewards of each group, shared out by the order of values (P, G, ...)."""
        ascending = self.rewards_PG.sort(1).values.reshape(*self.rewards_PG.shape, *[1] * (values.ndim - 2))
        return values.scatter(1, values.argsort(1), ascending.expand_as(values))

    def correlations(self, agreement_T: Sequence[float], generator: torch.Generator) -> Tensor:
        """The correlations (T,), from 0 to 1, of latents at each step with the end whose rewards agree so.

        Ranks with ties and small groups have a smaller Spearman's correlation than 6 / pi asin(rho / 2), so that it is
        found by simulation.
        """
        angles = torch.linspace(0, math.pi / 2, _ANGLES, dtype=torch.float64)
        noise = _normals(self.latents_PG.shape, generator)
        ranked = replace(self, rewards_PG=_centred_ranks(self.rewards_PG))
        agreements = []
        for angle in angles:
            seen = ranked.by_rank(angle.sin() * self.latents_PG + angle.cos() * noise)
            agreements.append(((seen * ranked.rewards_PG).sum(1) / ranked.rewards_PG.square().sum(1)).mean())
        agreement = torch.stack([torch.zeros_like(agreements[0]), *agreements[1:]]).cummax(0).values
        measured_T = np.array(agreement_T, dtype=np.float64)
        angle_T = np.interp(measured_T, agreement.numpy(), angles.numpy())
        return torch.from_numpy(np.where(measured_T > 0, angle_T, 0.0)).sin()


def _normals(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _centred_ranks(values_PG: Tensor) -> Tensor:
    """Twice the members' ranks, with the average rank for ties, less their mean."""
    ascending = values_PG.sort(1).values
    below, upto = (torch.searchsorted(ascending, values_PG, right=right) for right in (False, True))
    return (below + upto - values_PG.shape[1]).double()


def _audit_of_each(weights: Sequence[float]) -> Tensor:
    """The number of the audit that shapes each of the groups (P,): shares in proportion to the weights."""
    upto = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    return torch.searchsorted(upto, (torch.arange(_GROUPS, dtype=torch.float64) + 0.5) / _GROUPS * upto[-1])
