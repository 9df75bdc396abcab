"""Microbatches that are chosen by measuring: by a clock that is made up, and by a memory that ends."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from progrpo.config import PlanSettings, PromptSettings
from progrpo.training import measure
from progrpo.training.distributed import Ranks
from progrpo.training.measure import with_measured_microbatches
from progrpo.types import Prompt


@pytest.fixture(scope="module")
def policy(tiny_policy):
    return tiny_policy()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def asked(tiny_config):
    """Six prompts in groups of 24, of which 12 live on after step 1 of 4; three steps are trained."""

    def build(sampling: int | None = None, optim: int | None = None, group: int = 24, keep: int = 12, prompts: int = 6):
        base = tiny_config(
            plan=PlanSettings("custom", group_size=group, prune=((1, keep),)),
            prompts=PromptSettings(per_iteration=prompts),
        )
        return replace(
            base,
            sampling=replace(base.sampling, microbatch=sampling),
            optim=replace(base.optim, microbatch=optim),
        )

    return build


def chosen(config: Any, policy: Any) -> tuple[int | None, int | None]:
    measured = with_measured_microbatches(config, policy, Prompt("red cat"), Ranks())
    assert replace(measured, sampling=config.sampling, optim=config.optim) == config
    assert replace(measured.sampling, microbatch=None) == replace(config.sampling, microbatch=None)
    return measured.sampling.microbatch, measured.optim.microbatch


@pytest.fixture
def clock(monkeypatch):
    """A call of so many rows takes `sample(rows)` microseconds, with its backward pass `train(rows)`."""

    def of(sample: Any, train: Any) -> list[tuple[str, int]]:
        timed: list[tuple[str, int]] = []

        def tell(work: Any, size: int, clock: Any) -> float:
            timed.append((work.__name__, size))
            return 1e-6 * {"sample": sample, "train": train}[work.__name__](size)

        monkeypatch.setattr(measure, "_timed", tell)
        return timed

    return of


def test_what_is_given_stays_and_nothing_is_measured(policy, asked, monkeypatch):
    def never(*args: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(policy, "predict", never)
    config = asked(5, 7)
    assert with_measured_microbatches(config, policy, Prompt("red cat"), Ranks()) is config


@pytest.mark.parametrize(("sampling", "optim"), [(5, None), (None, 7)])
def test_of_two_fields_the_one_that_is_given_stays(policy, asked, clock, sampling, optim):
    clock(lambda rows: 1 + 0.01 * rows, lambda rows: 1 + 0.01 * rows)
    microbatches = chosen(asked(sampling, optim), policy)
    assert microbatches == ((5, 128) if sampling else (96, 7))


def test_where_a_call_costs_the_same_whatever_it_holds_the_largest_is_chosen(policy, asked, clock):
    clock(lambda rows: 1.0, lambda rows: 1.0)
    assert chosen(asked(), policy) == (96, 128)  # 144 rows and then 72: three calls by either; 216 items


def test_where_rows_are_all_that_costs_the_smallest_is_chosen(policy, asked, clock):
    clock(lambda rows: rows, lambda rows: rows)
    assert chosen(asked(), policy) == (8, 8)


def test_the_fastest_in_the_middle_is_chosen_each_for_itself(policy, asked, clock):
    # beyond 32 rows a cache is too small
    clock(lambda rows: 1 + 0.05 * rows + (rows > 32) * rows, lambda rows: 1 + 0.05 * rows + (rows > 16) * rows)
    assert chosen(asked(), policy) == (24, 16)  # 144 and 72 rows fill calls of 24 as well as 6 and 3 of them


def test_of_sizes_that_are_nearly_as_fast_the_smaller_is_chosen(policy, asked, clock):
    def nearly(rows: int) -> float:
        return rows * {8: 1.2, 12: 1.02, 24: 1.0}.get(rows, 1.5)

    clock(nearly, nearly)
    assert chosen(asked(), policy) == (12, 12)


@pytest.mark.parametrize(("compiled", "best"), [(False, 8), (True, 10)])
def test_rows_that_are_only_filled_up_are_paid_for(policy, asked, clock, monkeypatch, compiled, best):
    # ten rows in calls of 8 are 16 that are computed by a compiled network, and twice 5 by another
    monkeypatch.setattr(policy, "compiled", compiled)
    clock(lambda rows: 1e-3 + rows, lambda rows: rows)
    assert chosen(asked(group=10, keep=5, prompts=1), policy)[0] == best


def test_one_disturbed_size_neither_wins_nor_ends_the_search(policy, asked, clock):
    def disturbed(rows: int) -> float:
        return 100.0 if rows == 16 else 1 + (rows > 48) * rows

    clock(disturbed, disturbed)
    assert chosen(asked(), policy) == (48, 48)


def test_measuring_ends_where_the_time_a_row_is_flat(policy, asked, clock):
    timed = clock(lambda rows: 1 + rows, lambda rows: 100 + rows)
    assert chosen(asked(), policy)[0] in (8, 12, 16)
    assert {size for name, size in timed if name == "sample"} == {8, 12, 16, 24}
    assert max(size for name, size in timed if name == "train") == 128


def test_measuring_ends_where_its_budget_does(policy, asked, clock):
    timed = clock(lambda rows: 1e5 * (5 + rows / 8), lambda rows: 3e6)
    assert chosen(asked(), policy) == (8, 8)  # a call of 8 takes 0.6 s, and a backward pass 3 s
    assert {name: len([n for n, _ in timed if n == name]) for name in ("sample", "train")} == {"sample": 1, "train": 1}


def test_short_calls_are_timed_for_as_long_as_long_ones(policy, asked, clock):
    timed = clock(lambda rows: 1e3 * rows, lambda rows: 1e3)
    chosen(asked(), policy)
    calls = [size for name, size in timed if name == "sample"]
    assert (calls.count(8) - 1) * 8e-3 >= 0.1 and (calls.count(24) - 1) * 24e-3 >= 0.1


@pytest.mark.parametrize(("group", "keep", "prompts"), [(3, 2, 1), (4, 3, 2), (24, 12, 1), (10, 2, 2)])
def test_no_size_is_above_what_the_plan_has(policy, asked, clock, group, keep, prompts):
    timed = clock(lambda rows: 1.0, lambda rows: 1.0)
    sampling, optim = chosen(asked(group=group, keep=keep, prompts=prompts), policy)
    rows, items = prompts * group, prompts * keep * 3
    assert sampling is not None and optim is not None and sampling <= rows and optim <= items
    assert max(size for name, size in timed if name == "sample") == min(rows, 128)
    assert max(size for name, size in timed if name == "train") == min(items, 128)


def test_measuring_leaves_no_gradient_and_moves_nothing(policy, asked):
    before = {name: p.detach().clone() for name, p in policy.trainable.items()}
    sampling, optim = chosen(asked(group=4, keep=3, prompts=2), policy)
    assert sampling == 8 and optim in (8, 12, 16, 18)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in policy.trainable.items())


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(policy, monkeypatch):
    """A network call fails above so many rows; with gradients above fewer."""

    def of(most: int, trained: int) -> None:
        predict = policy.predict

        def bounded(x: torch.Tensor, *args: Any) -> torch.Tensor:
            if len(x) > (trained if torch.is_grad_enabled() else most):
                raise torch.OutOfMemoryError("made up")
            return predict(x, *args)

        monkeypatch.setattr(policy, "predict", bounded)

    return of


def bounded_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is made, and takes the same time whatever it holds."""
    timed = measure._timed

    def tell(work: Any, size: int, clock: Any) -> float:
        timed(work, size, clock)
        return 1e-2

    monkeypatch.setattr(measure, "_timed", tell)


