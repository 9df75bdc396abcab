"""Where the stochastic steps lie: at the start, moving on, or anywhere; always consecutive and before the end."""

from __future__ import annotations

import pytest

from progrpo.rollout.window import WINDOWS, last_start, window

KINDS = tuple(WINDOWS)


def steps(kind, iteration, size=3, end=9, interval=25, seed=0):
    return window(kind, iteration, size=size, end=end, interval=interval, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "end"), [(1, 1), (1, 7), (3, 9), (8, 9), (9, 9)])
def test_a_window_has_its_size_and_lies_before_the_end(kind, size, end):
    for iteration in range(60):
        chosen = steps(kind, iteration, size, end, interval=2)
        assert isinstance(chosen, range) and chosen.step == 1 and len(chosen) == size
        assert chosen.start >= 0 and chosen.stop <= end


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_as_large_as_its_place_never_moves(kind):
    assert {steps(kind, i, size=5, end=5, interval=1, seed=i) for i in range(40)} == {range(5)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_start_is_that_of_the_latest_window(kind):
    starts = [steps(kind, iteration, size=3, end=7, interval=1).start for iteration in range(60)]
    assert max(starts) == last_start(kind, size=3, end=7)
    assert last_start("all", size=3, end=7) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_that_does_not_fit_is_refused(kind):
    with pytest.raises(AssertionError, match="a window must fit"):
        steps(kind, 0, size=4, end=3)


def test_first_is_always_at_the_start():
    assert {steps("first", i, interval=1, seed=i) for i in range(40)} == {range(3)}


@pytest.mark.parametrize("interval", [1, 2, 25])
def test_sliding_stays_an_interval_then_moves_by_one_step_and_wraps(interval):
    starts = [steps("sliding", i, size=3, end=6, interval=interval).start for i in range(9 * interval)]
    assert starts == [start for start in (0, 1, 2, 3, 0, 1, 2, 3, 0) for _ in range(interval)]


def test_sliding_does_not_depend_on_the_seed():
    assert all(steps("sliding", i, seed=0) == steps("sliding", i, seed=9) for i in range(200))


def test_random_follows_from_seed_and_iteration_alone():
    starts = {seed: [steps("random", i, seed=seed).start for i in range(50)] for seed in (0, 1)}
    assert starts[0] == [steps("random", i, interval=3, seed=0).start for i in range(50)]  # in no order that matters
    assert [steps("random", i, seed=1).start for i in reversed(range(50))] == starts[1][::-1]
    assert starts[0] != starts[1]


def test_random_seeds_and_iterations_do_not_run_together():
    """Seed 1 at iteration 2 is not seed 12 or seed 2 at iteration 1, nor one seed another shifted."""
    rows = [tuple(steps("random", i, size=1, end=100, seed=seed).start for i in range(20)) for seed in range(20)]
    assert len(set(rows)) == 20
    shifted = {tuple(rows[0][k : k + 5]) for k in range(16)}
    assert not any(tuple(row[k : k + 5]) in shifted for row in rows[1:] for k in range(16))


def test_random_covers_all_starts_about_equally_often():
    starts = [steps("random", i, size=3, end=6).start for i in range(2000)]
    counts = [starts.count(start) for start in range(4)]
    assert sum(counts) == 2000 and all(400 < count < 600 for count in counts)
