"""What every reward promises, built in or a user's function."""

import string

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from progrpo.rewards.base import Score
from progrpo.rewards.clip import ClipScore
from progrpo.rewards.function import FunctionReward
from progrpo.rewards.hpsv2 import HPSv2
from progrpo.rewards.load import REWARDS
from progrpo.rewards.pickscore import PickScore
from progrpo.zoo.shapes import world

PROMPTS, PICTURES = world.examples("test", 24, seed=3)
PROMPTS = [*PROMPTS[:12], *PROMPTS[13:], PROMPTS[12]]  # half of the pictures are not what is asked for


def brightness(images, prompts):
    """Of each picture, shifted by its prompt; of dark pictures none."""
    means = [float(np.asarray(i).mean()) for i in images]
    return [None if m < 200 else m + len(p) for m, p in zip(means, prompts, strict=True)]


def wanted_objects(images, prompts, objects):
    return np.array([len(o) / len(p) for o, p in zip(objects, prompts, strict=True)], np.float32)


def all_columns(images, prompts, **columns):
    return [len(kind) + len(wanted) for kind, wanted in zip(columns["kind"], columns["objects"], strict=True)]


class Contrast:
    def __call__(self, images, prompts):
        return [float(np.asarray(i).std()) for i in images]


def small(kind: type[ClipScore]) -> ClipScore:
    """A reward of the hub's on a CLIP of random weights."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    words = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, **tower}
    config = CLIPConfig(text_config=text, vision_config={"patch_size": 56, **tower}, initializer_factor=4.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(CLIPModel(config), CLIPTokenizer(vocab=words, merges=[]), CLIPImageProcessorPil())


BUILDERS = {
    **REWARDS,
    "pickscore": lambda: small(PickScore),
    "hpsv2": lambda: small(HPSv2),
    "function": lambda: FunctionReward(brightness),
    "function of a column": lambda: FunctionReward(wanted_objects),
    "function of all columns": lambda: FunctionReward(all_columns),
    "callable object": lambda: FunctionReward(Contrast()),
}


@pytest.fixture(params=BUILDERS)
def reward(request):
    return BUILDERS[request.param]()


def test_one_score_a_picture_of_plain_types(reward):
    scores = reward.score(PICTURES, PROMPTS)
    assert len(scores) == len(PICTURES)
    for score in scores:
        assert isinstance(score, Score)
        assert score.value is None or type(score.value) is float
        assert score.passed is None or isinstance(score.passed, bool)
        assert isinstance(score.number(), float)
    assert len({s.value for s in scores}) > 1


def test_order_is_kept_and_pictures_do_not_see_each_other(reward):
    rounding = 1e-6 if isinstance(reward, ClipScore) else 0.0  # a network's kernels differ by the size of their batch
    together = reward.score(PICTURES, PROMPTS)
    alone = [reward.score(PICTURES[i : i + 1], PROMPTS[i : i + 1])[0] for i in range(len(PROMPTS))]
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    shuffled = reward.score(PICTURES[order], [PROMPTS[i] for i in order])
    for scores, expected in ((alone, together), (shuffled, [together[i] for i in order])):
        assert [s.passed for s in scores] == [s.passed for s in expected]
        numbers = [s.number() for s in expected]
        assert [s.number() for s in scores] == pytest.approx(numbers, rel=0.0, abs=rounding, nan_ok=True)


def test_the_same_twice(reward):
    assert reward.score(PICTURES, PROMPTS) == reward.score(PICTURES, PROMPTS)


def test_pictures_and_prompts_are_left_alone(reward):
    pictures, prompts = PICTURES.copy(), list(PROMPTS)
    columns = [dict(p.columns) for p in PROMPTS]
    reward.score(pictures, prompts)
    assert np.array_equal(pictures, PICTURES)
    assert prompts == PROMPTS
    assert [p.columns for p in prompts] == columns


def test_read_only_and_strided_pictures(reward):
    wide = np.repeat(PICTURES, 2, axis=0)[::2]
    wide.setflags(write=False)
    assert reward.score(wide, PROMPTS) == reward.score(PICTURES, PROMPTS)
