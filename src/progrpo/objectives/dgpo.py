"""Direct group preference optimisation, DGPO (arXiv 2510.08425): the group's better half against its worse, no trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from progrpo.diffusion.gaussian import mean_square
from progrpo.objectives.base import Experience, Loss
from progrpo.objectives.forward_process import Draws, Noised, noted
from progrpo.objectives.settings import DGPOSettings
from progrpo.policies.base import Policy


@dataclass(frozen=True)
class DGPO:
    """The pretraining's losses l weighed by advantage and by how undecided the group still is.

    A group's weight w = sigmoid(sum_i A_i dpo_beta (l_i - l_ref,i) / G) is held constant over the updates: near 1 where
    the policy prefers the worse more than the reference does. The loss is w A l, in which l stays within `clip_range` of that of an
    average of the weights, on the side that the advantage asks for. A group shares times and noise. `kl_beta` weighs the mean
    square distance of outputs to the reference.

    `dpo_beta` and `clip_range` are in units of a flow model's loss. A diffusion model's is brought to them at each noise level: a
    loss of noise is up to 240 times smaller at the noisiest one of Stable Diffusion, where a range of 0.05 would bind nothing.
    """

    settings: DGPOSettings
    Settings: ClassVar = DGPOSettings

    @property
    def clip_range(self) -> float:
        return self.settings.clip_range

    @property
    def _draws(self) -> Draws:
        return Draws(self.settings.draws, self.settings.time_fraction, shared=True)

    def prepare(self, policy: Policy, experience: Experience, microbatch: int, updates: int) -> Experience:
        """The weight of each group and draw, noted for every member.

        A single update finds them on its way, from the passes that its loss needs anyway, if it sees groups whole.
        """
        group_N = experience.trajectories.group_N
        members_P = torch.bincount(group_N)
        if updates == 1 and (len(group_N) == 0 or members_P.max() <= microbatch):
            return experience.in_whole_groups()

        def gain(at: Noised) -> Tensor:
            return self._gain(at, at.error(at.predict(policy)), at.error(at.predict_with(policy, "reference")))

        gain_ND = noted(policy, experience, self._draws, microbatch, gain)
        total_PD = gain_ND.new_zeros(len(members_P), self.settings.draws).index_add(0, group_N, gain_ND)
        return experience.noting((total_PD / members_P.clamp(min=1)[:, None]).sigmoid()[group_N])

    def _gain(self, at: Noised, error_B: Tensor, reference_B: Tensor) -> Tensor:
        """What each item adds to how far the group is decided."""
        return self.settings.dpo_beta * at.velocity_weight * (error_B.detach() - reference_B) * at.advantages

    def _weights(self, experience: Experience, at: Noised, gain_B: Tensor) -> Tensor:
        """Of groups that are there whole, per draw; an item that is there twice, to fill the microbatch up, counts once."""
        assert experience.size_N is not None, "prepare first"
        group_B = experience.trajectories.group_N[at.rows]
        block_B = (at.draw * (group_B.max() + 1) + group_B).to(gain_B.device)
        again = (at.rows.diff(prepend=at.rows[:1] - 1) == 0) & (at.draw.diff(prepend=at.draw[:1] - 1) == 0)
        total = gain_B.new_zeros(int(block_B.max()) + 1)
        total.index_add_(0, block_B, gain_B.masked_fill(again.to(gain_B.device), 0))
        return (total[block_B] / experience.size_N[at.rows].to(gain_B)).sigmoid()

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        at = Noised.gather(policy, experience, items_B, self._draws)
        before = experience.before_ND
        compared = before is None or self.settings.kl_beta > 0
        v_ref = at.predict_with(policy, "reference") if compared else None
        average_B = at.error(at.predict_with(policy, "average"))
        v = at.predict(policy)
        error_B = at.error(v)
        if before is None:
            assert v_ref is not None
            group_B = self._weights(experience, at, self._gain(at, error_B, at.error(v_ref)))
        else:
            group_B = before[at.rows, at.draw].to(error_B)
        weight_B = group_B * at.advantages
        moved_B, range_B = error_B - average_B, self.clip_range / at.velocity_weight
        bounded_B = average_B + moved_B.clamp(-range_B, range_B)
        loss_B = torch.maximum(weight_B * error_B, weight_B * bounded_B)
        means = {"clip_fraction": (moved_B.detach().abs() > range_B).float()}
        if self.settings.kl_beta > 0:
            assert v_ref is not None
            kl_B = mean_square(v - v_ref)
            loss_B = loss_B + self.settings.kl_beta * kl_B
            means["kl"] = kl_B.detach()
        return Loss(loss_B, means)
