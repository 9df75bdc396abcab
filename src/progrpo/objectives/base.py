"""The protocol of objectives: an objective turns sampled trajectories into a loss.

Each objective is one small file. It knows neither a model nor another objective.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from progrpo.diffusion.process import Process
from progrpo.objectives.settings import LossSettings
from progrpo.policies.base import Policy
from progrpo.types import Condition, Rows, Trajectories


class Noise(Protocol):
    """Standard normal noise keyed by trajectory: the same for the same slot, member and step of an iteration."""

    def draw(self, slot_N: Tensor, member_N: Tensor, step: int, shape: tuple[int, ...]) -> Tensor:
        """Draw float32 (N, *shape) on the CPU. Sampling draws at steps from -1 on; objectives draw below."""
        ...


@dataclass(frozen=True)
class Experience(Rows):
    """N finished trajectories with their advantages, and the process that they were sampled by.

    `condition` has one row per prompt, indexed by `trajectories.group_N`. The final latents are `trajectories.x_NCHW`,
    and the stored transitions are its `path`. `prepared_ND` holds what the objective's `prepare` computed for each
    item before the first optimizer step. Where `prepare` set `group_size_N`, the number of rewarded members of each
    trajectory's group, a microbatch must hold all of a group's items of a draw.
    """

    trajectories: Trajectories
    advantages_N: Tensor
    condition: Condition = field(metadata=Rows.FOR_ALL)
    process: Process = field(metadata=Rows.FOR_ALL)
    noise: Noise = field(metadata=Rows.FOR_ALL)
    guidance_scale: float = field(default=1.0, metadata=Rows.FOR_ALL)
    prepared_ND: Tensor | None = None
    group_size_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.trajectories)

    @property
    def attached(self) -> bool:
        """Whether transitions carry the graphs of the outputs that they were sampled with."""
        return any(t.attached_NCHW is not None for t in self.trajectories.path)

    def detached(self) -> Experience:
        """The experience without these graphs, which one backward pass uses up."""
        path = tuple(replace(t, attached_NCHW=None) for t in self.trajectories.path)
        return replace(self, trajectories=replace(self.trajectories, path=path))

    def with_prepared(self, prepared_ND: Tensor) -> Experience:
        return replace(self, prepared_ND=prepared_ND)

    def with_group_sizes(self) -> Experience:
        count_P = torch.bincount(self.trajectories.group_N)
        return replace(self, group_size_N=count_P[self.trajectories.group_N])


@dataclass(frozen=True)
class Loss:
    """The loss of each of B items, and metrics of each item that are reported by their mean or by their maximum."""

    loss_B: Tensor
    means_B: Mapping[str, Tensor] = field(default_factory=dict)
    maxima_B: Mapping[str, Tensor] = field(default_factory=dict)

    def first(self, count: int) -> Loss:
        """The loss of the first `count` items alone; the others only filled up a microbatch."""
        means = {name: values[:count] for name, values in self.means_B.items()}
        maxima = {name: values[:count] for name, values in self.maxima_B.items()}
        return Loss(self.loss_B[:count], means, maxima)

    @property
    def total(self) -> Tensor:
        return self.loss_B.sum()

    @property
    def sums(self) -> Mapping[str, Tensor]:
        return {name: values.sum() for name, values in (*self.means_B.items(), ("loss", self.loss_B.detach()))}

    @property
    def maxima(self) -> Mapping[str, Tensor]:
        return {name: values.max() for name, values in self.maxima_B.items()}


class Objective(Protocol):
    """A loss on sampled trajectories, made from its settings.

    Microbatches count items: a transition of a trajectory for GRPO, a trajectory and a noise level for the others.
    """

    @property
    def settings(self) -> LossSettings:
        """The objective's own settings, with the facts that a run asks for."""
        ...

    @property
    def clip_range(self) -> float | None:
        """The bound on how far the loss moves the policy in one iteration; None for no bound.

        Before any update, ratios of densities may differ from 1 by a hundredth of it.
        """
        ...

    def prepare(self, policy: Policy, experience: Experience, microbatch: int, updates: int) -> Experience:
        """Compute what the loss needs from before the first of `updates` optimizer steps.

        `experience` holds all rewarded trajectories.
        """
        ...

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        """Compute the loss of the items `items_B`, ascending, with gradients to the policy.

        Items are numbered in [0, N * settings.items_per_trajectory(transitions)). Item i is draw or transition i // N
        of trajectory i % N, so that a microbatch mixes as few steps as possible. An item may occur twice, where it
        fills up a microbatch.
        """
        ...
