"""Keyed noise: a function of (seed, iteration, prompt slot, member, step), never of the batch.

A trajectory's noise does therefore not depend on pruning, on microbatches or on the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INITIAL = -1  # the step number of the initial noise

_MASK = (1 << 64) - 1


def mix(*keys: int) -> int:
    """A well-mixed 63-bit seed from integers (splitmix64's finaliser over each key in turn)."""
    state = 0x9E3779B97F4A7C15
    for key in keys:
        state = (state ^ (key & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


@dataclass(frozen=True)
class NoiseKey:
    """The key of an iteration's noise."""

    seed: int
    iteration: int

    def draw(self, slot_N: Tensor, member_N: Tensor, step: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 (N, *shape), drawn on the CPU so that every device sees the same."""
        out = torch.empty(len(slot_N), *shape)
        generator = torch.Generator()
        for row, slot, member in zip(out, slot_N.tolist(), member_N.tolist(), strict=True):
            row.normal_(generator=generator.manual_seed(mix(self.seed, self.iteration, slot, member, step)))
        return out

    def group_seeds(self, slot_P: Tensor, step: int) -> Tensor:
        """One int64 seed per group, for selectors that draw."""
        return torch.tensor([mix(self.seed, self.iteration, slot, -1, step) for slot in slot_P.tolist()])