def test_sizes_that_do_not_fit_are_not_chosen(policy, asked, memory, monkeypatch):
    memory(33, 15)
    bounded_clock(monkeypatch)
    assert chosen(asked(), policy) == (32, 12)


def test_where_nothing_fits_a_sentence_says_what_to_give(policy, asked, memory):
    memory(64, 7)
    with pytest.raises(
        ValueError, match=r"^sampling\.microbatch: .* fit into the memory of cpu; give it and optim\.microbatch"
    ):
        with_measured_microbatches(asked(), policy, Prompt("red cat"), Ranks())
    memory(7, 7)
    with pytest.raises(ValueError, match=r"not even 8 rows fit .* optim\.microbatch"):
        with_measured_microbatches(asked(), policy, Prompt("red cat"), Ranks())


# --- the cache --------------------------------------------------------------------------------------------------------


def quiet(monkeypatch: pytest.MonkeyPatch, share: float = 0.0) -> None:
    monkeypatch.setattr(measure._OtherLoad, "share", lambda self: share)


def test_an_answer_is_kept_for_the_same_machine_and_model(policy, asked, clock, cache, monkeypatch):
    quiet(monkeypatch)
    clock(lambda rows: 1.0, lambda rows: 1.0)
    first = chosen(asked(), policy)
    timed = clock(lambda rows: rows, lambda rows: rows)
    assert chosen(asked(), policy) == first == (96, 128) and not timed
    chosen(asked(group=12, keep=6), policy)  # of another plan
    assert timed and len(list(cache.rglob("*.json"))) == 2


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"lora_rank": 7}, {"resolution": 32}])
def test_another_model_is_measured_anew(policy, asked, clock, monkeypatch, change):
    quiet(monkeypatch)
    timed = clock(lambda rows: 1.0, lambda rows: 1.0)
    chosen(asked(), policy)
    count, config = len(timed), asked()
    with_measured_microbatches(
        replace(config, model=replace(config.model, **change)), policy, Prompt("red cat"), Ranks()
    )
    assert len(timed) == 2 * count


