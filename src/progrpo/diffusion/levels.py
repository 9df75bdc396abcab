"""Noise levels: the shares of data and noise in a latent, and the timestep that the network gets for them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Levels:
    """Noise levels: x = alpha x0 + sigma eps, and the network's `timestep` there.

    Each is (), (B,), or (T+1,) for a grid from noise to data. A flow model has alpha = 1 - sigma, a diffusion model
    alpha^2 + sigma^2 = 1. `ends` (T,) belong to a grid whose steps end elsewhere than where the next ones begin, as
    DDIM's do in diffusers; a part of a grid has none.
    """

    alpha: Tensor
    sigma: Tensor
    timestep: Tensor
    ends: Levels | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.sigma)

    def __getitem__(self, index: int | slice | Tensor) -> Levels:
        return Levels(self.alpha[index], self.sigma[index], self.timestep[index])

    def to(self, like: Tensor) -> Levels:
        """Return these levels on the device and in the dtype of `like`."""
        return Levels(self.alpha.to(like), self.sigma.to(like), self.timestep.to(like))


def end_of(levels_T1: Levels, step: int | Tensor) -> Levels:
    """The levels where steps of a grid end."""
    return levels_T1[step + 1] if levels_T1.ends is None else levels_T1.ends[step]


def stacked(*levels: Levels) -> Levels:
    """The levels (), stacked as those of a grid."""
    return Levels(
        *(torch.stack(parts) for parts in zip(*((at.alpha, at.sigma, at.timestep) for at in levels), strict=True))
    )


def over(value: Tensor, x: Tensor) -> Tensor:
    """A value for each row, or one for all, shaped to broadcast over x."""
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


def flow_levels(sigma: Tensor, num_train_timesteps: int = 1000) -> Levels:
    """A flow model's levels by its share of noise, 1 to 0."""
    return Levels(1 - sigma, sigma, sigma * num_train_timesteps)


def between_flow_levels(levels_T1: Levels, place_B: Tensor, num_train_timesteps: int = 1000) -> Levels:
    """Levels (B,) at places in [0, T] of a grid (float64): place 1.5 has the sigma halfway between the grid's."""
    below_B = place_B.long().clamp(max=len(levels_T1) - 2)
    sigmas = levels_T1.sigma.double()
    sigma_B = torch.lerp(sigmas[below_B], sigmas[below_B + 1], place_B - below_B)
    return flow_levels(sigma_B.to(levels_T1.sigma), num_train_timesteps)


def diffusion_levels(timestep: Tensor, alphas_cumprod: Tensor, final: Tensor | None = None) -> Levels:
    """A diffusion model's levels by integer timesteps of its training noise (DDPM, arXiv 2006.11239).

    `alphas_cumprod` (N,) is the product of 1 - beta. `final` (), if given, is that of one more level, at the end, which
    has timestep 0.
    """
    signal = alphas_cumprod[timestep.long()]
    if final is not None:
        signal = torch.cat([signal, final.reshape(1).to(signal)])
        timestep = torch.cat([timestep, timestep.new_zeros(1)])
    return Levels(signal.sqrt(), (1 - signal).sqrt(), timestep.to(signal.dtype))


def between_diffusion_levels(levels_T1: Levels, place_B: Tensor, alphas_cumprod: Tensor) -> Levels:
    """Levels (B,) at places in [0, T] of a grid: the nearest timestep that the model was trained on."""
    below_B = place_B.long().clamp(max=len(levels_T1) - 2)
    timesteps = levels_T1.timestep.double()
    timestep = torch.lerp(timesteps[below_B], timesteps[below_B + 1], place_B - below_B)
    return diffusion_levels(timestep.round().long(), alphas_cumprod)
