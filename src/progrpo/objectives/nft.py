"""DiffusionNFT (arXiv 2509.16117): flow matching towards what was good and away from what was bad, without trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from progrpo.diffusion.gaussian import mean_square
from progrpo.objectives.base import Average, Experience, Loss, Needs
from progrpo.objectives.forward_process import Draws, Noised
from progrpo.policies.base import Policy

_MIN_ERROR = 1e-5  # of the normalisation of an error by itself


@dataclass(frozen=True)
class NFT:
    """Pictures are drawn by `old`, an average of the weights that the loss measures from.

    With the velocity v of the current weights, the positive policy is v+ = beta v + (1 - beta) v_old and the implicit
    negative one v- = (1 + beta) v_old - beta v. The loss is c (r L+ + (1 - r) L-) / beta, with optimality
    r = (A / c + 1) / 2 for an advantage A clipped to +-c, and L the error of the predicted x0, divided by its own mean
    absolute value. `kl_beta` weighs the mean square distance of velocities to the reference.
    """

    draws: int
    time_fraction: float
    beta: float = 1.0
    adv_clip_max: float = 5.0
    kl_beta: float = 1e-4
    needs: ClassVar[Needs] = "latents"
    clip_range: ClassVar[float | None] = None
    averages: ClassVar[Mapping[str, Average]] = {"old": Average(ramp=1e-3, limit=0.5)}
    rollout_weights: ClassVar[str] = "old"

    @property
    def uses_reference(self) -> bool:
        return self.kl_beta > 0

    def items_per_trajectory(self, experience: Experience) -> int:
        return self.draws

    def prepare(self, policy: Policy, experience: Experience, microbatch: int, updates: int) -> Experience:
        return experience  # `old` itself stays as it is until the updates are done

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        at = Noised.gather(policy, experience, items_B, Draws(self.draws, self.time_fraction))
        v_old = at.predict_with(policy, "old")
        v_ref = at.predict_with(policy, "reference") if self.kl_beta > 0 else None
        v = at.predict(policy)
        positive_B = self._error(at, self.beta * v + (1 - self.beta) * v_old)
        negative_B = self._error(at, (1 + self.beta) * v_old - self.beta * v)
        r_B = (at.advantages / self.adv_clip_max).clamp(-1, 1) / 2 + 0.5
        loss_B = self.adv_clip_max * (r_B * positive_B + (1 - r_B) * negative_B) / self.beta
        means = {"distance_to_old": mean_square(v.detach() - v_old)}
        if v_ref is not None:
            kl_B = mean_square(v - v_ref)
            loss_B = loss_B + self.kl_beta * kl_B
            means["kl"] = kl_B.detach()
        return Loss(loss_B, means)

    @staticmethod
    def _error(at: Noised, v: Tensor) -> Tensor:
        off = at.denoised(v) - at.x0
        size_B = off.detach().abs().flatten(1).mean(1).clamp(min=_MIN_ERROR)
        return mean_square(off) / size_B
