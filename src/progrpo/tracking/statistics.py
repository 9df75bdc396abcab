"""Statistics of rewards and evaluations, with numpy, and scipy for quantiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


def ranks(values: ArrayLike) -> np.ndarray:
    """The ranks from 1, with the average rank for ties."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a: Sequence[float | None] | np.ndarray, b: Sequence[float | None] | np.ndarray) -> float | None:
    """Spearman's rank correlation of two equally long lists, with the average rank for ties.

    Pairs with a missing value (NaN or None) are dropped. The result is None if fewer than two pairs are left or one
    side is constant. ValueError if the lengths differ.
    """
    x, y = (np.asarray(values, dtype=np.float64).ravel() for values in (a, b))
    if x.shape != y.shape:
        raise ValueError(f"spearman needs two lists of one length, not {len(x)} and {len(y)}")
    present = ~(np.isnan(x) | np.isnan(y))
    rank_a, rank_b = ranks(x[present]), ranks(y[present])
    if len(rank_a) < 2 or np.ptp(rank_a) == 0 or np.ptp(rank_b) == 0:
        return None
    return float(np.clip(np.corrcoef(rank_a, rank_b)[0, 1], -1.0, 1.0))


def hit_rate(scores: ArrayLike, truth: ArrayLike, keep: int) -> float | None:
    """The share of the ceil(keep / 2) best and floor(keep / 2) worst by `truth` that `scores` put at the same end.

    Pairs with a missing value are dropped. The result is None if fewer than `keep` are left or one side is constant.
    Ties are ordered by position.
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    present = ~(np.isnan(x) | np.isnan(y))
    x, y = x[present], y[present]
    if len(x) < max(keep, 2) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    by_x, by_y = np.argsort(x, kind="stable"), np.argsort(y, kind="stable")
    low, high = keep // 2, keep - keep // 2
    hits = len(np.intersect1d(by_x[:low], by_y[:low])) + len(np.intersect1d(by_x[-high:], by_y[-high:]))
    return hits / keep


def standardised(values: Sequence[float | None] | np.ndarray) -> np.ndarray | None:
    """The values less their mean, over their population standard deviation, NaN where missing. None if all are equal.

    Fewer than two values count as equal.
    """
    observed = np.asarray(values, dtype=np.float64)
    observed = np.where(np.isfinite(observed), observed, np.nan)
    present = observed[~np.isnan(observed)]
    return (observed - present.mean()) / present.std() if len(present) > 1 and np.ptp(present) > 0 else None


def kept_variance(values: Sequence[float | None] | np.ndarray, members: Sequence[int]) -> float | None:
    """The variance of these members' values in units of the variance of all, both population variances.

    Missing values are left out. The result is None if all values are equal, or if no member has one.
    """
    units = standardised(values)
    if units is None:
        return None
    kept = units[list(members)]
    kept = kept[~np.isnan(kept)]
    return float(kept.var()) if len(kept) else None


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error and the number of values."""

    value: float
    error: float
    count: int


def share(values: Iterable[bool | None]) -> Mean | None:
    """The share of True, without None values, with its standard error sqrt(p (1 - p) / n). None for no values."""
    known = [bool(v) for v in values if v is not None]
    if not known:
        return None
    p = sum(known) / len(known)
    return Mean(p, float(np.sqrt(p * (1 - p) / len(known))), len(known))


def mean_of(values: ArrayLike) -> Mean:
    """The mean with its standard error, which is NaN for a single value."""
    observed = np.asarray(values, dtype=np.float64)
    count = len(observed)
    error = float(observed.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
    return Mean(float(observed.mean()), error, count)


def paired_difference(before: ArrayLike, after: ArrayLike) -> Mean:
    """The mean of after - before over pairs, with the standard error of these differences."""
    return mean_of(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64))


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % confidence interval, value - half .. value + half. `half` is NaN if it is not known."""

    value: float
    half: float


def interval(mean: Mean) -> Interval:
    """Student's interval of a mean."""
    return Interval(mean.value, _t(mean.count - 1) * mean.error)


def difference_of_means(a: Mean, b: Mean) -> Interval:
    """Welch's interval of b - a, for means of separate samples with variances of their own."""
    variance_a, variance_b = a.error**2, b.error**2
    variance = variance_a + variance_b
    if not variance > 0:  # no spread, or a single value, whose error is NaN
        return Interval(b.value - a.value, variance)
    freedom = variance**2 / (variance_a**2 / (a.count - 1) + variance_b**2 / (b.count - 1))
    return Interval(b.value - a.value, float(_t(freedom) * np.sqrt(variance)))


def _t(freedom: float) -> float:
    """The 97.5 % quantile of Student's distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))
