"""DiffusionNFT (arXiv 2509.16117): flow matching towards good samples and away from bad ones, without trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from progrpo.diffusion.gaussian import mean_square
from progrpo.objectives.base import Experience, Loss
from progrpo.objectives.forward_process import Draws, NoisedLatents
from progrpo.objectives.settings import NFTSettings
from progrpo.policies.base import Policy


@dataclass(frozen=True)
class NFT:
    """The contrast of a positive and a negative policy around `old`, an average of the weights that also samples.

    With the velocity v of the current weights, the positive policy is v+ = beta v + (1 - beta) v_old and the implicit
    negative one v- = (1 + beta) v_old - beta v. The loss is c (r L+ + (1 - r) L-) / beta, with optimality
    r = (A / c + 1) / 2 for an advantage A clipped to +-c, and L the error of the predicted x0, divided by its own mean
    absolute value. `kl_beta` weighs the mean square distance of velocities to the reference.
    """

    settings: NFTSettings
    Settings: ClassVar = NFTSettings

    @property
    def clip_range(self) -> float | None:
        return None

    @property
    def _draws(self) -> Draws:
        return Draws(self.settings.draws, self.settings.time_fraction)

    def prepare(self, policy: Policy, experience: Experience, microbatch: int, updates: int) -> Experience:
        return experience  # the weights `old` change only after the updates

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        noised = NoisedLatents.gather(policy, experience, items_B, self._draws)
        v_old = noised.predict_with(policy, "old")
        v_ref = noised.predict_with(policy, "reference") if self.settings.kl_beta > 0 else None
        v = noised.predict(policy)
        positive_B = noised.normalised_error(self.settings.beta * v + (1 - self.settings.beta) * v_old)
        negative_B = noised.normalised_error((1 + self.settings.beta) * v_old - self.settings.beta * v)
        r_B = (noised.advantages / self.settings.adv_clip_max).clamp(-1, 1) / 2 + 0.5
        loss_B = self.settings.adv_clip_max * (r_B * positive_B + (1 - r_B) * negative_B) / self.settings.beta
        means = {"distance_to_old": mean_square(v.detach() - v_old)}
        if v_ref is not None:
            kl_B = mean_square(v - v_ref)
            loss_B = loss_B + self.settings.kl_beta * kl_B
            means["kl"] = kl_B.detach()
        return Loss(loss_B, means)
