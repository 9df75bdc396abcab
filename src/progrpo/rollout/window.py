"""Windows of stochastic steps: the SDE inside, the ODE elsewhere. Standard library only."""

from __future__ import annotations

import random
from collections.abc import Callable


def window(kind: str, iteration: int, *, size: int, end: int, interval: int, seed: int) -> range:
    """The zero-based steps of an iteration's window: `size` consecutive ones within 0 .. `end` - 1.

    `first` is always at the start. `sliding` moves on by one step every `interval` iterations, and from the end back to
    the start (MixGRPO, arXiv 2507.21802). `random` is drawn for each iteration: a function of its number and `seed`, so
    equal on all processes.
    """
    last = end - size
    assert last >= 0, "a window must fit"
    first = WINDOWS[kind](iteration, last, interval, seed)
    return range(first, first + size)


def last_start(kind: str, *, size: int, end: int) -> int:
    """The last zero-based step at which a window begins in any iteration; 0 for a kind that is no window."""
    return end - size if kind in WINDOWS and kind != "first" else 0


WINDOWS: dict[str, Callable[[int, int, int, int], int]] = {
    "first": lambda iteration, last, interval, seed: 0,
    "sliding": lambda iteration, last, interval, seed: iteration // interval % (last + 1),
    "random": lambda iteration, last, interval, seed: random.Random(f"{seed} {iteration}").randint(0, last),
}
"""The first step of a window: a function of the iteration, the last first step, `interval` and `seed`."""
