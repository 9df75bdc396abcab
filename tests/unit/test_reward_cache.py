"""Scores are paid for once, and only what is the same is the same."""

import copy
import math
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import date

import numpy as np
import pytest
import torch
from PIL import Image

from progrpo.rewards.base import Refusal, Reward, Score
from progrpo.rewards.cache import CachedReward, stamp_of
from progrpo.rewards.function import FunctionReward
from progrpo.rewards.mixture import component_from
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

PICTURES = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
PROMPTS = [Prompt(f"p{i}", {"n": i}) for i in range(6)]


class Paid(Reward):
    def __init__(self, fails=()):
        self.shown, self.fails = [], set(fails)

    def score(self, pictures_NHWC, prompts):
        assert len(pictures_NHWC) == len(prompts)
        self.shown += [p.text for p in prompts]
        return [
            Score(None, error="gone") if p.text in self.fails else Score(float(x.mean()), bool(x.mean() > 127))
            for x, p in zip(pictures_NHWC, prompts, strict=True)
        ]


def test_what_was_scored_is_not_asked_again_and_comes_back_the_same(tmp_path):
    paid = Paid()
    expected = Paid().score(PICTURES, PROMPTS)
    cached = CachedReward(paid, "vlm gpt", tmp_path)
    assert cached.score(PICTURES[:4], PROMPTS[:4]) == expected[:4]
    order = [5, 2, 0, 4]
    assert cached.score(PICTURES[order], [PROMPTS[i] for i in order]) == [expected[i] for i in order]
    assert paid.shown == ["p0", "p1", "p2", "p3", "p5", "p4"]
    again = Paid()
    assert CachedReward(again, "vlm gpt", tmp_path).score(PICTURES, PROMPTS) == expected and again.shown == []


def test_another_picture_prompt_column_or_reward_is_another_score(tmp_path):
    paid = Paid()
    CachedReward(paid, "vlm", tmp_path).score(PICTURES[:1], PROMPTS[:1])
    changed = PICTURES[:1].copy()
    changed[0, 0, 0, 0] ^= 1
    reshaped = PICTURES[:1].reshape(1, 5, 4, 3)
    cases = (
        ("vlm", changed, PROMPTS[0]),
        ("vlm", reshaped, PROMPTS[0]),
        ("vlm", PICTURES[:1], Prompt("other", {"n": 0})),
        ("vlm", PICTURES[:1], Prompt("p0", {"n": 1})),
        ("vlm other", PICTURES[:1], PROMPTS[0]),
    )
    for i, (identity, picture, prompt) in enumerate(cases):
        CachedReward(paid, identity, tmp_path).score(picture, [prompt])
        assert len(paid.shown) == 2 + i


def test_a_models_files_that_change_are_another_model(tmp_path):
    folder, weights = tmp_path / "model", tmp_path / "model" / "unet" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    assert stamp_of(folder) == stamp_of(tmp_path / "nothing") == ""
    weights.write_bytes(b"one")
    os.utime(weights, ns=(0, 10**9))
    first = stamp_of(folder)
    assert first and first == stamp_of(folder)
    weights.write_bytes(b"two")
    os.utime(weights, ns=(0, 2 * 10**9))
    assert len({first, stamp_of(folder), stamp_of(weights)}) == 3


def test_a_local_model_that_was_trained_further_is_asked_again(tmp_path):
    weights, rewards = tmp_path / "head.safetensors", []
    term = RewardTerm("my:reward", model=str(weights), cache=str(tmp_path / "cache"))
    for content in (b"one", b"one", b"other"):
        if not weights.exists() or weights.read_bytes() != content:
            weights.write_bytes(content)
        rewards.append(Paid())
        component_from(term, rewards[-1], 1).reward.score(PICTURES[:1], PROMPTS[:1])
    assert [paid.shown for paid in rewards] == [["p0"], [], ["p0"]]


def test_a_source_picture_is_identified_by_its_pixels(tmp_path):
    paid, source = Paid(), Image.fromarray(PICTURES[1])
    source.save(tmp_path / "a.png")
    Image.fromarray(PICTURES[2]).save(tmp_path / "b.png")
    cached = CachedReward(paid, "vlm", tmp_path)
    cached.score(PICTURES[:1], [Prompt("p", {"image": source})])
    cached.score(PICTURES[:1], [Prompt("p", {"image": source.copy()})])
    cached.score(PICTURES[:1], [Prompt("p", {"image": str(tmp_path / "a.png")})])
    assert paid.shown == ["p"]
    cached.score(PICTURES[:1], [Prompt("p", {"image": str(tmp_path / "b.png")})])
    assert paid.shown == ["p", "p"]


