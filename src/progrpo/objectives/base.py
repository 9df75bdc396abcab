"""What an objective is: it turns what was sampled into a loss. One small file each; none knows a model or another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from progrpo.policies.base import Policy
from progrpo.types import Condition, Trajectories


@dataclass(frozen=True)
class Experience:
    """N finished trajectories with their advantages, and the grid that they were sampled on.

    `sigmas_T1` and `rates_T` give each step's ends and its diffusion rate. `condition` has one row a prompt, found by
    `trajectories.group_N`; the final latents are `trajectories.x_NCHW` and the stored transitions its `path`.
    """

    trajectories: Trajectories
    advantages_N: Tensor
    condition: Condition
    sigmas_T1: Tensor
    rates_T: Tensor
    guidance_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.trajectories)

    def take(self, rows: Tensor) -> Experience:
        return replace(self, trajectories=self.trajectories.take(rows), advantages_N=self.advantages_N[rows])


@dataclass(frozen=True)
class Loss:
    """The sum of a loss over some items, and what is worth watching: sums over the items, and maxima."""

    total: Tensor
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Items are what a microbatch counts: for GRPO a transition of a trajectory, for others a trajectory and a time."""

    needs: ClassVar[Literal["transitions", "latents"]]
    """What sampling must store: stochastic transitions with log-probs, or only final latents."""

    def items_per_trajectory(self, experience: Experience) -> int: ...

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        """Loss of the items numbered in [0, N * items_per_trajectory), with gradients to the policy."""
        ...
