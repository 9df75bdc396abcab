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
    """The values (K, size) by which a rearrangement of `size` numbers is read: zeros, ones, and digits of places."""
    place_N = torch.arange(size)
    digits: list[Tensor] = []
    rest = place_N
    while not digits or rest.any():
        digits.append(rest % _BASE)
        rest = rest // _BASE
    return torch.stack([torch.zeros_like(place_N), torch.ones_like(place_N), *digits]).float()


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


def read(responses_KM: Tensor) -> Rearranged | None:
    """What came of `probes`, as a rearrangement; None where it is something else."""
    responses_KM = responses_KM.double().cpu()
    zero_M, one_M, *digits_M = responses_KM
    factor_M = one_M - zero_M
    touched_M = factor_M != 0
    safe_M = factor_M.where(touched_M, 1.0)
    place_M = torch.zeros_like(zero_M)
    for power, response_M in enumerate(digits_M):
        digit_M = (response_M - zero_M) / safe_M
        if not ((digit_M - digit_M.round()).abs() < 0.3).all() or digit_M[~touched_M].any():
            return None
        place_M += digit_M.round() * _BASE**power
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
