"""What an objective is: it turns what was sampled into a loss. One small file each; none knows a model or another."""

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
    """Standard normal noise that knows whose it is: the same for the same slot, member and step of an iteration."""

    def draw(self, slot_N: Tensor, member_N: Tensor, step: int, shape: tuple[int, ...]) -> Tensor:
        """float32 (N, *shape) on the CPU. Sampling draws at steps from -1 on; objectives draw below."""
        ...


@dataclass(frozen=True)
class Experience(Rows):
    """N finished trajectories with their advantages, and the process that they were sampled by.

    `condition` has one row a prompt, found by `trajectories.group_N`; the final latents are `trajectories.x_NCHW` and the stored transitions its `path`.
    `before_ND` is what the objective's `prepare` noted of each item before the first optimizer step. Where it noted `size_N`, the
    rewarded members of each trajectory's group, a microbatch must hold all of a group's items of a draw.
    """

    trajectories: Trajectories
    advantages_N: Tensor
    condition: Condition = field(metadata=Rows.FOR_ALL)
    process: Process = field(metadata=Rows.FOR_ALL)
    noise: Noise = field(metadata=Rows.FOR_ALL)
    guidance_scale: float = field(default=1.0, metadata=Rows.FOR_ALL)
    before_ND: Tensor | None = None
    size_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.trajectories)

    @property
    def attached(self) -> bool:
        """Whether transitions carry the graphs of the outputs that they were sampled with."""
        return any(t.attached_NCHW is not None for t in self.trajectories.path)

    def detached(self) -> Experience:
        """Without these graphs, which one backward pass uses up."""
        path = tuple(replace(t, attached_NCHW=None) for t in self.trajectories.path)
        return replace(self, trajectories=replace(self.trajectories, path=path))

    def noting(self, before_ND: Tensor) -> Experience:
        return replace(self, before_ND=before_ND)

    def in_whole_groups(self) -> Experience:
        count_P = torch.bincount(self.trajectories.group_N)
        return replace(self, size_N=count_P[self.trajectories.group_N])


@dataclass(frozen=True)
class Loss:
    """Of B items the loss of each, and what is worth watching of each: by its mean and by its maximum."""

    loss_B: Tensor
    means_B: Mapping[str, Tensor] = field(default_factory=dict)
    maxima_B: Mapping[str, Tensor] = field(default_factory=dict)

    def first(self, count: int) -> Loss:
        """Of the first items alone: the others filled a microbatch up."""
        means = {name: values[:count] for name, values in self.means_B.items()}
        return Loss(self.loss_B[:count], means, {name: values[:count] for name, values in self.maxima_B.items()})

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
    """A loss of what was sampled, made from its settings.

    Items are what a microbatch counts: for GRPO a transition of a trajectory, for others a trajectory and a noise level.
    """

    @property
    def settings(self) -> LossSettings:
        """The objective's own settings, with the facts that a run asks for."""
        ...

    @property
    def clip_range(self) -> float | None:
        """How far the loss lets the policy go in one iteration, None for no bound.

        Ratios of densities may be off 1 by a hundredth of it before any update.
        """
        ...

    def prepare(self, policy: Policy, experience: Experience, microbatch: int, updates: int) -> Experience:
        """Note what must be known before the first of `updates` optimizer steps; given all rewarded trajectories."""
        ...

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        """The loss of the items numbered in [0, N * settings.items_per_trajectory(transitions)), ascending, with gradients to the policy.

        Item i is draw or transition i // N of trajectory i % N, so a microbatch mixes steps where it must and no more.
        An item may be there twice, where it fills a microbatch up.
        """
        ...
