"""The optimum against brute force over all subsets, in exact arithmetic where ties matter."""

import math
from fractions import Fraction
from itertools import combinations

import pytest
import torch

from progrpo.rollout.prune import furthest, none, ovf, survivors, top_bottom, uniform, widest_groups

NAN, INF = math.nan, math.inf


def variance(scores: list[float]) -> Fraction:
    exact = [Fraction(score) for score in scores]
    mean = sum(exact, Fraction(0)) / len(exact)
    return sum(((score - mean) ** 2 for score in exact), Fraction(0)) / len(exact)


def best_variance(scores: list[float], keep: int) -> Fraction:
    return max(variance([scores[i] for i in subset]) for subset in combinations(range(len(scores)), keep))


def kept(selection, row: int = 0) -> list[int]:
    return selection.indices_PK[row][selection.valid_PK[row]].tolist()


def select(selector, scores: list[float], keep: int, seed: int = 0):
    scores_PG = torch.tensor([scores], dtype=torch.float64)
    return kept(selector(scores_PG, keep, torch.ones_like(scores_PG, dtype=torch.bool), torch.tensor([seed])))


def best_subset(scores_PG: torch.Tensor, keep: int) -> torch.Tensor:
    """The members that ovf keeps of whole groups in which all have a score."""
    present_PG, seeds_P = torch.ones_like(scores_PG, dtype=torch.bool), torch.zeros(len(scores_PG), dtype=torch.int64)
    selection = ovf(scores_PG, keep, present_PG, seeds_P)
    assert selection.valid_PK.all()
    return selection.indices_PK


SOURCES = {
    "normal": lambda g, n: torch.randn(n, generator=g, dtype=torch.float64),
    "skewed": lambda g, n: torch.empty(n, dtype=torch.float64).exponential_(generator=g),
    "ties": lambda g, n: torch.randint(0, 3, (n,), generator=g).double(),
    "tenths": lambda g, n: torch.randint(0, 4, (n,), generator=g).double() / 10,
    "far": lambda g, n: 26 + 0.01 * torch.randn(n, generator=g, dtype=torch.float64),
    "outlier": lambda g, n: torch.cat([torch.randn(n - 1, generator=g, dtype=torch.float64), torch.tensor([1e3])]),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [2, 5, 8, 9])
def test_brute_force(source, size):
    generator = torch.Generator().manual_seed(size)
    scores_PG = torch.stack([SOURCES[source](generator, size) for _ in range(6)])
    for keep in range(1, size + 1):
        for scores, indices in zip(scores_PG.tolist(), best_subset(scores_PG, keep).tolist(), strict=True):
            assert indices == sorted(set(indices))
            chosen, best = variance([scores[i] for i in indices]), best_variance(scores, keep)
            assert chosen >= best * (1 - Fraction(1, 10**12)), (scores, keep, indices)


@pytest.mark.parametrize("value", [0.0, 0.1, 26.3, -1e12])
def test_equal_scores_give_the_same_choice_whatever_they_are(value):
    scores_PG = torch.full((2, 7), value, dtype=torch.float64)
    assert best_subset(scores_PG, 3).tolist() == [[4, 5, 6]] * 2


@pytest.mark.parametrize("scale", [1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("shift", [0.0, 0.7, 26.0])
def test_among_equal_variances_the_lowest_split_wins(scale, shift):
    scores_PG = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]], dtype=torch.float64) * scale + shift
    assert best_subset(scores_PG, 3).tolist() == [[1, 2, 3], [0, 2, 3]]
    assert best_subset(scores_PG, 2).tolist() == [[0, 3], [1, 2]]


def test_the_split_is_not_symmetric_for_skewed_scores():
    scores_PG = torch.tensor([[0.0, 0.1, 0.2, 0.3, 10.0, 0.15]], dtype=torch.float64)
    assert best_subset(scores_PG, 4).tolist() == [[0, 1, 4, 5]]


def naive_float32_lows(scores_PG: torch.Tensor, keep: int) -> torch.Tensor:
    """The same scan without centring and in float32."""
    ordered = scores_PG.sort(1).values
    first = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))
    second = torch.nn.functional.pad(ordered.square().cumsum(1), (1, 0))
    start = scores_PG.shape[1] - keep
    s, q = (p[:, : keep + 1] + p[:, -1:] - p[:, start:] for p in (first, second))
    return (q / keep - (s / keep).square()).argmax(1)


def test_float32_rewards_far_from_zero_need_centring():
    scores_PG = 26 + 0.01 * torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    indices_PK = best_subset(scores_PG, 12)
    ordered = scores_PG.double().sort(1).values
    splits = torch.stack(
        [torch.cat([ordered[:, :i], ordered[:, 12 + i :]], 1).var(1, correction=0) for i in range(13)], dim=1
    )
    variances = scores_PG.double().gather(1, indices_PK).var(1, correction=0)
    torch.testing.assert_close(variances, splits.amax(1), rtol=1e-11, atol=0)
    naive = splits.gather(1, naive_float32_lows(scores_PG, 12)[:, None])[:, 0]
    assert (naive < variances * (1 - 1e-6)).float().mean() > 0.5


