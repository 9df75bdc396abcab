"""The continuous match: near 1 for the target scene, and less with every fault, the more the larger it is."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from progrpo.rewards.shapes import MatchReward
from progrpo.types import Prompt
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.match import match, target_objects
from progrpo.zoo.shapes.verifier import verify
from progrpo.zoo.shapes.world import COLOURS, EXTENT, SHAPES, Scene, Shape
from progrpo.zoo.splits import SPLITS

GROUND = (0.94, 0.93, 0.92)
PROMPTS = world.sample_prompts("train", 120, seed=5)


def ideal(prompt: Prompt) -> list[Shape]:
    return [Shape(t.shape, t.colour or "blue", t.x, t.y, t.size) for t in target_objects(prompt)]


def drawn(shapes: Sequence[Shape]) -> np.ndarray:
    return world.draw(Scene(tuple(shapes), GROUND))


def scored(prompt: Prompt, pictures: Sequence[np.ndarray]) -> np.ndarray:
    return np.array(match(np.stack(pictures), [prompt] * len(pictures)))


def asked(kind: str) -> list[Prompt]:
    return [p for p in PROMPTS if p.columns["kind"] == kind]


def assert_falling(scores: np.ndarray) -> None:
    assert (np.diff(scores) < 0).all(), scores


def painted(prompt: Prompt, share: float, towards: str) -> np.ndarray:
    """The target scene of one object, its colour a mixture with another."""
    (shape,) = ideal(prompt)
    there, other = (drawn([replace(shape, colour=c)]).astype(float) for c in (shape.colour, towards))
    return (there + share * (other - there)).round().astype(np.uint8)


@pytest.mark.parametrize("kind", world.KINDS)
def test_the_target_scene_is_near_the_top_and_right_scenes_with_other_layouts_are_below(kind):
    rng = np.random.default_rng(0)
    for prompt in asked(kind):
        best, *others = scored(
            prompt, [drawn(ideal(prompt)), *(world.draw(world.scene_for(prompt, rng)) for _ in range(8))]
        )
        assert 0.88 < best <= 1
        assert best > max(others) > 0.3


@pytest.mark.parametrize("kind", world.KINDS)
def test_the_target_scene_is_what_the_prompt_says_and_lies_in_the_picture(kind):
    for prompt in asked(kind):
        shapes = ideal(prompt)
        assert [[t.colour, t.shape] for t in target_objects(prompt)] == [list(o) for o in prompt.columns["objects"]]
        for s in shapes:
            reach = s.size * EXTENT[s.shape]
            assert reach <= min(s.x, s.y) and max(s.x, s.y) <= world.SIZE - reach
        for i, a in enumerate(shapes):
            apart = [max(abs(a.x - b.x), abs(a.y - b.y)) for b in shapes[:i]]
            assert all(far > 14 for far in apart)
        if prompt.columns["relation"]:
            (dx, dy), (a, b) = world.RELATIONS[prompt.columns["relation"]], shapes
            assert (a.x - b.x) * dx + (a.y - b.y) * dy == pytest.approx(np.hypot(a.x - b.x, a.y - b.y))


def test_prompts_of_different_words_want_different_things():
    layouts = {p.text: tuple((t.shape, t.colour, t.x, t.y, t.size) for t in target_objects(p)) for p in PROMPTS}
    words = {(str(p.columns["objects"]), p.columns["relation"]) for p in PROMPTS}
    assert len(set(layouts.values())) == len(words)
    places = [(t.x, t.y) for p in asked("colours") for t in target_objects(p)]
    assert np.std(places, axis=0).min() > 3


@pytest.mark.parametrize("colour", COLOURS)
def test_a_colour_loses_the_more_the_farther_it_goes(colour):
    (prompt,) = [p for p in _all("colours") if p.columns["objects"] == [[colour, "circle"]]]
    for towards in COLOURS:
        if towards != colour:
            shares = [0, 0.1, 0.2, 0.35, 0.5, 0.7, 1]
            assert_falling(scored(prompt, [painted(prompt, share, towards) for share in shares]))


def test_any_colour_of_the_palette_is_right_where_none_is_asked_for():
    (prompt, *_) = asked("single")
    (shape,) = ideal(prompt)
    scores = scored(prompt, [drawn([replace(shape, colour=c)]) for c in COLOURS])
    assert scores == pytest.approx(scores.max(), rel=0.05)
    assert_falling(scored(prompt, [painted(prompt, share, "yellow") for share in (0, 0.2, 0.4)]))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_outline_loses_against_every_other(shape):
    (prompt,) = [p for p in _all("colours") if p.columns["objects"] == [["blue", shape]]]
    (right,) = ideal(prompt)
    best, *others = scored(prompt, [drawn([right]), *(drawn([_as(right, s)]) for s in SHAPES if s != shape)])
    assert max(others) < best - 0.1


def _as(shape: Shape, other: str) -> Shape:
    return replace(shape, shape=other, size=shape.size * EXTENT[shape.shape] / EXTENT[other])


def test_an_outline_loses_the_more_the_more_it_is_bitten():
    (prompt,) = [p for p in _all("colours") if p.columns["objects"] == [["blue", "circle"]]]
    (shape,) = ideal(prompt)
    pictures = []
    for bite in range(6):
        picture = drawn([shape])
        picture[:, : round(shape.x - shape.size) + bite] = picture[0, 0]
        pictures.append(picture)
    assert_falling(scored(prompt, pictures))


@pytest.mark.parametrize("kind", world.KINDS)
def test_size_and_place_lose_the_more_the_farther_they_are_off(kind):
    for prompt in asked(kind)[:6]:
        first, *rest = ideal(prompt)
        shares = [1, 0.75, 0.5, 0.25]  # steps of less than a pixel are the grid's
        assert_falling(scored(prompt, [drawn([replace(first, size=first.size * s), *rest]) for s in shares]))
        x, y = np.sign([first.x - 32, first.y - 32])  # outwards, away from the others
        shifts = [0, 2, 4]
        moved = [replace(first, x=first.x + d * x, y=first.y + d * y) for d in shifts]
        if all(s.size * EXTENT[s.shape] <= min(s.x, s.y, 64 - s.x, 64 - s.y) for s in moved):
            assert_falling(scored(prompt, [drawn([s, *rest]) for s in moved]))


def test_a_relation_loses_the_more_the_farther_round_the_pair_is_turned():
    for prompt in asked("position")[:8]:
        a, b = ideal(prompt)
        pictures = []
        for angle in np.deg2rad([0, 20, 40, 60, 80, 100, 120, 140, 160, 180]):
            x, y = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ (a.x - 32, a.y - 32)
            pictures.append(drawn([replace(a, x=32 + x, y=32 + y), replace(b, x=32 - x, y=32 - y)]))
        scores = scored(prompt, pictures)
        assert_falling(scores[:5])
        assert scores[-1] < scores[0] - 0.15


@pytest.mark.parametrize("kind", ["two", "counting", "position", "binding"])
def test_a_missing_object_loses_its_share_and_a_fading_one_a_part_of_it(kind):
    for prompt in asked(kind)[:6]:
        shapes = ideal(prompt)
        whole, without = (drawn(s).astype(float) for s in (shapes, shapes[1:]))
        fading = [(whole + f * (without - whole)).round().astype(np.uint8) for f in (0, 0.2, 0.4, 0.6, 1)]
        scores = scored(prompt, fading)
        assert_falling(scores)
        assert scores[-1] == pytest.approx(scores[0] * (1 - 1 / len(shapes)), abs=0.03)


def test_surplus_ink_loses_by_its_share_of_all_ink():
    for prompt in asked("colours")[:8]:
        (shape,) = ideal(prompt)
        corner = 11.0 if shape.x > 32 else 53.0, 11.0 if shape.y > 32 else 53.0
        sizes = np.array([0.001, 1, 2, 4, 6, 8])
        scores = scored(prompt, [drawn([shape, Shape("square", "green", *corner, float(s))]) for s in sizes])
        assert_falling(scores)
        area = (2 * shape.size * EXTENT[shape.shape]) ** 2 * _fill(shape.shape)
        surplus = (2 * sizes * EXTENT["square"]) ** 2
        assert scores == pytest.approx(scores[0] * area / (area + surplus), rel=0.08)


def _fill(shape: str) -> float:
    axis = (np.arange(400) + 0.5) / 200 - 1
    return float(SHAPES[shape](axis[None], axis[:, None]).mean())


def test_a_step_of_one_level_in_one_pixel_moves_the_score_a_little():
    rng = np.random.default_rng(0)
    prompts = PROMPTS[:24]
    pictures = np.stack([world.draw(world.scene_for(p, rng)) for p in prompts])
    before = np.array(match(pictures, prompts))
    for _ in range(40):
        changed = pictures.astype(np.int16)
        rows, columns, channels = rng.integers(0, 64, 24), rng.integers(0, 64, 24), rng.integers(0, 3, 24)
        changed[np.arange(24), rows, columns, channels] += rng.choice([-1, 1], 24).astype(np.int16)
        assert match(changed.clip(0, 255).astype(np.uint8), prompts) == pytest.approx(before, abs=1e-3)


def test_the_order_of_objects_in_the_picture_is_no_matter():
    for prompt in asked("counting") + asked("binding"):
        shapes = ideal(prompt)
        forwards, backwards = scored(prompt, [drawn(shapes), drawn(shapes[::-1])])
        assert forwards == backwards


def test_blank_noise_and_no_pictures():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    for low, high in ((0, 256), (100, 140), (250, 256)):
        scores = np.array(match((low + noise.astype(int) * (high - low) // 256).astype(np.uint8), PROMPTS[:24]))
        assert np.isfinite(scores).all() and (scores >= 0).all() and (scores < 0.3).all()
    assert match(np.full((24, 64, 64, 3), 200, np.uint8), PROMPTS[:24]) == [0.0] * 24
    assert match(noise[:0], []) == []


def _all(kind: str) -> list[Prompt]:
    return [p for split in SPLITS for p in world.prompts(split)[kind]]


def test_the_strict_verdict_stands_beside_the_value_and_has_no_part_in_it():
    prompts = asked("binding")[:4]
    right = [drawn(ideal(p)) for p in prompts]
    wrong = [drawn(ideal(p)[:1]) for p in prompts]
    pictures, both = np.stack([*right, *wrong]), [*prompts, *prompts]
    scores = MatchReward().score(pictures, both)
    assert [s.passed for s in scores] == [v.strict for v in verify(pictures, both)] == [True] * 4 + [False] * 4
    assert [s.value for s in scores] == match(pictures, both)
