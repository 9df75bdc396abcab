from itertools import combinations

import numpy as np
import pytest

from progrpo.types import Prompt
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.verifier import satisfies
from progrpo.zoo.shapes.world import COLOURS, EXTENT, KINDS, RELATIONS, SHAPES, SIZE, Scene, Shape, draw
from progrpo.zoo.splits import SPLITS

PAIRS_OF_SPLITS = list(combinations(SPLITS, 2))


def combination(prompt: Prompt) -> tuple[str, frozenset | tuple]:
    """A prompt's kind and objects, without order, phrase or relation; `single` and `two` differ by phrase only."""
    kind, objects = prompt.columns["kind"], [tuple(o) for o in prompt.columns["objects"]]
    if kind in ("position", "binding"):
        return "pair", frozenset(objects)
    phrase = [w for w in prompt.text.split() if w not in SHAPES] if kind in ("single", "two") else []
    return kind, (tuple(sorted(objects, key=str)), *phrase)


def everything(split: str) -> list[Prompt]:
    return [p for prompts in world.prompts(split).values() for p in prompts]


def scenes(split: str, count: int, seed: int = 0) -> list[tuple[Prompt, Scene]]:
    rng = np.random.default_rng(seed)
    return [(p, world.scene_for(p, rng)) for p in world.sample_prompts(split, count, seed)]


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), PAIRS_OF_SPLITS)
def test_splits_share_no_text_and_no_combination(a, b):
    assert not {p.text for p in everything(a)} & {p.text for p in everything(b)}
    assert not {combination(p) for p in everything(a)} & {combination(p) for p in everything(b)}


def test_position_and_binding_agree_on_the_split_of_a_pair():
    by_split = {s: {combination(p) for kind in ("position", "binding") for p in world.prompts(s)[kind]} for s in SPLITS}
    for a, b in PAIRS_OF_SPLITS:
        assert not by_split[a] & by_split[b]
    things = [(c, s) for c in COLOURS for s in SHAPES]
    assert set().union(*by_split.values()) == {("pair", frozenset(pair)) for pair in combinations(things, 2)}


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_every_kind_and_no_text_twice(split):
    table = world.prompts(split)
    assert tuple(table) == KINDS
    assert all(table[kind] for kind in KINDS)
    assert all(p.columns["kind"] == kind for kind in KINDS for p in table[kind])
    texts = [p.text for p in everything(split)]
    assert len(texts) == len(set(texts))


def test_sizes_of_the_splits_are_their_shares():
    total = sum(len(everything(split)) for split in SPLITS)
    for split, (low, high) in SPLITS.items():
        assert len(everything(split)) / total == pytest.approx(high - low, abs=0.02)


def test_every_relation_of_a_pair_is_asked_for_both_ways_round():
    prompts = [p for p in everything("test") if p.columns["kind"] == "position"]
    for pair in {combination(p) for p in prompts}:
        own = [p for p in prompts if combination(p) == pair]
        assert len({tuple(map(tuple, p.columns["objects"])) for p in own}) == 2
        assert sorted(p.columns["relation"] for p in own) == sorted([*RELATIONS] * 2)


def test_grammar():
    texts = [p.text for split in SPLITS for p in everything(split)]
    assert not any("a orange" in t or "an red" in t or "crosss" in t for t in texts)
    assert {"an orange circle", "four crosses", "two orange squares", "a picture of a triangle"} <= set(texts)
    assert any(t.endswith(" an orange square") for t in texts)


def test_columns_list_what_the_text_says():
    by_text = {p.text: p.columns for split in SPLITS for p in everything(split)}
    assert by_text["three blue crosses"] == {"kind": "counting", "objects": [["blue", "cross"]] * 3, "relation": None}
    assert by_text["a red circle left of a blue square"] == {
        "kind": "position",
        "objects": [["red", "circle"], ["blue", "square"]],
        "relation": "left of",
    }


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of train, validation, test, not 'dev'"):
        world.prompts("dev")


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_sampled_prompts_follow_from_the_seed():
    first, second, other = (world.sample_prompts("train", 60, seed) for seed in (3, 3, 4))
    assert first == second
    assert first != other
    assert world.sample_prompts("train", 30, 3) == first[:30]


