"""Steps that keep the marginals: given x0 and eps, x_next has the noise of its level, some of it old and some fresh.

    mean = alpha' x0 + sqrt(sigma'^2 - std^2) eps,   x_next = mean + std z

One kernel, for flow and diffusion models alike, and three ways to say how much is fresh: DDIM's eta, CPS's angle and
Precise's share of the change in log SNR.
Pure functions; levels are of shape () or (B,), primed ones are the step's end, and nothing is cast here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from progrpo.diffusion.levels import Levels, over


def ddim_std(at: Levels, after: Levels, eta: float) -> Tensor:
    """DDIM's std (arXiv 2010.02502), of the levels' shape: eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2).

    In a diffusion model that is eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a') with a = alpha^2. At eta 1 it is the std
    of x_next given x and x0, DDPM's ancestral step; at 0 the step is deterministic. alpha' must be above 0.
    """
    kept = at.alpha * after.sigma / (after.alpha * at.sigma)
    return eta * after.sigma * (1 - kept.square()).clamp(min=0).sqrt()


def cps_std(after: Levels, noise_level: float) -> Tensor:
    """Coefficient-preserving sampling's std (CPS, arXiv 2509.05952): sigma' sin(noise_level pi / 2).

    It is 0 at the data's end.
    """
    return after.sigma * math.sin(noise_level * math.pi / 2)


def precise_std(at: Levels, after: Levels, noise_level: float) -> Tensor:
    """Precise's std (arXiv 2605.23522), of the levels' shape: sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^(a^2)).

    It makes the step the exact solution of an SDE whose x0 is held constant over the step. Of x = alpha x0 + sigma eps
    only eps moves then: d eps = -(g / sigma)^2 / 2 eps dt + (g / sigma) dw keeps N(0, 1) at any rate g. Precise takes
    g^2 dt = (a sigma)^2 d(log SNR) / 2, with SNR = (alpha / sigma)^2, so that eps' has the correlation
    exp(-a^2 / 4 times the change of log SNR) with eps. On a flow model g is Flow-GRPO's rate a sqrt(sigma / alpha).

    At a = sqrt(2) it is DDIM's at eta 1, at 0 the step is deterministic, and from pure noise all noise is fresh. alpha'
    must be above 0. The exponent is that of the authors' public code.
    """
    kept = at.alpha * after.sigma / (after.alpha * at.sigma)
    kept = kept.clamp(0, 1)  # a grid may begin a rounding error beyond pure noise, where it is below 0
    return after.sigma * (1 - kept**noise_level**2).sqrt()


def preserving_mean(x0: Tensor, eps: Tensor, after: Levels, std: Tensor) -> Tensor:
    """The mean of x_next; `std` is of shape () or (B,) and at most sigma'."""
    old = (after.sigma.square() - std.square()).clamp(min=0).sqrt()
    return over(after.alpha, x0) * x0 + over(old, x0) * eps


def reduced_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """CPS's published -(x - mean)^2, mean over all dims but the first: (B,).

    It is no density: a log-ratio of it is the Gaussian's times 2 std^2. So it has another clip range, and steps of
    little noise count little.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return -(x.to(wide) - mean.to(wide)).square().flatten(1).mean(1)
