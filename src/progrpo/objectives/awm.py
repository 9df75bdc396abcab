"""Advantage weighted matching (AWM, arXiv 2509.25050): policy gradient with the flow-matching loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from progrpo.diffusion.gaussian import mean_square
from progrpo.objectives.base import Experience, Loss
from progrpo.objectives.forward_process import Draws, NoisedLatents, evaluate_items
from progrpo.objectives.settings import AWMSettings
from progrpo.objectives.surrogate import clipped_surrogate, outside_clip
from progrpo.policies.base import Policy

_UNDER_ROOT = 1e-10  # added to an error, since a root's slope is infinite at 0; the authors' own


def _rooted(error_B: Tensor, sigma_B: Tensor, power: float) -> Tensor:
    return sigma_B * ((error_B + _UNDER_ROOT) ** power - _UNDER_ROOT**power) / power


_WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "uniform": lambda error_B, sigma_B, power: error_B,
    "t": lambda error_B, sigma_B, power: sigma_B * error_B,
    "t2": lambda error_B, sigma_B, power: sigma_B.square() * error_B,
    "huber": lambda error_B, sigma_B, power: _rooted(error_B, sigma_B, 0.5) / 2,
    "ghuber": _rooted,
}


@dataclass(frozen=True)
class AWM:
    """Policy gradient whose "log-probability" is minus the flow-matching loss e, weighted by the noise level t.

    `weighting`: e, t e, t^2 e; ghuber, t ((e + 1e-10)^p - 1e-10^p) / p with p = `huber_power`; huber, half of it at p
    = 1/2. Advantages are clipped to +-`adv_clip_max` and multiplied by `adv_scale`. Two penalties hold the policy
    back: `kl_beta` weighs the mean square distance of velocities to the reference, `average_beta` the one to an
    average of the weights over time. The average's decay is min(`average_ramp` n, `average_limit`) after the n-th
    iteration.

    The authors' public configurations for SD3.5 take ghuber, a clip of 5 with a scale of 1/5, and a ramp of 0.001. The
    defaults are Flow-Factory's configuration for SD3.5, except the weighting.
    """

    settings: AWMSettings
    Settings: ClassVar = AWMSettings

    @property
    def clip_range(self) -> float:
        return self.settings.clip_range

    @property
    def _draws(self) -> Draws:
        return Draws(self.settings.draws, self.settings.time_fraction)

    def prepare(self, policy: Policy, experience: Experience, microbatch: int, updates: int) -> Experience:
        """Compute the old log-probabilities.

        With one update they equal the current ones without gradient, so that nothing is computed here.
        """
        if updates == 1:
            return experience

        def log_prob(noised: NoisedLatents) -> Tensor:
            return self._log_prob(noised, noised.predict(policy))

        return experience.with_prepared(evaluate_items(policy, experience, self._draws, microbatch, log_prob))

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        noised = NoisedLatents.gather(policy, experience, items_B, self._draws)
        penalties = {name: beta for name, beta in self._penalties().items() if beta > 0}
        anchors = {name: noised.predict_with(policy, name) for name in penalties}
        v = noised.predict(policy)
        log_prob_B = self._log_prob(noised, v)
        old_ND = experience.prepared_ND
        old_B = log_prob_B.detach() if old_ND is None else old_ND[noised.rows, noised.draw].to(log_prob_B)
        log_ratio_B = log_prob_B - old_B
        loss_B = clipped_surrogate(log_ratio_B, self.settings.adv_scale * noised.advantages, self.clip_range)
        means = {"clip_fraction": outside_clip(log_ratio_B.detach(), self.clip_range).float()}
        for name, beta in penalties.items():
            distance_B = mean_square(v - anchors[name])
            loss_B = loss_B + beta * distance_B
            means["kl" if name == "reference" else f"distance_to_{name}"] = distance_B.detach()
        return Loss(loss_B, means, {"ratio_max_deviation": log_ratio_B.detach().expm1().abs()})

    def _penalties(self) -> dict[str, float]:
        """The weight of the distance to each kind of other weights."""
        return {"reference": self.settings.kl_beta, "average": self.settings.average_beta}

    def _log_prob(self, noised: NoisedLatents, v: Tensor) -> Tensor:
        weighting = _WEIGHTINGS[self.settings.weighting]
        return -weighting(noised.error(v), noised.levels.sigma, self.settings.huber_power)
