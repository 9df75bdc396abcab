"""The steps of a flow model: x = (1 - sigma) x0 + sigma eps, and the network's output v estimates eps - x0.

Pure functions. x and v have the shape (B, ...); sigma, sigma_next and rate are tensors of shape () or (B,). A step goes
from sigma to sigma_next < sigma and its length is h = sigma - sigma_next > 0. Nothing is cast here: float64 stays
float64, and the callers hand over float32 whatever the network ran in, because a step in bfloat16 loses h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from progrpo.diffusion.levels import over

_ONE = 1 - 1e-6  # rounding starts the grid of some shifts 1e-7 off 1, either side; no second sigma comes this close


def x0_from_velocity(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The data that x points to, x - sigma v: the one-step ODE projection that previews decode."""
    return x - over(sigma, x) * v


def eps_from_velocity(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The noise that x points to, x + (1 - sigma) v."""
    return x + (1 - over(sigma, x)) * v


def ode_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One Euler step, in the order of operations of diffusers' scheduler, so that both agree bit for bit."""
    return x + over(sigma_next - sigma, x) * v


def flow_grpo_rate(sigma: Tensor, noise_level: float, sigma_one: Tensor) -> Tensor:
    """Flow-GRPO's diffusion rate a sqrt(sigma / (1 - sigma)) (arXiv 2505.05470), in noise per square root of sigma.

    `noise_level` is a. At sigma 1 (but for rounding) the denominator would vanish: there, and only there, `sigma_one`,
    the second sigma of the grid, stands in for sigma below, which makes the first step's std a.
    """
    return noise_level * torch.sqrt(sigma / (1 - torch.where(sigma > _ONE, sigma_one, sigma)))


def sde_mean_std(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of x_next for one stochastic step of any diffusion rate.

    mean = x - h v + rate^2 h / 2 * score with the score -eps / sigma, std = rate sqrt(h): an Euler step of the
    reverse-time SDE that has the ODE's marginals whatever the rate. `flow_grpo_rate` makes it Flow-GRPO's step (arXiv
    2505.05470), a constant rate DanceGRPO's (arXiv 2505.07818), and rate 0 `ode_step` itself, bit for bit. sigma must
    be above 0.

    Returns the mean in x's shape and the std of shape () or (B, 1, ...), which broadcasts over it.
    """
    h = sigma - sigma_next
    pull = rate.square() * h / (2 * sigma)
    mean = ode_step(x, v, sigma, sigma_next) - over(pull, x) * eps_from_velocity(x, v, sigma)
    return mean, over(rate * h.sqrt(), x)
