"""Curves of a measure over what was spent, for the benchmarks that ask how soon a level is reached."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

Curve = Sequence[tuple[float, float]]
"""Points in their order: what was spent, in any unit, and the measure."""


def smoothed(curve: Curve) -> list[tuple[float, float]]:
    """Means of each measure with its neighbours, so that a lucky evaluation does not count.

    The first one, before any training, stays as it is.
    """
    values = [value for _, value in curve]
    return [(at, fmean(values[i - 1 : i + 2]) if i else values[0]) for i, (at, _) in enumerate(curve)]


def reached_at(curve: Curve, level: float) -> float | None:
    """What was spent when the smoothed curve reaches a level, interpolated; None where it does not."""
    for (a, low), (b, high) in pairwise(smoothed(curve)):
        if high >= level:
            share = (level - low) / (high - low) if high > low else 1.0
            return a + (b - a) * max(0.0, share)
    return None
