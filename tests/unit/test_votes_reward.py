"""The reward of votes: who is compared with whom, strengths by hand, and what is missing."""

import math
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from progrpo.preferences.questions import Questions
from progrpo.preferences.votes import Votes
from progrpo.rewards.base import Refusal
from progrpo.rewards.load import load_reward
from progrpo.rewards.mixture import RewardMixture, component_from
from progrpo.rewards.settings import RewardTerm
from progrpo.rewards.votes import NEIGHBOURS, VotesReward, ring, strengths
from progrpo.types import Prompt


def group(count):
    return np.stack([np.full((8, 8, 3), 20 * i, np.uint8) for i in range(count)]), [Prompt("a cat")] * count


@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_each_picture_is_compared_with_its_neighbours(count):
    pairs = ring(count, "seed")
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == (1 if count == 2 else count)
    times = Counter(number for pair in pairs for number in pair)
    assert set(times.values()) == {1 if count == 2 else NEIGHBOURS}
    assert ring(count, "seed") == pairs
    reached = {0}
    for _ in pairs:
        reached |= {number for pair in pairs if reached & {*pair} for number in pair}
    assert reached == set(range(count))  # a ring, not two of them


def test_strengths_of_one_vote_by_hand():
    # the two are s and -s, and s / std^2 = 1 - sigmoid(2 s) by the gradient
    for std in (0.5, 1.0, 3.0):
        first, second = strengths(2, [(0, 1, 1.0)], std)
        assert second == pytest.approx(-first)
        assert first / std**2 == pytest.approx(1 - 1 / (1 + math.exp(-2 * first)))
    assert strengths(2, [(0, 1, 0.5)]) == pytest.approx([0, 0])


def test_strengths_are_the_maximum_of_the_posterior():
    votes = [(0, 1, 1.0), (1, 2, 1.0), (2, 0, 0.5), (0, 1, 1.0), (3, 2, 0.0)]

    def log_posterior(s):
        odds = [(s[a] - s[b], share) for a, b, share in votes]
        likelihood = sum(-share * math.log1p(math.exp(-x)) - (1 - share) * math.log1p(math.exp(x)) for x, share in odds)
        return likelihood - 0.5 * sum(x * x for x in s)

    best = strengths(4, votes)
    assert best.argmax() == 0 and best.argmin() == 3
    draw = np.random.default_rng(0)
    assert all(log_posterior(best) > log_posterior(best + 0.01 * draw.normal(size=4)) for _ in range(50))


def test_a_picture_without_a_vote_has_no_strength():
    assert np.isnan(strengths(3, [(0, 2, 1.0)])).tolist() == [False, True, False]
    assert np.isnan(strengths(2, [])).all()


def votes_of(folder, prefer):
    """Answer the reward's questions until `over` is set."""
    over = threading.Event()

    def vote():
        questions, votes = Questions(folder), Votes(folder)
        while not over.wait(0.01):
            for question in questions.now():
                votes.add(question, prefer(question), "ann")

    thread = threading.Thread(target=vote)
    thread.start()
    return over, thread


def test_votes_become_scores_in_order(tmp_path):
    reward = VotesReward(tmp_path, timeout=20)
    pictures_NHWC, prompts = group(4)
    reward.check(prompts)
    from PIL import Image

    def brighter(question):
        return float(np.asarray(Image.open(question.image_a)).mean() > np.asarray(Image.open(question.image_b)).mean())

    over, thread = votes_of(tmp_path, brighter)
    try:
        scores = reward.score(pictures_NHWC[[2, 0, 3, 1, 0]], [prompts[0]] * 5)
        values = [score.number() for score in scores]
        assert values[2] == max(values) and values[1] == values[4] == min(values)  # equal pictures have one strength
        over.set()
        thread.join()
        start = time.perf_counter()
        again = reward.score(pictures_NHWC[[0, 1, 2, 3]], prompts)  # a resumed run: the votes are there
        assert time.perf_counter() - start < 5
        assert [score.value for score in again] == [values[1], values[3], values[0], values[2]]
    finally:
        over.set()
        thread.join()


def test_what_nobody_votes_on_is_missing(tmp_path):
    reward = VotesReward(tmp_path, timeout=0.1)
    pictures_NHWC, prompts = group(3)
    reward.check(prompts)
    scores = reward.score(pictures_NHWC, prompts)
    assert {(score.value, score.error) for score in scores} == {(None, "nobody voted in time")}
    same = reward.score(pictures_NHWC[[0, 0]], prompts[:2])
    assert all(score.value is None and "cannot be compared" in str(score.error) for score in same)


def test_people_are_asked_about_groups_alone_and_once(tmp_path):
    term = RewardTerm("votes", model=str(tmp_path), timeout=0.1, retries=3)
    reward = load_reward(term)
    mixture = RewardMixture([component_from(term, reward, 4)])
    pictures_NHWC, prompts = group(3)
    reward.check(prompts)
    start = time.perf_counter()
    scores = mixture.score(pictures_NHWC, prompts, torch.tensor([0, 1, 1]))
    assert time.perf_counter() - start < 1  # a retry would wait for a second first
    assert scores.value_N.isnan().all()
    failures = mixture.failures()
    assert (failures.asked, failures.missing) == ({"votes": 2}, {"votes": 2})


def test_a_folder_must_be_named_and_makeable(tmp_path):
    with pytest.raises(Refusal, match="no folder is named; set model to one"):
        load_reward(RewardTerm("votes"))
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match="cannot be made"):
        load_reward(RewardTerm("votes", model=str(tmp_path / "file" / "x"))).check([])
