"""Time grids of flow models: sigma is the share of noise in x, 1 is pure noise and 0 is data."""

from __future__ import annotations

import torch
from torch import Tensor


def _shift(sigma: Tensor, shift: float) -> Tensor:
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_grid(num_inference_steps: int, shift: float = 1.0, num_train_timesteps: int = 1000) -> Tensor:
    """The T+1 noise levels of T steps, (T+1,) float32, descending from 1 to 0.

    Bit for bit what diffusers' FlowMatchEulerDiscreteScheduler(num_train_timesteps, shift) makes in `set_timesteps(T)`.
    That includes its shifting of the smallest training sigma twice (the last sigma above 0 is 0.0089 at shift 3, T 10,
    where a single shift gives 0.003) and, for shifts such as 1.18 and 1.32, a first sigma that is 1e-7 off 1.

    Raises ValueError for fewer than one step and for a shift that is not positive.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, not {num_inference_steps}")
    if shift <= 0:
        raise ValueError(f"shift must be above 0, not {shift}; 1 leaves the grid evenly spaced")
    ends = torch.tensor([num_train_timesteps, 1], dtype=torch.float32) / num_train_timesteps
    start, stop = (end * num_train_timesteps for end in _shift(ends, shift).double())
    places = torch.arange(num_inference_steps, dtype=torch.float64)
    # not torch.linspace: it counts its second half down from the end, which rounds otherwise than diffusers' grid
    timesteps = start + places * ((stop - start) / max(num_inference_steps - 1, 1))
    if num_inference_steps > 1:
        timesteps[-1] = stop
    sigmas = _shift(timesteps / num_train_timesteps, shift).float()
    return torch.cat([sigmas, sigmas.new_zeros(1)])
