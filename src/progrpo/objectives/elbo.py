"""The ELBO policy gradient (EPG, arXiv 2602.04663): a likelihood of the final sample alone, and no clipping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from progrpo.diffusion.gaussian import mean_square
from progrpo.objectives.base import Experience, Loss
from progrpo.objectives.forward_process import Draws, NoisedLatents
from progrpo.objectives.settings import ELBOSettings
from progrpo.policies.base import Policy

_NEAR_CLEAN = 1e-3  # added to the noise level that path_kl divides by; the authors' own


def _velocity_error(noised: NoisedLatents, output: Tensor) -> Tensor:
    return noised.velocity_weight * noised.error(output)


def _path_kl(noised: NoisedLatents, output: Tensor) -> Tensor:
    t_B = noised.levels.sigma / (noised.levels.alpha + noised.levels.sigma)
    return (1 - t_B) / (t_B + _NEAR_CLEAN) * _velocity_error(noised, output)


_WEIGHTINGS: dict[str, Callable[[NoisedLatents, Tensor], Tensor]] = {
    "adaptive": NoisedLatents.normalised_error,
    "simple": _velocity_error,
    "path_kl": _path_kl,
}


@dataclass(frozen=True)
class ELBO:
    """REINFORCE with the log-likelihood l = -w(t) |v - (eps - x0)|^2 of a final sample x0, by its ELBO.

    The loss is -r A l, where r = exp(l - l_old) is held constant. l_old is that of `old`, the average of the weights
    that also samples, at the same noise. r is the importance ratio, and nothing clips it.

    Means over dims stand for sums. t = sigma / (alpha + sigma) is a flow model's noise level, and a diffusion model's
    errors are converted to those of its velocity. `weighting` names w: `path_kl`, (1 - t) / (t + 0.001), is the bound's
    own. `simple` is 1. `adaptive` is t^2 over the mean absolute error of the predicted x0, held constant, as in
    DiffusionNFT. `kl_beta` weighs the mean square distance of outputs to the reference.

    AWM has the same likelihood with a clipped ratio to the weights before the first update, other weights of levels,
    and a penalty on the distance to an average.
    """

    settings: ELBOSettings
    Settings: ClassVar = ELBOSettings

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
        log_prob_B = self._log_prob(noised, v)
        ratio_B = (log_prob_B.detach() - self._log_prob(noised, v_old)).exp()
        loss_B = -ratio_B * noised.advantages * log_prob_B
        means = {"distance_to_old": mean_square(v.detach() - v_old)}
        if v_ref is not None:
            kl_B = mean_square(v - v_ref)
            loss_B = loss_B + self.settings.kl_beta * kl_B
            means["kl"] = kl_B.detach()
        return Loss(loss_B, means, {"ratio_to_old": (ratio_B - 1).abs()})

    def _log_prob(self, noised: NoisedLatents, v: Tensor) -> Tensor:
        return -_WEIGHTINGS[self.settings.weighting](noised, v)
