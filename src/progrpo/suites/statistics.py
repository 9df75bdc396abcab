"""Statistics of a suite: intervals that know of prompts, paired tests, and the diversity of pictures.

Pictures of one prompt are not independent, so prompts are resampled and not pictures. A suite has a fixed number of
prompts of each kind, so they are resampled within their kind.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

_DRAWS = 2000
_EXACT = 14
"""The most prompts with a difference for which every assignment of signs is tried."""
_SIGNS = 10_000
_LEVEL = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` pictures with its 95 % interval, which is NaN where one prompt says nothing of others."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference over pairs of pictures from the same noise, and the p-value of no difference."""

    p: float


@dataclass(frozen=True)
class Clusters:
    """The prompts of N pictures: `cluster_N` (int64) numbers the prompts, `stratum_N` the kinds.

    With `mean_of_kinds` a mean is that of the kinds' means.
    """

    cluster_N: np.ndarray
    stratum_N: np.ndarray
    mean_of_kinds: bool = False

    @classmethod
    def of(cls, texts: Sequence[Hashable], kinds: Sequence[Hashable], mean_of_kinds: bool = False) -> Clusters:
        """The clusters of pictures whose prompts have these texts and kinds."""
        numbers = {key: n for n, key in enumerate(dict.fromkeys(zip(kinds, texts, strict=True)))}
        strata = {kind: n for n, kind in enumerate(dict.fromkeys(kinds))}
        return cls(
            np.array([numbers[key] for key in zip(kinds, texts, strict=True)], dtype=np.int64),
            np.array([strata[kind] for kind in kinds], dtype=np.int64),
            mean_of_kinds,
        )

    def take(self, rows: np.ndarray) -> Clusters:
        return Clusters(self.cluster_N[rows], self.stratum_N[rows], self.mean_of_kinds)


class _Sums:
    """The sums and counts of values by prompt, and the prompts of each kind."""

    def __init__(self, values_N: np.ndarray, clusters: Clusters) -> None:
        present_N = ~np.isnan(values_N)
        kept = clusters.take(present_N)
        numbers, first, inverse = np.unique(kept.cluster_N, return_index=True, return_inverse=True)
        self.sum_C = np.bincount(inverse, values_N[present_N], len(numbers))
        self.count_C = np.bincount(inverse, minlength=len(numbers)).astype(np.float64)
        self.stratum_C = kept.stratum_N[first]
        self.mean_of_kinds = clusters.mean_of_kinds

    @cached_property
    def strata(self) -> list[np.ndarray]:
        """The prompts of each kind."""
        return [np.flatnonzero(self.stratum_C == stratum) for stratum in np.unique(self.stratum_C)]

    def mean(self, times_BC: np.ndarray) -> np.ndarray:
        """The means (B,) of samples in which prompt c is `times_BC[b, c]` times."""
        sums_BK = np.stack([times_BC[:, c] @ self.sum_C[c] for c in self.strata], axis=1)
        counts_BK = np.stack([times_BC[:, c] @ self.count_C[c] for c in self.strata], axis=1)
        if self.mean_of_kinds:
            return (sums_BK / counts_BK).mean(1)
        return sums_BK.sum(1) / counts_BK.sum(1)

    def parts_of_mean(self) -> np.ndarray:
        """The addends (C,) of the mean, one of each prompt."""
        if not self.mean_of_kinds:
            return self.sum_C / self.count_C.sum()
        parts_C = np.empty_like(self.sum_C)
        for c in self.strata:
            parts_C[c] = self.sum_C[c] / self.count_C[c].sum() / len(self.strata)
        return parts_C

    def resampled(self, seed: int) -> np.ndarray:
        """The times (B, C) that each prompt is drawn, with replacement and within its kind."""
        rng = np.random.default_rng(seed)
        times_BC = np.zeros((_DRAWS, len(self.sum_C)))
        for c in self.strata:
            times_BC[:, c] = rng.multinomial(len(c), np.full(len(c), 1 / len(c)), size=_DRAWS)
        return times_BC


