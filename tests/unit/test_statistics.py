import math

import numpy as np
import pytest
from scipy import stats

from progrpo.tracking.statistics import (
    difference_of_means,
    interval,
    kept_variance,
    mean_of,
    paired_difference,
    ranks,
    share,
    spearman,
    standardised,
)


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_scipys_with_ties(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 6, 40), rng.integers(0, 6, 40) + rng.integers(0, 3, 40)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_ranks_are_scipys():
    values = [3.0, 1.0, 3.0, 2.0, -1.0, 3.0]
    assert ranks(values).tolist() == stats.rankdata(values).tolist()


def test_spearman_drops_pairs_with_a_missing_value():
    a = [1.0, None, 2.0, 3.0, 4.0, float("nan")]
    b = [2.0, 5.0, 1.0, float("nan"), 7.0, 0.0]
    assert spearman(a, b) == pytest.approx(stats.spearmanr([1, 2, 4], [2, 1, 7]).statistic)


@pytest.mark.parametrize("a, b", [([], []), ([1.0], [2.0]), ([1, 1, 1], [1, 2, 3]), ([1, None, None], [1, 2, 3])])
def test_spearman_is_none_where_it_is_not_defined(a, b):
    assert spearman(a, b) is None


def test_spearman_wants_pairs():
    with pytest.raises(ValueError, match="one length"):
        spearman([1, 2], [1, 2, 3])


def test_share_has_the_binomial_error_and_leaves_out_none():
    estimate = share([True, None, False, True, True])
    assert estimate is not None
    assert (estimate.value, estimate.count) == (0.75, 4)
    assert estimate.error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert share([None]) is None


def test_paired_difference_has_the_error_of_the_differences():
    before, after = [0, 0, 1, 1, 0], [1, 0, 1, 1, 1]
    difference = paired_difference(before, after)
    assert difference.value == pytest.approx(0.4)
    assert difference.error == pytest.approx(stats.sem([1, 0, 0, 0, 1]))


def test_standardised_values_have_mean_zero_and_variance_one_without_the_missing():
    values = standardised([3.0, None, 1.0, float("inf"), 7.0])
    assert values is not None
    assert values[[0, 2, 4]] == pytest.approx(stats.zscore([3.0, 1.0, 7.0]), abs=1e-12)
    assert np.isnan(values).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, None], [None, float("nan")]])
def test_equal_values_have_no_units(values):
    assert standardised(values) is None and kept_variance(values, [0] if values else []) is None


def test_the_variance_of_a_choice_is_in_units_of_all():
    values = [1.0, 5.0, None, 2.0, 9.0]
    assert kept_variance(values, [1, 4, 2]) == pytest.approx(np.var([5, 9]) / np.var([1, 5, 2, 9]))
    assert kept_variance(values, range(5)) == pytest.approx(1)
    assert kept_variance(values, [3]) == 0 and kept_variance(values, [2]) is None
    verdicts = [0.0, 1.0] * 4
    assert kept_variance(verdicts, [0, 1, 2, 3]) == 1  # nothing to select where half pass


def test_intervals_are_scipys():
    a, b = np.random.default_rng(0).normal(size=5), np.random.default_rng(1).normal(1, 3, size=3)
    estimate, low_high = interval(mean_of(a)), stats.ttest_1samp(a, 0).confidence_interval()
    assert (estimate.value - estimate.half, estimate.value + estimate.half) == pytest.approx(tuple(low_high))
    estimate = difference_of_means(mean_of(a), mean_of(b))
    low_high = stats.ttest_ind(b, a, equal_var=False).confidence_interval()
    assert (estimate.value - estimate.half, estimate.value + estimate.half) == pytest.approx(tuple(low_high))


def test_intervals_that_are_not_known_are_nan_and_without_spread_they_are_zero():
    one, equal = mean_of([1.0]), mean_of([2.0, 2.0])
    assert math.isnan(interval(one).half) and interval(equal).half == 0
    assert math.isnan(difference_of_means(one, equal).half) and difference_of_means(equal, equal).half == 0
