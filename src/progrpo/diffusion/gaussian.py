"""Densities of a stochastic step, whose x_next is drawn from a Gaussian with one std for all its dims.

Everything is a MEAN over the dims of a sample, never a sum: a log-ratio is the true one divided by the number of dims.
Every published clip range (1e-4, 1e-5) and KL coefficient assumes it, in Flow-GRPO, DanceGRPO and their descendants.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of x under N(mean, std^2), mean over all dims but the first: (B,), in float32 at least.

    x and mean have the shape (B, ...); std is of shape () or (B, 1, ...) and above 0 (a step with std 0 has no density,
    so callers do not ask). Callers detach x: the gradient is meant to reach the policy through the mean alone, and an
    attached x = mean + std z would cancel it.
    """
    x, mean, std = _wide(x), _wide(mean), _wide(std)
    density = -0.5 * ((x - mean) / std).square() - std.log() - _LOG_SQRT_2PI
    return density.flatten(1).mean(1)


def kl(mean: Tensor, mean_ref: Tensor, scale: Tensor) -> Tensor:
    """(mean - mean_ref)^2 / (2 scale^2), mean over all dims but the first: (B,), in float32 at least.

    With the step's std as scale (2 s^2 h) it is the exact KL divergence, per dim, of two Gaussians of that std. With
    the diffusion rate as scale (2 s^2) it is the form of flow_grpo's published configurations. At ten steps h is about
    0.1, so their coefficients differ about tenfold: a beta of 0.04 for the rate goes with 0.004 for the std. Never mix
    the pairs. scale is of shape () or (B, 1, ...) and above 0.
    """
    mean, mean_ref, scale = _wide(mean), _wide(mean_ref), _wide(scale)
    return 0.5 * ((mean - mean_ref) / scale).square().flatten(1).mean(1)


def mean_square(difference: Tensor) -> Tensor:
    """The mean square over all dims but the first: (B,), in float32 at least.

    For velocities it is the flow-matching loss.
    """
    return _wide(difference).square().flatten(1).mean(1)