def estimate(values_N: ArrayLike, clusters: Clusters, seed: int = 0) -> Estimate | None:
    """The mean of the values that are not NaN, with the percentile interval of a bootstrap over prompts.

    None without a value.
    """
    values = np.asarray(values_N, dtype=np.float64)
    count = int((~np.isnan(values)).sum())
    return None if not count else Estimate(*_interval(_Sums(values, clusters), seed), count)


def paired(before_N: ArrayLike, after_N: ArrayLike, clusters: Clusters, seed: int = 0) -> Difference | None:
    """The mean of after - before over pairs in which neither is NaN, its interval, and a two-sided p-value.

    The test gives the difference of each prompt, with all its pictures, either sign: under no difference all signs are
    equally likely. None without a pair.
    """
    values = np.asarray(after_N, dtype=np.float64) - np.asarray(before_N, dtype=np.float64)
    count = int((~np.isnan(values)).sum())
    if not count:
        return None
    sums = _Sums(values, clusters)
    return Difference(*_interval(sums, seed), count, sign_flip_p(sums.parts_of_mean(), seed))


def _interval(sums: _Sums, seed: int) -> tuple[float, float, float]:
    value = float(sums.mean(np.ones((1, len(sums.sum_C))))[0])
    if all(len(c) < 2 for c in sums.strata):
        return value, float("nan"), float("nan")
    low, high = np.percentile(sums.mean(sums.resampled(seed)), _LEVEL)
    return value, float(low), float(high)


def sign_flip_p(parts_C: ArrayLike, seed: int = 0) -> float:
    """The two-sided p-value of the sum of these numbers under random signs.

    Every assignment of signs is tried for few numbers that are not 0. Otherwise signs are drawn, and the observed ones
    count as one draw.
    """
    parts = np.asarray(parts_C, dtype=np.float64)
    parts = parts[parts != 0]
    if not len(parts):
        return 1.0
    observed = abs(parts.sum()) * (1 - 1e-12)  # sums of the same numbers in another order differ by rounding
    if len(parts) <= _EXACT:
        bits = np.arange(2 ** len(parts))[:, None] >> np.arange(len(parts)) & 1
        return float((abs((2 * bits - 1) @ parts) >= observed).mean())
    rng = np.random.default_rng([seed, 1])
    more = 0
    for _ in range(10):  # a tenth at a time: thousands of prompts would fill the memory
        signs = 2 * rng.integers(0, 2, size=(_SIGNS // 10, len(parts)), dtype=np.int8) - 1
        more += int((abs(signs @ parts) >= observed).sum())
    return (1 + more) / (1 + _SIGNS)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979), in the order given."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted.tolist()


# --- diversity --------------------------------------------------------------------------------------------------------


def vendi(features_ND: np.ndarray) -> float:
    """The Vendi score of N pictures, 1 for equal ones and N for orthogonal ones (arXiv 2210.02410).

    It is exp(-sum l log l) over the eigenvalues l of K / N, where K holds the cosines of features. K / N has the
    eigenvalues of the D x D matrix X^T X / N, if there are fewer features than pictures.
    """
    x_ND = _unit(features_ND)
    gram = x_ND @ x_ND.T if len(x_ND) <= x_ND.shape[1] else x_ND.T @ x_ND
    values = np.linalg.eigvalsh(gram / len(x_ND))
    values = values[values > 0]
    return float(np.exp(-(values * np.log(values)).sum()))


def pairwise_distance(features_ND: np.ndarray) -> float | None:
    """The mean of 1 - cosine over pairs of different pictures; None for fewer than two."""
    count = len(features_ND)
    if count < 2:
        return None
    whole = _unit(features_ND).sum(0)
    return float(1 - (whole @ whole - count) / (count * (count - 1)))


def pairwise_square_distance(vectors_ND: np.ndarray) -> float | None:
    """The mean square distance over pairs of different rows; None for fewer than two.

    It is twice the variance: 2 sum |x - mean|^2 / (N - 1).
    """
    count = len(vectors_ND)
    if count < 2:
        return None
    apart_ND = vectors_ND - vectors_ND.mean(0, dtype=np.float64)
    return float(2 * np.square(apart_ND).sum() / (count - 1))


def _unit(features_ND: np.ndarray) -> np.ndarray:
    """The features in float64 at length 1."""
    x_ND = np.asarray(features_ND, dtype=np.float64)
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), np.finfo(np.float64).tiny)
