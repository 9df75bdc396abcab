"""The meaning of a network's output: four parametrisations, each by its name in diffusers.

Pure functions of x (B, ...), the network's output there, and its noise levels, of shape () or (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from progrpo.diffusion.flow import eps_from_velocity, ode_step, x0_from_velocity
from progrpo.diffusion.levels import Levels, over


@dataclass(frozen=True)
class Prediction:
    """A parametrisation of a network's output.

    `x0` and `eps` read the output at x, and `target(x0, eps, levels)` is its training target. `mix(x0, eps, levels)` is
    the noised x, and `step(x, output, levels, next)` the deterministic step, in the order of operations of diffusers'
    scheduler. `velocity_weight(levels)`, of the levels' shape, times a squared error of the output is the squared error
    of the velocity eps - x0 that a flow model has at this share of noise.
    """

    x0: Callable[[Tensor, Tensor, Levels], Tensor]
    eps: Callable[[Tensor, Tensor, Levels], Tensor]
    target: Callable[[Tensor, Tensor, Levels], Tensor]
    mix: Callable[[Tensor, Tensor, Levels], Tensor]
    step: Callable[[Tensor, Tensor, Levels, Levels], Tensor]
    velocity_weight: Callable[[Levels], Tensor]


def _combine(x0: Tensor, eps: Tensor, at: Levels) -> Tensor:
    return over(at.alpha, x0) * x0 + over(at.sigma, x0) * eps


def _diffusion(
    x0: Callable[[Tensor, Tensor, Levels], Tensor],
    eps: Callable[[Tensor, Tensor, Levels], Tensor],
    target: Callable[[Tensor, Tensor, Levels], Tensor],
    velocity_weight: Callable[[Levels], Tensor],
) -> Prediction:
    """The parametrisation of a diffusion model, whose deterministic step is DDIM's (arXiv 2010.02502)."""
    return Prediction(
        x0=x0,
        eps=eps,
        target=target,
        mix=_combine,
        step=lambda x, out, at, after: _combine(x0(x, out, at), eps(x, out, at), after),
        velocity_weight=velocity_weight,
    )


PREDICTIONS: dict[str, Prediction] = {
    # v = eps - x0 of a flow model (arXiv 2210.02747)
    "flow": Prediction(
        x0=lambda x, v, at: x0_from_velocity(x, v, at.sigma),
        eps=lambda x, v, at: eps_from_velocity(x, v, at.sigma),
        target=lambda x0, eps, at: eps - x0,
        mix=lambda x0, eps, at: torch.lerp(x0, eps, over(at.sigma, x0)),
        step=lambda x, v, at, after: ode_step(x, v, at.sigma, after.sigma),
        velocity_weight=lambda at: torch.ones_like(at.sigma),
    ),
    # the noise (DDPM, arXiv 2006.11239)
    "epsilon": _diffusion(
        x0=lambda x, e, at: (x - over(at.sigma, x) * e) / over(at.alpha, x),
        eps=lambda x, e, at: e,
        target=lambda x0, eps, at: eps,
        velocity_weight=lambda at: ((at.alpha + at.sigma) / at.alpha).square(),
    ),
    # v = alpha eps - sigma x0 (progressive distillation, arXiv 2202.00512)
    "v_prediction": _diffusion(
        x0=lambda x, v, at: over(at.alpha, x) * x - over(at.sigma, x) * v,
        eps=lambda x, v, at: over(at.alpha, x) * v + over(at.sigma, x) * x,
        target=lambda x0, eps, at: over(at.alpha, x0) * eps - over(at.sigma, x0) * x0,
        velocity_weight=lambda at: (at.alpha + at.sigma).square(),
    ),
    # the data itself
    "sample": _diffusion(
        x0=lambda x, x0, at: x0,
        eps=lambda x, x0, at: (x - over(at.alpha, x) * x0) / over(at.sigma, x),
        target=lambda x0, eps, at: x0,
        velocity_weight=lambda at: ((at.alpha + at.sigma) / at.sigma).square(),
    ),
}
