"""Advantage weighted matching, AWM (arXiv 2509.25050): policy gradient with the flow-matching loss for a log-probability."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from progrpo.diffusion.gaussian import mean_square
from progrpo.objectives.base import Average, Experience, Loss, Needs
from progrpo.objectives.forward_process import Draws, Noised, noted
from progrpo.objectives.surrogate import clipped_surrogate, outside_clip
from progrpo.policies.base import Policy

_WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda sigma_B: sigma_B**0,
    "t": lambda sigma_B: sigma_B,
    "t2": lambda sigma_B: sigma_B.square(),
}


@dataclass(frozen=True)
class AWM:
    """The "log-probability" of an item is -w(t) times its flow-matching loss, t being its noise level.

    Two pulls hold the policy: `kl_beta` times the mean square distance of velocities to the reference, `average_beta` times
    that to an average of the weights over time.
    """

    draws: int
    time_fraction: float
    weighting: Literal["uniform", "t", "t2"] = "uniform"
    clip_range: float = 1.0
    adv_clip_max: float = 1.0
    kl_beta: float = 1e-4
    average_beta: float = 1.0
    needs: ClassVar[Needs] = "latents"
    averages: ClassVar[Mapping[str, Average]] = {"average": Average(ramp=3e-4, limit=0.3)}
    rollout_weights: ClassVar[str] = "current"

    @property
    def _draws(self) -> Draws:
        return Draws(self.draws, self.time_fraction)

    @property
    def uses_reference(self) -> bool:
        return self.kl_beta > 0

    def items_per_trajectory(self, experience: Experience) -> int:
        return self.draws

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
        loss_B = clipped_surrogate(log_ratio_B, at.advantages, self.clip_range)
        means = {"clip_fraction": outside_clip(log_ratio_B.detach(), self.clip_range).float()}
        for name, beta in pulls.items():
            distance_B = mean_square(v - held[name])
            loss_B = loss_B + beta * distance_B
            means["kl" if name == "reference" else f"distance_to_{name}"] = distance_B.detach()
        return Loss(loss_B, means, {"ratio_max_deviation": log_ratio_B.detach().expm1().abs()})

    def _pulls(self) -> tuple[tuple[str, float], ...]:
        return ("reference", self.kl_beta), ("average", self.average_beta)

    def _log_prob(self, at: Noised, v: Tensor) -> Tensor:
        return -_WEIGHTINGS[self.weighting](at.levels.sigma) * at.error(v)
