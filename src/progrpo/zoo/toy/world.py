"""The toy world: what its prompts ask for, the data that its model is pretrained on, and latents as pictures.

A prompt is a number, and its code (CODE standard normal numbers) follows from it. Its data have two modes around a
place that depends on the code. Rewards ask for another place, which depends on the code too: every prompt pulls
elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from progrpo.types import Prompt

SIDE = 4  # of a picture, which has a pixel for each dim
DIMS = SIDE * SIDE
CODE = 6
_SPREAD = 0.5  # the std of data within a mode
_APART = 0.25  # half the distance of the modes, in each dim
_PULL = 0.5  # the distance from a prompt's data to its target, in each dim
_REACH = 8.0  # a pixel holds a number in [-8, 8)
_LEVELS = 1 << 24


def prompts(count: int, first: int = 0) -> list[Prompt]:
    """The prompts of `count` numbers from `first` on."""
    return [Prompt(str(number), {"number": number}) for number in range(first, first + count)]


@cache
def _code(number: int) -> Tensor:
    return torch.randn(CODE, generator=torch.Generator().manual_seed(1000 + number), dtype=torch.float64)


def codes(numbers: Sequence[int]) -> Tensor:
    """The codes of prompts: standard normal, float64 (P, CODE)."""
    return torch.stack([_code(number) for number in numbers]) if numbers else torch.empty(0, CODE, dtype=torch.float64)


def _maps() -> tuple[Tensor, Tensor, Tensor]:
    """The maps of a code to the place of the data and to the pull of rewards, and the direction between the modes."""
    generator = torch.Generator().manual_seed(7)
    place, pull = torch.randn(2, CODE, DIMS, generator=generator, dtype=torch.float64) / math.sqrt(CODE)
    signs = torch.randn(DIMS, generator=generator, dtype=torch.float64).sign()
    return place, pull, signs


_PLACE, _PULL_MAP, _SIGNS = _maps()


def centres(code_PD: Tensor) -> Tensor:
    """The centre between the two modes of each code's data, float64 (P, DIMS)."""
    return torch.tanh(code_PD @ _PLACE)


def targets(code_PD: Tensor) -> Tensor:
    """The latent that rewards of each code ask for, float64 (P, DIMS): near one of the modes, and off the data."""
    mode_P1 = code_PD[:, :1].sign()
    return centres(code_PD) + _APART * mode_P1 * _SIGNS + _PULL * torch.tanh(2 * code_PD @ _PULL_MAP)


def data(code_ND: Tensor, generator: torch.Generator) -> Tensor:
    """One draw of the data of each code, float64 (N, DIMS)."""
    mode_N1 = torch.randn(len(code_ND), 1, generator=generator, dtype=torch.float64).sign()
    noise = torch.randn(len(code_ND), DIMS, generator=generator, dtype=torch.float64)
    return centres(code_ND) + _APART * mode_N1 * _SIGNS + _SPREAD * noise


def to_pictures(x_ND: Tensor) -> Tensor:
    """Latents as pictures, uint8 (N, SIDE, SIDE, 3): a pixel is a number in fixed point, its high byte first."""
    whole = ((x_ND.double().clamp(-_REACH, _REACH) + _REACH) / (2 * _REACH) * _LEVELS).round()
    whole = whole.clamp(max=_LEVELS - 1).long()
    return torch.stack([whole >> 16, whole >> 8 & 255, whole & 255], dim=-1).to(torch.uint8).reshape(-1, SIDE, SIDE, 3)


def from_pictures(pictures_NHWC: np.ndarray) -> Tensor:
    """The latents of pictures, float64 (N, DIMS)."""
    high, middle, low = torch.as_tensor(pictures_NHWC).double().flatten(1, 2).unbind(-1)
    return (high * 65536 + middle * 256 + low) / _LEVELS * 2 * _REACH - _REACH
