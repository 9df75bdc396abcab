"""Several rewards as one value: by hand."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from progrpo.rewards.base import Reward, Score
from progrpo.rewards.mixture import Component, Failures, RewardMixture
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt
from tests.support.rewards import mixture_of_one

NAN = math.nan
PICTURES = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(3, axis=3)
PROMPTS = [Prompt(t) for t in "aaabbb"]
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


@dataclass
class Table(Reward):
    """Scores by the picture's number."""

    values: list
    passed: list = field(default_factory=lambda: [None] * 6)
    shown: list = field(default_factory=list)
    closed: bool = False

    def score(self, pictures_NHWC, prompts):
        numbers = pictures_NHWC[:, 0, 0, 0].tolist()
        self.shown.append((numbers, [p.text for p in prompts]))
        return [
            v if isinstance(v, Score) else Score(v, self.passed[n])
            for n, v in zip(numbers, [self.values[n] for n in numbers], strict=True)
        ]

    def close(self):
        self.closed = True


def component(name, reward, weight=1.0, **term):
    return Component(RewardTerm(name, weight, **term), reward)


A, B = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [1.0, None, 0.5, -1.0, math.inf, 2.0]


def test_a_weighted_sum_is_missing_where_a_part_is():
    mixture = RewardMixture([component("a", Table(A), 2.0), component("b", Table(B), -0.5)])
    scores = mixture.score(PICTURES, PROMPTS, GROUPS)
    np.testing.assert_array_equal(scores.value_N, [-0.5, NAN, 3.75, 6.5, NAN, 9.0])
    np.testing.assert_array_equal(scores.rewards_NR, np.stack([A, [1.0, NAN, 0.5, -1.0, NAN, 2.0]], axis=1))
    assert torch.equal(scores.ranking_N.nan_to_num(-9), scores.value_N.nan_to_num(-9))
    assert mixture.weights == {"a": 2.0, "b": -0.5}
    assert scores.value_N.dtype == scores.rewards_NR.dtype == torch.float64


def test_one_reward_is_itself():
    scores = mixture_of_one(Table(B, [True, None, False, True, False, None])).score(PICTURES, PROMPTS, GROUPS)
    np.testing.assert_array_equal(scores.value_N, [1.0, NAN, 0.5, -1.0, NAN, 2.0])
    np.testing.assert_array_equal(scores.passed_N, [1, NAN, 0, 1, 0, NAN])


def test_a_verdict_needs_every_reward_that_has_one():
    one, other = [True, True, False, None, None, True], [True, False, True, None, True, None]
    scores = RewardMixture([component("a", Table(A, one)), component("b", Table(A, other))]).score(
        PICTURES, PROMPTS, GROUPS
    )
    np.testing.assert_array_equal(scores.passed_N, [1, 0, 0, NAN, 1, 1])


def test_a_gate_lets_a_reward_count_only_where_another_passes_and_saves_its_calls():
    gate, gated = Table([0.9, 0.5, 0.49, None, 0.0, 1.0]), Table([10.0, 20.0, 30.0, 40.0, 50.0, None])
    mixture = RewardMixture([component("gate", gate), component("gated", gated, 0.1, needs="gate", at_least=0.5)])
    scores = mixture.score(PICTURES, PROMPTS, GROUPS)
    np.testing.assert_allclose(scores.value_N, [1.9, 2.5, 0.49, NAN, 0.0, NAN])
    np.testing.assert_array_equal(scores.rewards_NR[:, 1], [10, 20, 0, NAN, 0, NAN])
    assert gated.shown == [([0, 1, 5], ["a", "a", "b"])]
    assert mixture.failures().asked == {"gate": 6, "gated": 3}


def test_where_no_gate_opens_nothing_is_asked():
    gated = Table(A)
    mixture = RewardMixture([component("gate", Table([0.0] * 6)), component("gated", gated, needs="gate")])
    np.testing.assert_array_equal(mixture.score(PICTURES, PROMPTS, GROUPS).value_N, [0.0] * 6)
    assert gated.shown == []


def test_a_ranking_reward_sees_a_group_at_a_time_and_answers_are_put_back():
    class Ranks(Table):
        def score(self, pictures_NHWC, prompts):
            super().score(pictures_NHWC, prompts)
            assert len({p.text for p in prompts}) == 1
            order = pictures_NHWC[:, 0, 0, 0].argsort().argsort()
            return [Score(float(rank)) for rank in order]

    ranks = Ranks(A)
    ranks.groupwise = True
    rows = [4, 0, 5, 2, 3, 1]
    scores = RewardMixture([component("ranks", ranks)]).score(PICTURES[rows], [PROMPTS[i] for i in rows], GROUPS[rows])
    assert [shown for shown, _ in ranks.shown] == [[0, 2, 1], [4, 5, 3]]
    assert scores.value_N.tolist() == [1, 0, 2, 2, 0, 1]


def test_two_groups_of_one_prompt_are_two():
    seen = Table(A)
    seen.groupwise = True
    RewardMixture([component("ranks", seen)]).score(PICTURES, [Prompt("same")] * 6, GROUPS)
    assert [shown for shown, _ in seen.shown] == [[0, 1, 2], [3, 4, 5]]


def test_selectors_may_compare_something_else():
    mixture = RewardMixture(
        [component("a", Table(A)), component("b", Table(A))], ranking=lambda parts, group: parts[:, 0] - 10 * group
    )
    scores = mixture.score(PICTURES, PROMPTS, GROUPS)
    assert scores.ranking_N.tolist() == [0, 1, 2, -7, -6, -5] and scores.value_N.tolist() == [0, 2, 4, 6, 8, 10]


def test_failures_are_counted_by_reward_with_the_last_error_and_then_anew():
    failing = Table([1.0, Score(None, error="OSError: gone"), 1.0, NAN, 1.0, 1.0])
    mixture = RewardMixture([component("a", Table(A)), component("b", failing)])
    for _ in range(2):
        mixture.score(PICTURES, PROMPTS, GROUPS)
    failures = mixture.failures()
    assert (failures.asked, failures.missing) == ({"a": 12, "b": 12}, {"a": 0, "b": 4})
    assert failures.last_error == "reward b: it gave no finite number"
    assert mixture.failures() == Failures({"a": 0, "b": 0}, {"a": 0, "b": 0}, None)
    mixture.score(PICTURES[:2], PROMPTS[:2], GROUPS[:2])
    assert mixture.failures().last_error == "reward b: OSError: gone"


def test_the_last_error_is_a_line_that_files_and_terminals_take():
    score = Score(None, error="first\n\x1b[31msecond \ud800")
    mixture = RewardMixture([component("b", Table([score, Score(None, error="x" * 10**6)]))])
    mixture.score(PICTURES[:1], PROMPTS[:1], GROUPS[:1])
    assert mixture.failures().last_error == r"reward b: 'first \x1b[31msecond \ud800'"
    mixture.score(PICTURES[1:2], PROMPTS[1:2], GROUPS[1:2])
    assert len(mixture.failures().last_error or "") < 300


def test_another_number_of_scores_is_a_defect_of_the_reward():
    class Short(Table):
        def score(self, pictures_NHWC, prompts):
            return [Score(1.0)]

    with pytest.raises(AssertionError, match="reward b: 1 scores for 6 pictures"):
        RewardMixture([component("b", Short(A))]).score(PICTURES, PROMPTS, GROUPS)


def test_closing_reaches_every_reward():
    tables = [Table(A), Table(A)]
    RewardMixture([component(str(i), t) for i, t in enumerate(tables)]).close()
    assert all(t.closed for t in tables)
