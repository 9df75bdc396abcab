"""Direct group preference optimisation, DGPO (arXiv 2510.08425): the group's better half against its worse, no trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from progrpo.diffusion.gaussian import mean_square
from progrpo.objectives.base import Average, Experience, Loss, Needs
from progrpo.objectives.forward_process import Draws, Noised, noted
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

    draws: int
    time_fraction: float
    dpo_beta: float = 100.0
    clip_range: float = 0.05
    adv_clip_max: float = 5.0
    kl_beta: float = 1e-3
    needs: ClassVar[Needs] = "latents"
    averages: ClassVar[Mapping[str, Average]] = {"average": Average(ramp=1e-3, limit=0.3)}
    rollout_weights: ClassVar[str] = "current"
    uses_reference: ClassVar[bool] = True

    @property
    def _draws(self) -> Draws:
        return Draws(self.draws, self.time_fraction, shared=True)

    def items_per_trajectory(self, experience: Experience) -> int:
        return self.draws

    def prepare(self, policy: Policy, experience: Experience, microbatch: int, updates: int) -> Experience:
        """The weight of each group and draw, noted for every member."""

        def gain(at: Noised) -> Tensor:
            reference = at.error(at.predict_with(policy, "reference"))
            return self.dpo_beta * at.velocity_weight * (at.error(at.predict(policy)) - reference) * at.advantages

        gain_ND = noted(policy, experience, self._draws, microbatch, gain)
        group_N = experience.trajectories.group_N
        groups = int(group_N.max()) + 1 if len(group_N) else 0
        total_PD = gain_ND.new_zeros(groups, self.draws).index_add(0, group_N, gain_ND)
        members_P = torch.bincount(group_N, minlength=groups).clamp(min=1)
        return experience.noting((total_PD / members_P[:, None]).sigmoid()[group_N])

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        assert experience.before_ND is not None, "prepare first"
        at = Noised.gather(policy, experience, items_B, self._draws)
        v_ref = at.predict_with(policy, "reference") if self.kl_beta > 0 else None
        average_B = at.error(at.predict_with(policy, "average"))
        v = at.predict(policy)
        error_B = at.error(v)
        weight_B = experience.before_ND[at.rows, at.draw].to(error_B) * at.advantages
        moved_B, range_B = error_B - average_B, self.clip_range / at.velocity_weight
        bounded_B = average_B + moved_B.clamp(-range_B, range_B)
        loss_B = torch.maximum(weight_B * error_B, weight_B * bounded_B)
        means = {"clip_fraction": (moved_B.detach().abs() > range_B).float()}
        if v_ref is not None:
            kl_B = mean_square(v - v_ref)
            loss_B = loss_B + self.kl_beta * kl_B
            means["kl"] = kl_B.detach()
        return Loss(loss_B, means)
