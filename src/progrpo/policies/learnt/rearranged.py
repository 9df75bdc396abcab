"""Tensors whose numbers are those of another, in another order: how the order is found, and how it is applied.

Pure functions of tensors. What a pipeline does to latents on the way to its network and back is mostly of this kind:
it packs, adds axes, cuts, turns the sign, and puts other numbers beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BASE = 16  # a digit times a scale plus an offset is told from its neighbours even in bfloat16


def probes(size: int) -> Tensor:
    """The values (K, size) by which a rearrangement of `size` numbers is read.

    They are zeros, ones, random numbers, and the digits of places.
    """
    place_N = torch.arange(size)
    digits: list[Tensor] = []
    rest = place_N
    while not digits or rest.any():
        digits.append(rest % _BASE)
        rest = rest // _BASE
    # of seven bits, which every dtype holds
    random_N = torch.randint(-127, 128, (size,), generator=torch.Generator().manual_seed(0)) / 128
    return torch.stack([torch.zeros(size), torch.ones(size), random_N, *(digit.float() for digit in digits)])


@dataclass(frozen=True, eq=False)
class Rearranged:
    """Numbers (M,) of which each is a factor times one of N others plus an offset; a place of -1 is of none."""

    place_M: Tensor
    factor_M: Tensor
    offset_M: Tensor

    @property
    def touched_M(self) -> Tensor:
        return self.place_M >= 0

    def is_permutation(self, size: int) -> bool:
        """Whether each of `size` numbers stands in exactly one place."""
        return torch.equal(self.place_M.sort().values, torch.arange(size))


def read(probes_KN: Tensor, responses_KM: Tensor) -> Rearranged | None:
    """The rearrangement that turns `probes` into these responses; None where it is something else."""
    exact = responses_KM.dtype in (torch.float32, torch.float64)
    zero_M, one_M, random_M, *digits_M = responses_KM.double().cpu()
    factor_M = one_M - zero_M
    touched_M = factor_M != 0
    safe_M = factor_M.where(touched_M, 1.0)
    place_M = torch.zeros_like(zero_M)
    for power, response_M in enumerate(digits_M):
        digit_M = (response_M - zero_M) / safe_M
        if not ((digit_M - digit_M.round()).abs() < 0.3).all() or digit_M[~touched_M].any():
            return None
        place_M += digit_M.round() * _BASE**power
    if (place_M < 0).any() or (place_M >= probes_KN.shape[1]).any():
        return None
    expected_M = factor_M * probes_KN[2].double()[place_M.long()] + zero_M
    if not torch.allclose(random_M, expected_M, rtol=0, atol=(1e-4 if exact else 0.05) * float(factor_M.abs().max())):
        return None
    place_M[~touched_M] = -1
    return Rearranged(place_M.long(), factor_M, zero_M)


def in_order(x_BN: Tensor, place_M: Tensor) -> Tensor:
    """Numbers (B, M) of x at places; a view where they are its first."""
    size = len(place_M)
    if size <= x_BN.shape[1] and torch.equal(place_M, torch.arange(size, device=place_M.device)):
        return x_BN[:, :size]
    return x_BN.index_select(1, place_M)


def inverse(place_N: Tensor) -> Tensor:
    """The permutation that undoes another."""
    return torch.empty_like(place_N).scatter_(0, place_N, torch.arange(len(place_N), device=place_N.device))
