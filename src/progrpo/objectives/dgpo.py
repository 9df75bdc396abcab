"""Direct group preference optimisation (DGPO, arXiv 2510.08425): a group's better members against its worse ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from progrpo.diffusion.gaussian import mean_square
from progrpo.objectives.base import Experience, Loss
from progrpo.objectives.blocks import block_sums, fits_microbatch
from progrpo.objectives.forward_process import Draws, NoisedLatents, evaluate_items
from progrpo.objectives.settings import DGPOSettings
from progrpo.policies.base import Policy


@dataclass(frozen=True)
class DGPO:
    """Pretraining losses l, weighted by the advantage A and by a weight w of the group.

    The group's weight w = sigmoid(sum_i A_i dpo_beta (l_i - l_ref,i) / G) is held constant over the updates. It is
    near 1 where the policy prefers the worse members more than the reference does. The loss is w A l. On the side that
    the advantage asks for, l stays within `clip_range` of the loss of an average of the weights. The members of a
    group share times and noise. `kl_beta` weighs the mean square distance of outputs to the reference.

    `dpo_beta` and `clip_range` are in units of a flow model's loss. A diffusion model's loss is converted to these
    units at each noise level: its loss on noise is up to 240 times smaller at the noisiest level of Stable Diffusion,
    where a range of 0.05 would bind nothing.
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
        """Compute the weight of each group and draw, one for every member.

        A single update that sees whole groups computes the weights from the forward passes of its loss instead.
        """
        group_N = experience.trajectories.group_N
        members_P = torch.bincount(group_N)
        if updates == 1 and fits_microbatch(experience, microbatch):
            return experience.with_group_sizes()

        def gain(noised: NoisedLatents) -> Tensor:
            error_B = noised.error(noised.predict(policy))
            reference_B = noised.error(noised.predict_with(policy, "reference"))
            return self._gain(noised, error_B, reference_B)

        gain_ND = evaluate_items(policy, experience, self._draws, microbatch, gain)
        total_PD = gain_ND.new_zeros(len(members_P), self.settings.draws).index_add(0, group_N, gain_ND)
        weight_PD = (total_PD / members_P.clamp(min=1)[:, None]).sigmoid()
        return experience.with_prepared(weight_PD[group_N])

    def _gain(self, noised: NoisedLatents, error_B: Tensor, reference_B: Tensor) -> Tensor:
        """The summand A dpo_beta (l - l_ref) of each item in its group's weight."""
        difference_B = error_B.detach() - reference_B
        return self.settings.dpo_beta * noised.velocity_weight * difference_B * noised.advantages

    def _weights(self, experience: Experience, noised: NoisedLatents, gain_B: Tensor) -> Tensor:
        """The weights of groups that are present whole, per draw."""
        assert experience.group_size_N is not None, "prepare first"
        total_B = block_sums(experience, noised, gain_B)
        return (total_B / experience.group_size_N[noised.rows].to(gain_B)).sigmoid()

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        noised = NoisedLatents.gather(policy, experience, items_B, self._draws)
        prepared_ND = experience.prepared_ND
        needs_reference = prepared_ND is None or self.settings.kl_beta > 0
        v_ref = noised.predict_with(policy, "reference") if needs_reference else None
        average_B = noised.error(noised.predict_with(policy, "average"))
        v = noised.predict(policy)
        error_B = noised.error(v)
        if prepared_ND is None:
            assert v_ref is not None
            group_B = self._weights(experience, noised, self._gain(noised, error_B, noised.error(v_ref)))
        else:
            group_B = prepared_ND[noised.rows, noised.draw].to(error_B)
        weight_B = group_B * noised.advantages
        moved_B = error_B - average_B
        range_B = self.clip_range / noised.velocity_weight
        bounded_B = average_B + moved_B.clamp(-range_B, range_B)
        loss_B = torch.maximum(weight_B * error_B, weight_B * bounded_B)
        means = {"clip_fraction": (moved_B.detach().abs() > range_B).float()}
        if self.settings.kl_beta > 0:
            assert v_ref is not None
            kl_B = mean_square(v - v_ref)
            loss_B = loss_B + self.settings.kl_beta * kl_B
            means["kl"] = kl_B.detach()
        return Loss(loss_B, means)