def test_ovf_of_a_group_with_missing_scores_is_ovf_of_the_others():
    assert select(ovf, [NAN, 0.0, 5.0, INF, 9.0, 4.0], 2) == [1, 4]
    assert select(ovf, [NAN, 0.0, 5.0, INF, 9.0, -INF], 4) == [0, 1, 2, 4]


def test_furthest_keeps_the_largest_advantages_by_size():
    assert select(furthest, [0.0, 1.0, 2.0, 3.0, 4.0, 20.0], 3) == [0, 1, 5]  # the mean is 5
    assert select(furthest, [0.0, math.nan, 2.0, 3.0, 4.0, 20.0], 4) == [0, 2, 3, 5]  # of the others 5.8
    assert select(furthest, [1.0, 1.0, 1.0], 2) == [1, 2]


def test_top_bottom():
    assert select(top_bottom, [3.0, 1.0, 2.0, 5.0, 4.0, 0.0], 3) == [3, 4, 5]
    assert select(top_bottom, [3.0, 1.0, 2.0, 5.0, 4.0, 0.0], 4) == [1, 3, 4, 5]
    assert select(top_bottom, [0.0, 0.1, 0.2, 0.3, 10.0, 0.15], 4) == [0, 1, 3, 4]


def test_none_takes_the_first():
    assert select(none, [3.0, 1.0, NAN, 5.0, 4.0], 3) == [0, 1, 3]


def test_uniform_takes_every_member_equally_often():
    scores_PG = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    scores_PG[:, 3] = NAN
    selection = uniform(scores_PG, 3, torch.ones_like(scores_PG, dtype=torch.bool), torch.arange(4000))
    share = selection.indices_PK.flatten().bincount(minlength=8) / 4000
    assert share[3] == 0
    expected = torch.full((7,), 3 / 7)
    torch.testing.assert_close(share[[0, 1, 2, 4, 5, 6, 7]], expected, rtol=0, atol=4 * math.sqrt(3 / 7 * 4 / 7 / 4000))


def test_uniform_follows_the_seed():
    choices = {tuple(select(uniform, [0.0] * 12, 4, seed)) for seed in range(20)}
    assert len(choices) > 15
    assert select(uniform, [0.0] * 12, 4, 7) == select(uniform, list(range(12)), 4, 7)


# --- whole groups -----------------------------------------------------------------------------------------------------


def widest(groups: list[list[float]], keep: int) -> list[int]:
    group_N = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))
    scores_N = torch.tensor([score for group in groups for score in group], dtype=torch.float64)
    return widest_groups(group_N, scores_N, keep).tolist()


@pytest.mark.parametrize("source", SOURCES)
def test_groups_go_on_by_their_variance(source):
    generator = torch.Generator().manual_seed(3)
    groups = [SOURCES[source](generator, size).tolist() for size in (7, 7, 4, 9, 7, 2)]
    by_variance = sorted(range(len(groups)), key=lambda p: (-variance(groups[p]), p))
    for keep in range(1, len(groups) + 1):
        assert widest(groups, keep) == sorted(by_variance[:keep])


@pytest.mark.parametrize("size", [5, 12, 24])
@pytest.mark.parametrize("value", [1.0, 26.0])
def test_a_verdict_teaches_where_some_members_pass_and_some_fail(size, value):
    """Of binary rewards every group of equal scores stops first, and as many as pass may fail: the lower group wins."""
    passed = [0, 1, size // 2, size, size - 1, 1]
    groups = [[value] * count + [0.0] * (size - count) for count in passed]
    assert widest(groups, 1) == [2]
    assert widest(groups, 2) == [1, 2] and widest(groups, 3) == [1, 2, 4] and widest(groups, 4) == [1, 2, 4, 5]
    assert widest(groups, 5) == [0, 1, 2, 4, 5]


def test_of_equal_groups_the_first_go_on_whatever_the_order_of_their_members():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(9, generator=generator, dtype=torch.float64)
    groups = [scores[torch.randperm(9, generator=generator)].tolist() for _ in range(5)]
    assert widest(groups, 2) == [0, 1]
    assert widest([[0.1] * 3, [0.3] * 7, [26.3] * 24], 2) == [0, 1]  # none of their stds is but rounding


def test_a_group_without_two_scores_comes_last():
    assert widest([[NAN, 5.0, INF], [1.0, 1.0, NAN], [NAN] * 3, [0.0, 0.1, -INF]], 2) == [1, 3]
    assert widest([[NAN] * 2, [1.0, NAN]], 1) == [0]


@pytest.mark.parametrize("selector", [ovf, top_bottom, uniform, none])
def test_groups_that_were_stopped_are_not_there(selector):
    """The survivors of the others are chosen as if those groups had never been."""
    scores = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seeds = torch.arange(5) + 100
    rows = survivors(torch.tensor([1] * 6 + [4] * 6), scores, 3, selector, seeds)
    assert rows.tolist() == survivors(torch.tensor([0] * 6 + [1] * 6), scores, 3, selector, seeds[[1, 4]]).tolist()
    assert survivors(torch.empty(0, dtype=torch.int64), scores[:0], 3, selector, seeds).tolist() == []
