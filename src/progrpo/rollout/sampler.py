"""One object that samples: a policy and a reward, with the plan and the settings that they are used by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from progrpo.policies.base import Policy
from progrpo.rewards.base import Scorer
from progrpo.rollout.denoise import Denoiser
from progrpo.rollout.plan import Plan
from progrpo.rollout.probe import Probe, trusted_steps
from progrpo.rollout.prune import Selector, ovf
from progrpo.rollout.sampling import Sampling
from progrpo.rollout.settings import PreviewSettings
from progrpo.rollout.sharding import NOT_SHARDED, GroupSharding, in_widest_groups, sharded_survivors
from progrpo.types import Condition, Prompt, Trajectories

Observer = Callable[[int, Trajectories], None]
"""A callback `observe(step, batch)` after each network call of a rollout, before anyone is pruned."""


class LatentReward(Protocol):
    """A reward of latents, which needs no decoder."""

    def score(self, x0_NCHW: Tensor, prompts_N: Sequence[Prompt]) -> Tensor:
        """Score x0 projections: float64 (N,), comparable across groups, NaN where one is not finite."""
        ...


def _ignore(step: int, batch: Trajectories) -> None:
    pass


@dataclass(frozen=True)
class Sampler:
    """A policy and a reward, and how groups are sampled, previewed and pruned with them.

    `rollout`, `in_waves`, `preview`, `evaluate` and the watch of an audit take one. Previews follow
    `preview_settings`; where the `probe` is trusted, it ranks instead, and a `latent_reward` does everywhere. Processes
    of a `sharding` share the members of each group. The `peers` have groups of their own, and choose with this process
    those that go on. `observe` sees rollouts and changes nothing.
    """

    policy: Policy
    reward: Scorer
    sampling: Sampling
    plan: Plan = field(default_factory=lambda: Plan(1))
    selector: Selector = ovf
    preview_settings: PreviewSettings = field(default_factory=PreviewSettings)
    probe: Probe | None = None
    latent_reward: LatentReward | None = None
    sharding: GroupSharding = NOT_SHARDED
    peers: GroupSharding = NOT_SHARDED
    observe: Observer = _ignore

    def denoiser(self, condition: Condition) -> Denoiser:
        """The policy under the condition of some prompts."""
        return Denoiser(self.policy, condition, self.sampling)

    def with_max_batch(self, rows: int) -> Sampler:
        """Return the sampler with at most `rows` rows in a network call."""
        return replace(self, sampling=self.sampling.with_max_batch(rows))

    @property
    def probed_steps(self) -> frozenset[int]:
        """The steps at which the probe ranks."""
        return trusted_steps(self.probe, self.preview_settings)

    def survivors(self, batch: Trajectories, scores_N: Tensor, keep: int, seeds_P: Tensor) -> Tensor:
        """The rows of this process' batch that stay when each group keeps `keep` members; a seed per group."""
        return sharded_survivors(batch, scores_N, keep, self.selector, seeds_P, self.sharding)

    def going_on(self, batch: Trajectories, scores_N: Tensor) -> Tensor:
        """The mask (N,) of the rows of this process' batch whose groups the plan does not stop."""
        assert self.plan.keep_groups is not None
        return in_widest_groups(batch, scores_N, self.plan.keep_groups, self.peers)
