"""Statistics of suites: intervals and tests against closed forms and brute force, and diversity by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from progrpo.suites import statistics
from progrpo.suites.statistics import Clusters, holm, pairwise_distance, sign_flip_p, vendi

estimate: Any = statistics.estimate  # None where nothing was measured, which most tests here do not have
paired: Any = statistics.paired


def clusters(texts, kinds=None, mean_of_kinds=False):
    return Clusters.of(list(texts), list(kinds or ["all"] * len(texts)), mean_of_kinds)


def test_the_interval_of_independent_pictures_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, size=900)
    estimated = estimate(values, clusters(range(900)))
    error = values.std() / 30
    assert estimated.value == pytest.approx(values.mean(), abs=1e-12) and estimated.count == 900
    assert estimated.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert estimated.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_pictures_of_one_prompt_count_as_one():
    """Four equal pictures of each prompt say no more than one, so the interval is as wide."""
    values = np.random.default_rng(1).normal(size=100)
    one = estimate(values, clusters(range(100)))
    four = estimate(np.repeat(values, 4), clusters(np.repeat(np.arange(100), 4).tolist()))
    assert (four.value, four.low, four.high) == pytest.approx((one.value, one.low, one.high))
    assert four.count == 400


def test_prompts_are_resampled_within_their_kind():
    """Two kinds without spread of their own: the only spread is between them, and that is the suite's design."""
    values = np.repeat([0.0, 1.0], 10)
    estimated = estimate(values, clusters(range(20), np.repeat(["a", "b"], 10).tolist()))
    assert (estimated.value, estimated.low, estimated.high) == (0.5, 0.5, 0.5)


def test_the_mean_of_kinds_counts_each_kind_once():
    values, kinds = [1.0, 1, 1, 0, 0], ["a", "a", "a", "b", "b"]
    assert estimate(values, clusters(range(5), kinds)).value == pytest.approx(0.6)
    assert estimate(values, clusters(range(5), kinds, mean_of_kinds=True)).value == 0.5


def test_missing_values_are_left_out():
    assert estimate([np.nan, np.nan], clusters(range(2))) is None
    estimated = estimate([1.0, np.nan, 3.0], clusters(range(3)))
    assert estimated.value == 2 and estimated.count == 2
    single = estimate([1.0, 2.0], clusters(["a", "a"]))
    assert single.value == 1.5 and np.isnan(single.low) and np.isnan(single.high)
    assert paired([1.0, np.nan], [np.nan, 2.0], clusters(range(2))) is None


@pytest.mark.parametrize("mean_of_kinds", [False, True])
def test_the_paired_test_is_the_permutation_test_of_prompts(mean_of_kinds):
    """Against every exchange of the two models' pictures by prompt, with the mean computed anew each time."""
    rng = np.random.default_rng(2)
    texts, kinds = np.repeat(np.arange(8), 3), np.repeat(["a"] * 5 + ["b"] * 3, 3)
    before, after = rng.normal(size=24), rng.normal(0.6, 1, size=24)
    of = clusters(texts.tolist(), kinds.tolist(), mean_of_kinds)
    change = paired(before, after, of)

    def mean(difference):
        of_kinds = [difference[kinds == kind].mean() for kind in ("a", "b")]
        return np.mean(of_kinds) if mean_of_kinds else difference.mean()

    difference = after - before
    assert change.value == pytest.approx(mean(difference)) and change.count == 24
    exchanged = [mean(difference * np.array(signs)[texts]) for signs in product([-1, 1], repeat=8)]
    assert change.p == pytest.approx(np.mean(np.abs(exchanged) >= abs(mean(difference)) - 1e-12))
    assert change.low < change.value < change.high


def test_drawn_signs_agree_with_the_normal_approximation_and_with_none():
    rng = np.random.default_rng(3)
    parts = rng.normal(0.1, 1, size=400)
    z = abs(parts.sum()) / np.sqrt((parts**2).sum())
    from scipy.special import erfc

    assert sign_flip_p(parts) == pytest.approx(erfc(z / np.sqrt(2)), abs=0.02)
    assert sign_flip_p(np.full(50, 1.0)) == pytest.approx(1 / 10_001)
    assert sign_flip_p(np.zeros(50)) == 1
    assert sign_flip_p([1.0, 1.0, 1.0]) == 2 / 8


def test_holm_is_the_step_down_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


# --- diversity --------------------------------------------------------------------------------------------------------


def test_vendi_counts_equal_pictures_once_and_orthogonal_ones_each():
    assert vendi(np.eye(5)) == pytest.approx(5)
    assert vendi(np.ones((5, 3))) == pytest.approx(1)
    assert vendi(np.repeat(np.eye(3), [4, 4, 4], axis=0)) == pytest.approx(3)
    assert vendi(7 * np.eye(4)) == pytest.approx(4)  # lengths do not count


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_vendi_is_the_entropy_of_the_whole_kernel(shape):
    features = np.random.default_rng(4).normal(size=shape)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(unit @ unit.T / len(unit)).clip(1e-300)
    assert vendi(features) == pytest.approx(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))


def test_pairwise_distance_is_the_mean_over_pairs():
    features = np.random.default_rng(5).normal(size=(7, 4))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [1 - unit[i] @ unit[j] for i in range(7) for j in range(i)]
    assert pairwise_distance(features) == pytest.approx(np.mean(pairs))
    assert pairwise_distance(features[:1]) is None and pairwise_distance(np.ones((3, 2))) == pytest.approx(0)
