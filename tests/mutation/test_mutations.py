"""Bad input by the hundred, of a fixed seed; `python -m tests.mutation` tries thousands."""

from __future__ import annotations

import pytest

from tests.mutation.cases import Case, Reached, tally, workplace
from tests.mutation.command_lines import cut_off
from tests.mutation.makers import random_cases


@pytest.fixture
def work(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with workplace() as folder:
        yield folder


def tallied(work, *runs):
    """The counts and the faults of cases that do what `runs` do."""
    wrong: list[str] = []
    counts = tally(iter([Case("kind", "tried", run) for run in runs]), work, wrong)
    return counts["kind"], wrong


def raising(error):
    def run():
        raise error

    return run


def test_the_tally_sees_what_is_wrong(work):
    good = tallied(work, lambda: None, raising(ValueError("seed must be at least 0")), raising(Reached()))
    assert good == ({"cases": 3, "accepted": 2, "refused": 1}, [])
    for error in (TypeError("seed"), KeyError("seed"), OSError("seed"), RuntimeError("seed"), SystemExit(2)):
        counts, wrong = tallied(work, raising(error))
        assert counts["traceback"] == 1 and len(wrong) == 1
    for sentence in ("seed is\nwrong", "something went amiss", "seed " * 1000):
        counts, wrong = tallied(work, raising(ValueError(sentence)))
        assert counts["unclear"] == 1 and len(wrong) == 1

    def leave():
        (work / "half").write_text("")
        raise ValueError("seed must be at least 0")

    counts, wrong = tallied(work, leave)
    assert counts["refused"] == counts["files_left"] == len(wrong) == 1 and not (work / "half").exists()


SHARES = {
    "recipe": 250,
    "python": 120,
    "arguments": 50,
    "prompts": 60,
    "config file": 40,
    "settings file": 60,
    "library": 40,
    "run": 12,
}


@pytest.mark.parametrize("kind", SHARES)
def test_every_mutation_passes_or_is_refused_in_a_sentence_and_leaves_nothing(work, kind):
    wrong: list[str] = []
    with cut_off():
        counts = tally(random_cases(1, SHARES[kind], work, {kind: 1.0}), work, wrong)[kind]
    assert not wrong, "\n".join(wrong[:10])
    assert counts["cases"] == SHARES[kind] == counts["refused"] + counts["accepted"]
    assert counts["refused"] and counts["accepted"]


def test_the_same_seed_tries_the_same(work):
    tried = [[case.tried for case in random_cases(seed, 30, work, {"recipe": 1.0})] for seed in (1, 1, 2)]
    assert tried[0] == tried[1] != tried[2]
