"""Stochastic steps: two kernels with several scales of noise, and one log-prob that is no density."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from progrpo.diffusion.ddim import cps_std, ddim_std, precise_std, preserving_mean, reduced_log_prob
from progrpo.diffusion.facts import PRESERVING, REDUCED, SDE, StepFacts
from progrpo.diffusion.flow import flow_grpo_rate, sde_mean_std
from progrpo.diffusion.gaussian import log_prob
from progrpo.diffusion.levels import Levels, over
from progrpo.diffusion.prediction import Prediction

_MeanStd = Callable[[Prediction, Tensor, Tensor, Levels, Levels, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StochasticStep:
    """A stochastic step of a sampler.

    `scale(levels_T1, noise_level)` gives (T,), for each step: the diffusion rate of an SDE, the std of others.
    `mean_std(prediction, x, output, levels, next, scale)` gives the Gaussian of x_next: mean in x's shape, std () or
    (B, 1, ...). `noise_level` is the published one (DDIM's is called eta), and `clip_range` the one published with it
    for latents of `clip_dims` elements.
    """

    scale: Callable[[Levels, float], Tensor]
    mean_std: _MeanStd
    noise_level: float
    clip_range: float
    clip_dims: int
    facts: StepFacts = field(default_factory=StepFacts)
    log_prob: Callable[[Tensor, Tensor, Tensor], Tensor] = log_prob

    @property
    def flow_only(self) -> bool:
        """Whether it is an SDE of flow models, with a diffusion rate."""
        return self.facts.flow_only

    def clip_range_for(self, dims: int) -> float:
        """The clip range for latents of `dims` elements.

        Log-probs are means over dims, so equal changes of the whole latent need ranges in proportion to 1 / dims.
        """
        return self.clip_range * self.clip_dims / dims


def _sde(
    prediction: Prediction, x: Tensor, v: Tensor, at: Levels, after: Levels, rate: Tensor
) -> tuple[Tensor, Tensor]:
    return sde_mean_std(x, v, at.sigma, after.sigma, rate)


def _preserving(
    prediction: Prediction, x: Tensor, output: Tensor, at: Levels, after: Levels, std: Tensor
) -> tuple[Tensor, Tensor]:
    x0, eps = prediction.x0(x, output, at), prediction.eps(x, output, at)
    return preserving_mean(x0, eps, after, std), over(std, x)


_FLOW_DIMS, _SD_DIMS = 16 * 64 * 64, 4 * 64 * 64  # of 512 px pictures, in SD3.5 and in SD1.x
_WAN_DIMS = 16 * 9 * 30 * 52  # of Wan's videos of 33 frames, 240 by 416 px

FLOW_GRPO = StochasticStep(
    scale=lambda levels, a: flow_grpo_rate(levels.sigma[:-1], a, levels.sigma[1]),
    mean_std=_sde,
    noise_level=0.7,
    clip_range=1e-4,
    clip_dims=_FLOW_DIMS,
    facts=SDE,
)
"""Flow-GRPO (arXiv 2505.05470)."""

DANCE = StochasticStep(
    scale=lambda levels, eta: eta * levels.sigma[:-1] ** 0,
    mean_std=_sde,
    noise_level=0.3,
    clip_range=1e-4,
    clip_dims=_FLOW_DIMS,
    facts=SDE,
)
"""DanceGRPO on flow models (arXiv 2505.07818): a constant rate."""

FLOW_GRPO_WAN = StochasticStep(
    scale=lambda levels, a: a * levels.sigma[1] * levels.sigma[:-1],
    mean_std=_sde,
    noise_level=1.0,
    clip_range=1e-3,
    clip_dims=_WAN_DIMS,
    facts=SDE,
)
"""The SDE of flow_grpo's script for Wan: a rate in proportion to sigma, sigma_one sigma at noise level 1."""

DDIM = StochasticStep(
    scale=lambda levels, eta: ddim_std(levels[:-1], levels[1:], eta),
    mean_std=_preserving,
    noise_level=1.0,
    clip_range=1e-4,
    clip_dims=_SD_DIMS,
    facts=PRESERVING,
)
"""DDIM with eta (arXiv 2010.02502), DanceGRPO's and DDPO's on Stable Diffusion."""

CPS = StochasticStep(
    scale=lambda levels, a: cps_std(levels[1:], a),
    mean_std=_preserving,
    noise_level=0.8,
    clip_range=1e-5,
    clip_dims=_FLOW_DIMS,
    facts=PRESERVING,
)
"""Coefficient-preserving sampling (arXiv 2509.05952) with its Gaussian's density."""

CPS_REDUCED = StochasticStep(
    scale=lambda levels, a: cps_std(levels[1:], a),
    mean_std=_preserving,
    noise_level=0.8,
    clip_range=1e-5,
    clip_dims=_FLOW_DIMS,
    facts=REDUCED,
    log_prob=reduced_log_prob,
)
"""Coefficient-preserving sampling with the published stand-in for a density."""

PRECISE = StochasticStep(
    scale=lambda levels, a: precise_std(levels[:-1], levels[1:], a),
    mean_std=_preserving,
    noise_level=1.5,
    clip_range=1e-4,
    clip_dims=_FLOW_DIMS,
)
"""Precise (arXiv 2605.23522): Flow-GRPO's SDE, solved exactly for an x0 that is held constant over the step.

Published with a guarded ratio alone. The clip range of the plain one is Flow-GRPO's.
"""