def test_columns_that_json_does_not_know_are_identified_by_what_they_hold(tmp_path):
    many = np.arange(2000)
    other = many.copy()
    other[1000] = -1  # which NumPy leaves out of an array's text
    red, blue = (Image.new("RGB", (2, 2), color) for color in ("red", "blue"))
    pairs = [(many, other), (torch.zeros(2000), torch.ones(2000)), (red, blue), (b"1", b"2"), (date.min, date.max)]
    paid = Paid()
    cached = CachedReward(paid, "vlm", tmp_path)
    for one, another in pairs:
        before = len(paid.shown)
        for value in (one, another, copy.deepcopy(one)):
            cached.score(PICTURES[:1], [Prompt("same", {"about": value})])
        assert len(paid.shown) == before + 2


@pytest.mark.parametrize("value", [object(), {1: 2, "a": 3}, {"deep": object()}])
def test_columns_without_an_identity_are_refused_before_a_picture_is_drawn(tmp_path, value):
    cached = CachedReward(Paid(), "vlm", tmp_path)
    problem = r"^reward 'vlm': the columns of the prompt 'a' cannot be told from others \(.*; leave out its cache$"
    for ask in (cached.check, lambda prompts: cached.score(PICTURES[:1], prompts)):
        with pytest.raises(Refusal, match=problem):
            ask([Prompt("a", {"about": value})])


def test_a_cache_that_is_lost_on_the_way_is_refused_in_a_sentence(tmp_path):
    cached = CachedReward(Paid(), "vlm", tmp_path / "kept")
    (tmp_path / "kept" / "vlm.sqlite").write_bytes(b"another's" * 200)
    with pytest.raises(Refusal, match=r"^reward 'vlm': its cache .*kept cannot be used \(file is not a database\)"):
        cached.score(PICTURES[:1], PROMPTS[:1])


def test_failures_are_asked_about_again(tmp_path):
    paid = Paid(fails={"p1"})
    cached = CachedReward(paid, "vlm", tmp_path)
    assert cached.score(PICTURES[:3], PROMPTS[:3])[1] == Score(None, error="gone")
    paid.fails.clear()
    assert cached.score(PICTURES[:3], PROMPTS[:3])[1].value is not None
    assert paid.shown == ["p0", "p1", "p2", "p1"]


def test_a_value_that_is_no_number_is_not_kept(tmp_path):
    class Nan(Paid):
        def score(self, pictures_NHWC, prompts):
            super().score(pictures_NHWC, prompts)
            return [Score(math.nan)] * len(prompts)

    paid = Nan()
    cached = CachedReward(paid, "vlm", tmp_path)
    for _ in range(2):
        assert math.isnan(cached.score(PICTURES[:1], PROMPTS[:1])[0].number())
    assert paid.shown == ["p0", "p0"]


def test_numpys_numbers_come_back_as_they_were_given(tmp_path):
    def judge(images, prompts):
        return [Score(np.float32(0.5), passed=np.bool_(text == "p0")) for text in prompts]  # type: ignore[arg-type]

    cached = CachedReward(FunctionReward(judge), "mine", tmp_path)
    for _ in range(2):
        assert cached.score(PICTURES[:2], PROMPTS[:2]) == [Score(0.5, True), Score(0.5, False)]


def test_equal_pictures_of_one_call_are_paid_for_once(tmp_path):
    paid = Paid()
    rows = [0, 1, 0, 0]
    scores = CachedReward(paid, "vlm", tmp_path).score(PICTURES[rows], [PROMPTS[i] for i in rows])
    assert scores[0] == scores[2] == scores[3] != scores[1] and paid.shown == ["p0", "p1"]


def test_several_threads_share_it(tmp_path):
    cached, expected = CachedReward(Paid(), "vlm", tmp_path), Paid().score(PICTURES, PROMPTS)
    with ThreadPoolExecutor(4) as threads:
        scores = list(threads.map(lambda _: cached.score(PICTURES, PROMPTS), range(12)))
    assert scores == [expected] * 12


def test_no_pictures_no_scores(tmp_path):
    assert CachedReward(Paid(), "vlm", tmp_path).score(PICTURES[:0], []) == []


def test_a_folder_that_cannot_be_one_or_holds_another_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "vlm.sqlite").write_text("not a database, but long enough to look at: " * 99)
    for name in ("file", "folder"):
        with pytest.raises(Refusal, match=rf"reward 'vlm': its cache .*{name} cannot be used .*; name another folder"):
            CachedReward(Paid(), "vlm", tmp_path / name)
