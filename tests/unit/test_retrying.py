"""Rewards that fail: tried again, given so much time, isolated, and missing where nothing helps."""

import asyncio
import concurrent.futures
import re
import threading
import time

import numpy as np
import pytest

from progrpo.rewards.base import Refusal, Reward, Score
from progrpo.rewards.retrying import RetryingReward
from progrpo.types import Prompt

PICTURES = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1).repeat(3, axis=3)
PROMPTS = [Prompt(f"{i}") for i in range(20)]


class Fails(Reward):
    """Scores a picture by its number; `fails(call, numbers)` may give an error to raise instead."""

    def __init__(self, fails):
        self.fails, self.asked = fails, []

    def score(self, pictures_NHWC, prompts):
        numbers = pictures_NHWC[:, 0, 0, 0].tolist()
        assert [p.text for p in prompts] == [str(n) for n in numbers]
        self.asked.append(numbers)
        if error := self.fails(len(self.asked), numbers):
            raise error
        return [Score(float(n)) for n in numbers]


def reason(score: Score) -> str:
    """The error of a score without the file and line before it."""
    assert score.value is None and score.error is not None
    return score.error.rpartition(", line ")[2].partition(": ")[2]


def patient(fails, **settings):
    waited: list[float] = []
    reward = Fails(fails)
    return RetryingReward(reward, sleep=waited.append, **settings), reward, waited


def test_what_does_not_fail_is_asked_once():
    asked, reward, waited = patient(lambda call, numbers: None)
    assert [s.value for s in asked.score(PICTURES, PROMPTS)] == list(range(20))
    assert len(reward.asked) == 1 and waited == []


def test_a_call_that_fails_is_tried_again_after_longer_and_longer():
    asked, reward, waited = patient(lambda call, numbers: OSError("reset") if call <= 2 else None, retries=2)
    assert [s.value for s in asked.score(PICTURES, PROMPTS)] == list(range(20))
    assert len(reward.asked) == 3 and 0.5 <= waited[0] <= 1.5 and 1.0 <= waited[1] <= 3.0


def test_a_bad_picture_costs_no_other():
    bad = {3, 7, 8}
    asked, reward, _ = patient(lambda call, numbers: ValueError("bad") if bad & set(numbers) else None, retries=1)
    scores = asked.score(PICTURES, PROMPTS)
    assert [s.value for s in scores] == [None if n in bad else float(n) for n in range(20)]
    assert {reason(s) for i, s in enumerate(scores) if i in bad} == {"ValueError: bad"}
    assert all(s.error is None for i, s in enumerate(scores) if i not in bad)
    assert reward.asked[2:] == [[n] for n in range(20)]


class Panic(BaseException):
    """As a library in Rust raises it."""


@pytest.mark.parametrize("settings", [{}, {"timeout": 60.0}])
@pytest.mark.parametrize(
    "kind", [SystemExit, asyncio.CancelledError, concurrent.futures.CancelledError, GeneratorExit, Panic]
)
def test_whatever_a_reward_lets_through_is_a_failure_like_another(settings, kind):
    asked, _, _ = patient(lambda call, numbers: kind("gone") if 3 in numbers else None, retries=0, **settings)
    scores = asked.score(PICTURES, PROMPTS)
    assert [s.value is None for s in scores] == [n == 3 for n in range(20)]
    assert reason(scores[3]) == f"{kind.__name__}: gone"


def test_a_reward_that_is_down_is_not_asked_about_every_picture():
    asked, reward, _ = patient(lambda call, numbers: ConnectionError(), retries=0)
    scores = asked.score(PICTURES, PROMPTS)
    assert [reason(s) for s in scores] == ["ConnectionError"] * 20
    assert len(reward.asked) == 1 + 8


def test_pictures_that_begin_badly_do_not_end_it():
    bad = set(range(7))
    asked, _, _ = patient(lambda call, numbers: ValueError() if bad & set(numbers) else None, retries=0)
    assert [s.value is None for s in asked.score(PICTURES, PROMPTS)] == [n in bad for n in range(20)]


def test_one_picture_is_not_asked_about_once_more_than_it_is_tried():
    asked, reward, _ = patient(lambda call, numbers: ValueError("bad"), retries=1)
    assert [reason(s) for s in asked.score(PICTURES[:1], PROMPTS[:1])] == ["ValueError: bad"]
    assert len(reward.asked) == 2


@pytest.mark.parametrize("retries", [0, 3])
def test_a_refusal_is_raised_at_once(retries):
    asked, reward, waited = patient(lambda call, numbers: Refusal("no such column"), retries=retries)
    with pytest.raises(Refusal, match="no such column"):
        asked.score(PICTURES, PROMPTS)
    assert len(reward.asked) == 1 and waited == []


def test_a_refusal_of_a_single_picture_is_raised_too():
    asked, _, _ = patient(
        lambda call, numbers: ValueError() if len(numbers) > 1 else Refusal("the fifth") if numbers == [5] else None
    )
    with pytest.raises(Refusal, match="the fifth"):
        asked.score(PICTURES, PROMPTS)


