"""The contract of every selector, whatever it prefers."""

import math

import pytest
import torch

from progrpo.rollout.prune import Selection
from tests.support.grids import SELECTORS

NAN = math.nan


@pytest.fixture(params=SELECTORS)
def select(request):
    return SELECTORS[request.param]


def problem(groups=40, size=12, seed=0):
    """Scores with gaps, ragged groups, and seeds."""
    generator = torch.Generator().manual_seed(seed)
    scores_PG = torch.randn(groups, size, generator=generator, dtype=torch.float64)
    missing = torch.rand(groups, size, generator=generator) < torch.linspace(0, 1, groups)[:, None]
    fill = torch.tensor([NAN, math.inf, -math.inf], dtype=torch.float64)
    scores_PG[missing] = fill[torch.randint(0, 3, (int(missing.sum()),), generator=generator)]
    present_PG = torch.rand(groups, size, generator=generator) < 0.8
    present_PG[0], present_PG[1] = False, True
    return scores_PG, present_PG, torch.randint(0, 2**62, (groups,), generator=generator)


def rows(selection: Selection) -> list[list[int]]:
    return [i[v].tolist() for i, v in zip(selection.indices_PK, selection.valid_PK, strict=True)]


@pytest.mark.parametrize("keep", [1, 2, 5, 12, 15])
def test_shape_and_places(select, keep):
    scores_PG, present_PG, seeds_P = problem()
    selection = select(scores_PG, keep, present_PG, seeds_P)
    assert selection.indices_PK.shape == selection.valid_PK.shape == (40, keep)
    assert selection.indices_PK.dtype == torch.int64
    assert selection.valid_PK.dtype == torch.bool
    assert selection.indices_PK[~selection.valid_PK].eq(0).all()
    for indices, valid, present in zip(rows(selection), selection.valid_PK.tolist(), present_PG, strict=True):
        assert indices == sorted(set(indices))
        assert present[indices].all()
        assert len(indices) == min(keep, int(present.sum()))
        assert valid == [True] * len(indices) + [False] * (keep - len(indices))


@pytest.mark.parametrize("keep", [1, 2, 5, 12])
def test_missing_scores_come_last_and_lowest_member_first(select, keep):
    scores_PG, present_PG, seeds_P = problem()
    scored_PG = scores_PG.isfinite() & present_PG
    for p, indices in enumerate(rows(select(scores_PG, keep, present_PG, seeds_P))):
        scored, missing = (set(mask.nonzero()[:, 0].tolist()) for mask in (scored_PG[p], present_PG[p] & ~scored_PG[p]))
        assert len(scored & set(indices)) == min(keep, len(scored))
        fill = max(0, min(keep, len(scored | missing)) - len(scored))
        assert sorted(missing & set(indices)) == sorted(missing)[:fill]


def test_a_group_does_not_know_its_neighbours(select):
    scores_PG, present_PG, seeds_P = problem()
    together = rows(select(scores_PG, 5, present_PG, seeds_P))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = rows(select(scores_PG[order], 5, present_PG[order], seeds_P[order]))
    assert shuffled == [together[i] for i in order]
    for p in range(40):
        one = slice(p, p + 1)
        assert rows(select(scores_PG[one], 5, present_PG[one], seeds_P[one])) == [together[p]]


@pytest.mark.parametrize("wider", [1, 4, 40])
def test_columns_without_a_member_change_nothing(select, wider):
    scores_PG, present_PG, seeds_P = problem()
    padded_scores = torch.cat([scores_PG, torch.zeros(40, wider, dtype=torch.float64)], 1)
    padded_present = torch.cat([present_PG, torch.zeros(40, wider, dtype=torch.bool)], 1)
    wide, narrow = select(padded_scores, 5, padded_present, seeds_P), select(scores_PG, 5, present_PG, seeds_P)
    assert torch.equal(wide.indices_PK, narrow.indices_PK)
    assert torch.equal(wide.valid_PK, narrow.valid_PK)


def test_scores_of_absent_members_change_nothing(select):
    scores_PG, present_PG, seeds_P = problem()
    for value in (NAN, math.inf, 1e9):
        other = scores_PG.where(present_PG, value)
        assert rows(select(other, 5, present_PG, seeds_P)) == rows(select(scores_PG, 5, present_PG, seeds_P))


def test_keep_all_is_everyone_in_order(select):
    scores_PG = problem()[0]
    selection = select(scores_PG, 12, torch.ones_like(scores_PG, dtype=torch.bool), torch.zeros(40, dtype=torch.long))
    assert torch.equal(selection.indices_PK, torch.arange(12).expand(40, 12))
    assert selection.valid_PK.all()


def test_ties_are_deterministic(select):
    scores_PG, present_PG, seeds_P = problem()
    tied = scores_PG.sign()
    first, second = (select(tied, 5, present_PG, seeds_P) for _ in range(2))
    assert torch.equal(first.indices_PK, second.indices_PK)


def test_inputs_are_left_alone_and_the_global_generator_too(select):
    scores_PG, present_PG, seeds_P = problem()
    copies = tuple(t.clone() for t in (scores_PG, present_PG, seeds_P))
    state = torch.get_rng_state()
    select(scores_PG, 5, present_PG, seeds_P)
    assert torch.equal(torch.get_rng_state(), state)
    for copy, value in zip(copies, (scores_PG, present_PG, seeds_P), strict=True):
        torch.testing.assert_close(value, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_and_coarser_scores(select, dtype):
    scores_PG, present_PG, seeds_P = problem()
    rounded = scores_PG.to(dtype)
    assert rows(select(rounded, 5, present_PG, seeds_P)) == rows(select(rounded.double(), 5, present_PG, seeds_P))


def test_no_groups(select):
    empty = torch.empty(0, 4)
    selection = select(empty, 2, empty.bool(), torch.empty(0, dtype=torch.long))
    assert selection.indices_PK.shape == (0, 2)


@pytest.mark.parametrize("shift", [1e8, -1e9, 1e12])
def test_a_number_added_to_all_scores_changes_no_choice(select, shift):
    scores_PG, present_PG, seeds_P = problem()
    scores_PG = (scores_PG * 64).round() / 64  # which every shift leaves exact
    plain, shifted = (select(scores, 5, present_PG, seeds_P) for scores in (scores_PG, scores_PG + shift))
    assert rows(plain) == rows(shifted)