def test_what_a_busy_machine_answered_is_not_kept(policy, asked, clock, cache, monkeypatch):
    quiet(monkeypatch, share=0.5)
    clock(lambda rows: 1.0, lambda rows: 1.0)
    assert chosen(asked(), policy) == (96, 128) and not list(cache.rglob("*.json"))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"key": 1}', '{"key": {}, "sample": {"8": -1}, "train": {"8": 1}}'])
def test_a_damaged_cache_is_measured_over(policy, asked, clock, cache, monkeypatch, text):
    quiet(monkeypatch)
    clock(lambda rows: 1.0, lambda rows: 1.0)
    chosen(asked(), policy)
    (file,) = cache.rglob("*.json")
    file.write_text(text)
    assert chosen(asked(), policy) == (96, 128) and len(file.read_text()) > len(text)


def test_a_cache_that_cannot_be_written_is_done_without(policy, asked, clock, cache, monkeypatch):
    quiet(monkeypatch)
    cache.write_text("a file, where a folder should be")
    clock(lambda rows: 1.0, lambda rows: 1.0)
    assert chosen(asked(), policy) == (96, 128)


def test_the_load_of_others_is_a_share_of_the_processors():
    load = measure._OtherLoad()
    sum(range(10**6))
    assert 0 <= load.share() <= 1.5  # clocks tick in hundredths of a second


def test_beside_other_work_one_thread_is_timed_by_what_it_gets_of_a_processor(policy, asked, monkeypatch):
    quiet(monkeypatch, share=0.5)
    seen = []

    def tell(work: Any, size: int, clock: Any) -> float:
        seen.append((clock.now, torch.get_num_threads()))
        return 1e-2

    monkeypatch.setattr(measure, "_timed", tell)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sampling, optim = chosen(asked(), policy)
        assert torch.get_num_threads() == 2
        assert (sampling, optim) == (144, 216)  # one thread was timed at half of these
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {(time.process_time, 1)}