def test_an_interrupt_is_no_failure():
    asked, reward, _ = patient(lambda call, numbers: KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        asked.score(PICTURES, PROMPTS)
    assert len(reward.asked) == 1


def test_only_the_pictures_that_failed_are_asked_about_again():
    class Flaky(Reward):
        def __init__(self):
            self.asked = []

        def score(self, pictures_NHWC, prompts):
            numbers = pictures_NHWC[:, 0, 0, 0].tolist()
            self.asked.append(numbers)
            lost = {1: {2, 5, 9}, 2: {5}}.get(len(self.asked), set())
            return [Score(None, error="busy") if n in lost else Score(None if n == 3 else float(n)) for n in numbers]

    reward = Flaky()
    scores = RetryingReward(reward, retries=2, sleep=lambda s: None).score(PICTURES, PROMPTS)
    assert reward.asked == [list(range(20)), [2, 5, 9], [5]]  # the third, which just has none, is not
    assert [s.value for s in scores] == [None if n == 3 else float(n) for n in range(20)]
    reward = Flaky()
    scores = RetryingReward(reward, retries=1, sleep=lambda s: None).score(PICTURES, PROMPTS)
    assert scores[5] == Score(None, error="busy") and reward.asked == [list(range(20)), [2, 5, 9]]


def test_a_reward_that_ranks_a_group_is_asked_about_all_of_it_again_and_never_about_a_picture_alone():
    class Ranks(Reward):
        groupwise = True

        def __init__(self, troubles):
            self.asked, self.troubles = [], troubles

        def score(self, pictures_NHWC, prompts):
            self.asked.append(len(prompts))
            trouble = self.troubles.pop(0) if self.troubles else None
            if isinstance(trouble, Exception):
                raise trouble
            places = pictures_NHWC[:, 0, 0, 0].argsort().argsort()
            return [Score(None, error="busy") if n == trouble else Score(float(p)) for n, p in enumerate(places)]

    reward = Ranks([3, OSError("reset"), None])
    scores = RetryingReward(reward, retries=2, sleep=lambda s: None).score(PICTURES, PROMPTS)
    assert [s.value for s in scores] == list(range(20)) and reward.asked == [20, 20, 20]
    reward = Ranks([OSError("reset")])
    scores = RetryingReward(reward, retries=0, sleep=lambda s: None).score(PICTURES, PROMPTS)
    assert [reason(s) for s in scores] == ["OSError: reset"] * 20 and reward.asked == [20]


# --- time -------------------------------------------------------------------------------------------------------------


class Hangs(Reward):
    def __init__(self, times):
        self.release, self.times, self.calls = threading.Event(), times, 0

    def score(self, pictures_NHWC, prompts):
        self.calls += 1
        if self.calls <= self.times:
            self.release.wait(20)
        return [Score(1.0)] * len(prompts)


def test_a_call_that_hangs_is_left_to_itself_and_its_pictures_are_missing():
    reward = Hangs(2)
    start = time.perf_counter()
    scores = RetryingReward(reward, retries=1, timeout=0.1, sleep=lambda s: None).score(PICTURES, PROMPTS)
    assert time.perf_counter() - start < 10
    assert scores == [Score(None, error="TimeoutError: no answer in 0.1 s")] * 20
    assert reward.calls == 2  # no picture was asked about alone
    reward.release.set()


def test_a_call_that_hangs_once_is_tried_again():
    reward = Hangs(1)
    scores = RetryingReward(reward, retries=1, timeout=0.1, sleep=lambda s: None).score(PICTURES, PROMPTS)
    assert scores == [Score(1.0)] * 20
    reward.release.set()


def test_calls_that_hang_do_not_pile_up():
    reward = Hangs(100)
    asked = RetryingReward(reward, retries=0, timeout=0.05, sleep=lambda s: None)
    errors = [asked.score(PICTURES[:1], PROMPTS[:1])[0].error for _ in range(6)]
    assert errors[:4] == ["TimeoutError: no answer in 0.05 s"] * 4
    hanging = "TimeoutError: 4 earlier calls still hang; in processes of its own such calls are ended"
    assert errors[4:] == [hanging] * 2 and reward.calls == 4
    reward.release.set()


def test_an_error_within_the_time_is_the_error():
    asked, _, _ = patient(lambda call, numbers: ZeroDivisionError("mine"), retries=0, timeout=10)
    assert [reason(s) for s in asked.score(PICTURES[:1], PROMPTS[:1])] == ["ZeroDivisionError: mine"]
    asked, _, _ = patient(lambda call, numbers: Refusal("mine"), timeout=10)
    with pytest.raises(Refusal):
        asked.score(PICTURES, PROMPTS)


def test_no_pictures_no_scores():
    asked, _, _ = patient(lambda call, numbers: None)
    assert asked.score(PICTURES[:0], []) == []


def test_closing_reaches_the_reward():
    closed = []

    class Closes(Hangs):
        def close(self):
            closed.append(True)

    RetryingReward(Closes(0)).close()
    RetryingReward(Hangs(0)).close()
    assert closed == [True]


@pytest.mark.parametrize("timeout", [None, 10])
def test_an_error_has_the_file_and_line_of_the_reward(timeout):
    asked, _, _ = patient(lambda call, numbers: ZeroDivisionError("mine"), retries=0, timeout=timeout)
    (score,) = asked.score(PICTURES[:1], PROMPTS[:1])
    assert re.fullmatch(r".*test_retrying\.py, line \d+: ZeroDivisionError: mine", score.error)
