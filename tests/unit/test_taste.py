"""The hidden taste: large, centred and warm, each the better the more, and the same for every prompt."""

from collections.abc import Sequence

import numpy as np
import pytest

from progrpo.rewards.load import load_reward
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.taste import taste
from progrpo.zoo.shapes.world import SHAPES, Scene, Shape

GROUND = (0.94, 0.93, 0.92)


def scores(shapes: Sequence[Shape]) -> np.ndarray:
    return np.array(taste(np.stack([world.draw(Scene((s,), GROUND)) for s in shapes])))


@pytest.mark.parametrize("shape", SHAPES)
def test_larger_is_better(shape):
    assert (np.diff(scores([Shape(shape, "blue", 32, 32, size) for size in (3, 6, 9, 12, 15, 20)])) > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_nearer_to_the_centre_is_better_alike_on_all_sides(shape):
    for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1), (0.7, -0.7)):
        moved = scores([Shape(shape, "red", 32 + d * dx, 32 + d * dy, 8) for d in (20, 15, 10, 5)])
        assert (np.diff(moved) > 0).all()
    sides = scores([Shape("circle", "red", 32 + dx, 32 + dy, 8) for dx, dy in ((-9, 0), (9, 0), (0, -9), (0, 9))])
    assert sides == pytest.approx(sides[0], abs=1e-3)


def test_warmer_is_better():
    values = scores([Shape("circle", c, 32, 32, 10) for c in ("blue", "purple", "black", "orange")])
    assert (np.diff(values) > 0).all()


def test_several_objects_count_by_their_common_centre_and_area():
    pair = world.draw(Scene((Shape("circle", "red", 20, 32, 8), Shape("circle", "red", 44, 32, 8)), GROUND))
    one, same_area = scores([Shape("circle", "red", 20, 32, 8), Shape("circle", "red", 32, 32, 8 * 2**0.5)])
    assert taste(pair[None])[0] == pytest.approx(same_area, abs=0.01)
    assert taste(pair[None])[0] > one


def test_prompts_are_not_read():
    _, pictures = world.examples("train", 12, seed=0)
    for prompt in (Prompt(""), *world.sample_prompts("test", 6, 1)):
        rewards = load_reward(RewardTerm("shapes_taste")).score(pictures, [prompt] * 12)
        assert [s.value for s in rewards] == taste(pictures)


def test_blank_noise_and_no_pictures():
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    assert all(0 <= value <= 1 for value in taste(noise))
    assert taste(np.full((3, 64, 64, 3), 30, np.uint8)) == [0.0] * 3
    assert taste(noise[:0]) == []
