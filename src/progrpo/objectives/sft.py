"""Supervised fine-tuning on chosen pictures: the pretraining loss of those that are better than their group's mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from progrpo.diffusion.gaussian import mean_square
from progrpo.objectives.base import Experience, Loss
from progrpo.objectives.forward_process import Draws, NoisedLatents
from progrpo.objectives.settings import SFTSettings
from progrpo.policies.base import Policy


@dataclass(frozen=True)
class SFT:
    """The pretraining loss l of chosen pictures, weighted by their advantages: the control of preference optimisation.

    Flow matching (arXiv 2210.02747) or the diffusion model's own target (arXiv 2006.11239). A picture is chosen if its
    advantage is above 0: of a pair, the preferred one. `kl_beta` weighs the mean square distance of outputs to the
    reference.
    """

    settings: SFTSettings
    Settings: ClassVar = SFTSettings

    @property
    def clip_range(self) -> None:
        return None

    @property
    def _draws(self) -> Draws:
        return Draws(self.settings.draws, self.settings.time_fraction)

    def prepare(self, policy: Policy, experience: Experience, microbatch: int, updates: int) -> Experience:
        return experience

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        noised = NoisedLatents.gather(policy, experience, items_B, self._draws)
        output = noised.predict(policy)
        loss_B = noised.advantages.clamp(min=0) * noised.error(output)
        means = {}
        if self.settings.kl_beta > 0:
            kl_B = mean_square(output - noised.predict_with(policy, "reference"))
            loss_B = loss_B + self.settings.kl_beta * kl_B
            means["kl"] = kl_B.detach()
        return Loss(loss_B, means)
