"""Advantage weighted matching, AWM (arXiv 2509.25050): policy gradient with the flow-matching loss for a log-probability."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from progrpo.diffusion.gaussian import mean_square
from progrpo.objectives.base import Experience, Loss
from progrpo.objectives.forward_process import Draws, Noised, noted
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
    """The "log-probability" of an item is minus its flow-matching loss e, weighted by its noise level t.

    `weighting`: e, t e, t^2 e; ghuber, t ((e + 1e-10)^p - 1e-10^p) / p with p = `huber_power`; huber, half of it at p = 1/2.
    Advantages are clipped to +-`adv_clip_max` and multiplied by `adv_scale`. Two pulls hold the policy: `kl_beta` times the mean
    square distance of velocities to the reference, `average_beta` times that to an average of the weights over time, of decay
    min(`average_ramp` n, `average_limit`) after the n-th iteration.

    The authors' public configurations for SD3.5 have ghuber, a clip of 5 with a scale of 1/5, and a ramp of 0.001; defaults are
    Flow-Factory's configuration for it, but for the weighting.
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
        """The old log-probabilities. With one update they are the current ones without gradient: nothing is computed twice."""
        if updates == 1:
            return experience
        return experience.noting(
            noted(policy, experience, self._draws, microbatch, lambda at: self._log_prob(at, at.predict(policy)))
        )

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        at = Noised.gather(policy, experience, items_B, self._draws)
        pulls = {name: beta for name, beta in self._pulls() if beta > 0}
        held = {name: at.predict_with(policy, name) for name in pulls}
        v = at.predict(policy)
        log_prob_B = self._log_prob(at, v)
        before = experience.before_ND
        old_B = log_prob_B.detach() if before is None else before[at.rows, at.draw].to(log_prob_B)
        log_ratio_B = log_prob_B - old_B
        loss_B = clipped_surrogate(log_ratio_B, self.settings.adv_scale * at.advantages, self.clip_range)
        means = {"clip_fraction": outside_clip(log_ratio_B.detach(), self.clip_range).float()}
        for name, beta in pulls.items():
            distance_B = mean_square(v - held[name])
            loss_B = loss_B + beta * distance_B
            means["kl" if name == "reference" else f"distance_to_{name}"] = distance_B.detach()
        return Loss(loss_B, means, {"ratio_max_deviation": log_ratio_B.detach().expm1().abs()})

    def _pulls(self) -> tuple[tuple[str, float], ...]:
        return ("reference", self.settings.kl_beta), ("average", self.settings.average_beta)

    def _log_prob(self, at: Noised, v: Tensor) -> Tensor:
        return -_WEIGHTINGS[self.settings.weighting](at.error(v), at.levels.sigma, self.settings.huber_power)
