"""Keyed noise: a function of (seed, iteration, prompt slot, member, step), never of the batch.

A trajectory's noise does therefore not depend on pruning, on microbatches or on the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

INITIAL = -1  # the step number of the initial noise

_MASK = (1 << 64) - 1


def mix(*keys: int) -> int:
    """A well-mixed 63-bit seed from integers (splitmix64's finaliser over each key in turn)."""
    return mix_rows(*keys)[0]


def mix_rows(*keys: int | Tensor) -> list[int]:
    """The seeds of N rows; a key is one integer for all rows, or int64 (N,)."""
    state_N = np.full(1, 0x9E3779B97F4A7C15, dtype=np.uint64)
    for key in keys:  # sums and products of uint64 arrays are taken modulo 2^64
        key_N = key.numpy().astype(np.uint64) if isinstance(key, Tensor) else np.uint64(key & _MASK)
        state_N = (state_N ^ key_N) + np.uint64(0x9E3779B97F4A7C15)
        state_N = (state_N ^ (state_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state_N = (state_N ^ (state_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state_N = state_N ^ (state_N >> np.uint64(31))
    seeds: list[int] = (state_N >> np.uint64(1)).tolist()
    return seeds


@dataclass(frozen=True)
class NoiseKey:
    """The key of an iteration's noise."""

    seed: int
    iteration: int

    def draw(self, slot_N: Tensor, member_N: Tensor, step: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 (N, *shape), drawn on the CPU so that every device sees the same.

        ValueError where slots and members are not as many.
        """
        if len(slot_N) != len(member_N):  # one of either would be taken for all
            raise ValueError(f"{len(slot_N)} slots for {len(member_N)} members")
        out = torch.empty(len(slot_N), *shape)
        generator = torch.Generator()
        for row, seed in zip(out, mix_rows(self.seed, self.iteration, slot_N, member_N, step), strict=True):
            row.normal_(generator=generator.manual_seed(seed))
        return out

    def group_seeds(self, slot_P: Tensor, step: int) -> Tensor:
        """One int64 seed per group, for selectors that draw."""
        return torch.tensor(mix_rows(self.seed, self.iteration, slot_P, -1, step))