def test_kinds_come_in_turn():
    kinds = [p.columns["kind"] for p in world.sample_prompts("validation", 18, 0)]
    assert kinds == list(KINDS) * 3
    assert {p.columns["kind"] for p in world.sample_prompts("test", 8, 0, ("two", "colours"))} == {"two", "colours"}


def test_no_prompt_comes_again_before_all_have_come():
    counting = world.prompts("test")["counting"]
    sampled = world.sample_prompts("test", 2 * len(counting), 5, ("counting",))
    for half in (sampled[: len(counting)], sampled[len(counting) :]):
        assert {p.text for p in half} == {p.text for p in counting}


# --- scenes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_satisfies_its_prompt(split):
    for prompt, scene in scenes(split, 300):
        assert satisfies([(s.colour, s.shape, s.x, s.y) for s in scene.shapes], prompt)


def pixels(s: Shape) -> np.ndarray:
    """bool (64, 64): the pixels that a shape touches."""
    alone = draw(Scene((s,), (1.0, 1.0, 1.0)))
    return (alone != 255).any(-1)


def test_objects_do_not_overlap_and_lie_inside():
    for _, scene in scenes("train", 200):
        masks = [pixels(s) for s in scene.shapes]
        assert np.sum(masks, axis=0).max() == 1
        border = np.concatenate([m[edge] for m in masks for edge in (0, -1, (slice(None), 0), (slice(None), -1))])
        assert not border.any()


def test_drawn_pairs_keep_within_forty_degrees():
    for prompt, scene in scenes("test", 120):
        if prompt.columns["relation"] is not None:
            a, b = scene.shapes
            dx, dy = RELATIONS[prompt.columns["relation"]]
            cosine = ((a.x - b.x) * dx + (a.y - b.y) * dy) / np.hypot(a.x - b.x, a.y - b.y)
            assert cosine > np.cos(np.deg2rad(40))


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_examples_follow_from_the_seed():
    (p1, a), (p2, b), (_, c) = (world.examples("train", 24, seed) for seed in (1, 1, 2))
    assert p1 == p2
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert a.dtype == np.uint8
    assert a.shape == (24, SIZE, SIZE, 3)


def test_a_drawn_picture_holds_the_ground_and_the_colours():
    square = Shape("square", "red", 20.0, 40.0, 10.0)  # from x 11.2 to 28.8
    picture = draw(Scene((square,), (1.0, 1.0, 1.0)))
    assert (picture[0, 0] == 255).all()
    assert picture[40, 20].tolist() == [round(255 * c) for c in COLOURS["red"]]
    red = picture[40, :, 1].astype(float)  # 255 on the ground, 36 on the square, between them by coverage
    cover = (255 - red) / (255 - 255 * COLOURS["red"][1])
    assert cover.sum() == pytest.approx(2 * 10 * EXTENT["square"], abs=0.5)
    assert (cover * (np.arange(SIZE) + 0.5)).sum() / cover.sum() == pytest.approx(20, abs=0.15)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_bounding_box(shape):
    axis = np.linspace(-1.5, 1.5, 601)
    y, x = np.nonzero(SHAPES[shape](axis[None], axis[:, None]))
    assert (axis[x].min(), axis[x].max(), axis[y].min(), axis[y].max()) == pytest.approx((-1, 1, -1, 1))


def test_a_picture_can_be_drawn_larger():
    (_, scene), *_ = scenes("test", 1)
    large, small = draw(scene, 128), draw(scene)
    assert large.shape == (128, 128, 3)
    halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(halved - small).mean() < 1
