"""Diffusion-DPO (arXiv 2311.12908), in diffusion and flow form: a pair's preferred picture against the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from progrpo.diffusion.gaussian import mean_square
from progrpo.objectives.base import Experience, Loss
from progrpo.objectives.blocks import block_sums, fits_microbatch
from progrpo.objectives.forward_process import Draws, NoisedLatents, evaluate_items
from progrpo.objectives.settings import DPOSettings
from progrpo.policies.base import Policy


@dataclass(frozen=True)
class DPO:
    """The loss -log sigmoid(-beta m) with m = (l_w - l_ref,w) - (l_l - l_ref,l), for each pair and draw.

    l is the pretraining loss of the winner w and of the loser l: of a flow model's velocity, or of a diffusion model's
    own target. Both get the same noise levels and noise. A group is a pair: the sign of the advantage says who won, and
    its absolute value weighs the pair. With `label_smoothing` e the loss is
    -(1 - e) log sigmoid(-beta m) - e log sigmoid(beta m), for labels of which a share e is flipped.

    What is differentiated is 2 A beta (sigmoid(beta m) - e) l with the sigmoid held constant. Its gradient is the
    loss's own, and an item needs no graph of its partner. `kl_beta` weighs the mean square distance of outputs to the
    reference.
    """

    settings: DPOSettings
    Settings: ClassVar = DPOSettings

    @property
    def clip_range(self) -> None:
        return None

    @property
    def _draws(self) -> Draws:
        return Draws(self.settings.draws, self.settings.time_fraction, shared=True)

    def prepare(self, policy: Policy, experience: Experience, microbatch: int, updates: int) -> Experience:
        """Compute the margin m of each pair and draw, one for both of its members.

        A single update that sees whole pairs computes the margins from the forward passes of its loss instead.
        """
        if updates == 1 and fits_microbatch(experience, microbatch):
            return experience.with_group_sizes()

        def gain(noised: NoisedLatents) -> Tensor:
            error_B = noised.error(noised.predict(policy))
            reference_B = noised.error(noised.predict_with(policy, "reference"))
            return noised.advantages.sign() * (error_B - reference_B)

        gain_ND = evaluate_items(policy, experience, self._draws, microbatch, gain)
        group_N = experience.trajectories.group_N
        groups = int(group_N.max()) + 1 if len(group_N) else 0
        margin_PD = gain_ND.new_zeros(groups, self.settings.draws).index_add(0, group_N, gain_ND)
        return experience.with_prepared(margin_PD[group_N])

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        noised = NoisedLatents.gather(policy, experience, items_B, self._draws)
        prepared_ND = experience.prepared_ND
        needs_reference = prepared_ND is None or self.settings.kl_beta > 0
        reference = noised.predict_with(policy, "reference") if needs_reference else None
        output = noised.predict(policy)
        error_B = noised.error(output)
        if prepared_ND is None:
            assert reference is not None
            gain_B = noised.advantages.sign() * (error_B.detach() - noised.error(reference))
            margin_B = block_sums(experience, noised, gain_B)
        else:
            margin_B = prepared_ND[noised.rows, noised.draw].to(error_B)
        smoothing, logit_B = self.settings.label_smoothing, self.settings.beta * margin_B
        slope_B = self.settings.beta * (logit_B.sigmoid() - smoothing)
        loss_B = 2 * noised.advantages * slope_B * error_B
        pair_loss_B = (1 - smoothing) * F.softplus(logit_B) + smoothing * F.softplus(-logit_B)
        means = {"dpo_loss": noised.advantages.abs() * pair_loss_B, "dpo_accuracy": (1 - margin_B.sign()) / 2}
        if self.settings.kl_beta > 0:
            assert reference is not None
            kl_B = mean_square(output - reference)
            loss_B = loss_B + self.settings.kl_beta * kl_B
            means["kl"] = kl_B.detach()
        return Loss(loss_B, means)
