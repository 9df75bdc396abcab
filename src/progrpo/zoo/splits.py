"""The prompts of a built-in world: their split into training, validation and test, and the choice of some."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from progrpo.types import Prompt

SPLITS = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
"""The first and the last share of each split, in the order of hashes."""


def part_of(keys: Iterable[str], split: str) -> list[str]:
    """The keys of a split, in the order of their hashes. A key belongs to one split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    low, high = SPLITS[split]
    ordered = sorted(keys, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    return ordered[round(low * len(ordered)) : round(high * len(ordered))]


def in_turn(table: Mapping[str, Sequence[Prompt]], count: int, seed: int) -> list[Prompt]:
    """Sample `count` prompts of a table by kind: the kinds in turn, and within a kind without repeats until all have
    been used.
    """
    rng = np.random.default_rng([seed, 1])
    kinds = list(table)
    queues: dict[str, list[Prompt]] = {kind: [] for kind in kinds}
    out = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        if not queues[kind]:
            queues[kind] = [table[kind][j] for j in rng.permutation(len(table[kind]))]
        out.append(queues[kind].pop())
    return out
