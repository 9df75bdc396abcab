"""The verifier on drawn truth, and on pictures that were tampered with after the prompt was chosen.

`axis` holds the centres of the finer pixels on which pictures are drawn: four to a pixel, so that edges are smooth.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import islice

import numpy as np
import pytest
from scipy import ndimage

from progrpo.types import Prompt
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.verifier import Verdict, look, related, satisfies, verify
from progrpo.zoo.shapes.world import COLOURS, EXTENT, SHAPES, Scene, Shape, draw

SUPERSAMPLE = 4
axis = (np.arange(world.SIZE * SUPERSAMPLE) + 0.5) / SUPERSAMPLE

Tampering = Callable[[Prompt, Scene, np.random.Generator], np.ndarray | None]  # None: not with this prompt


@cache
def truth(count: int = 600) -> tuple[list[Prompt], list[Scene], np.ndarray, list[Verdict]]:
    prompts = world.sample_prompts("test", count, seed=7)
    rng = np.random.default_rng(0)
    scenes = [world.scene_for(p, rng) for p in prompts]
    pictures = np.stack([draw(s) for s in scenes])
    return prompts, scenes, pictures, verify(pictures, prompts)


def strict(verdicts: list[Verdict]) -> float:
    return float(np.mean([v.strict for v in verdicts]))


def graded(verdicts: list[Verdict]) -> float:
    return float(np.mean([v.graded for v in verdicts]))


# --- truth ------------------------------------------------------------------------------------------------------------


def test_drawn_truth_passes():
    verdicts = truth()[3]
    assert strict(verdicts) >= 0.99
    assert graded(verdicts) >= 0.99
    assert all(0 <= v.graded <= 1 for v in verdicts)


@pytest.mark.parametrize("kind", world.KINDS)
def test_drawn_truth_of_every_kind_passes(kind):
    prompts, _, _, verdicts = truth()
    own = [v for p, v in zip(prompts, verdicts, strict=True) if p.columns["kind"] == kind]
    assert len(own) == 100
    assert strict(own) >= 0.97


def test_what_is_seen_is_what_was_drawn():
    _, scenes, _, verdicts = truth()
    for scene, verdict in zip(scenes, verdicts, strict=True):
        if not verdict.strict:
            continue
        drawn = sorted((s.x, s.y, s.colour, s.shape) for s in scene.shapes)
        seen = sorted((s.x, s.y, s.colour, s.shape) for s in verdict.seen)
        assert sorted(d[2:] for d in drawn) == sorted(s[2:] for s in seen)
        for x, y, *_ in drawn:  # a triangle's centre of mass lies a third of its half height below its box's centre
            assert min(np.hypot(x - a, y - b) for a, b, *_ in seen) < 6


@pytest.mark.parametrize("shape", SHAPES)
def test_measures_of_a_drawn_shape(shape):
    (seen,) = look(draw(Scene((Shape(shape, "blue", 30.5, 33.5, 12),), (0.95, 0.95, 0.95)))[None])[0]
    ideal = SHAPES[shape]((axis[None] - 30.5) / (12 * EXTENT[shape]), (axis[:, None] - 33.5) / (12 * EXTENT[shape]))
    assert (seen.colour, seen.shape, seen.well_formed) == ("blue", shape, True)
    assert seen.area == pytest.approx(ideal.sum() / SUPERSAMPLE**2, rel=0.08)
    assert seen.x == pytest.approx((ideal * axis[None]).sum() / ideal.sum(), abs=0.6)
    assert seen.y == pytest.approx((ideal * axis[:, None]).sum() / ideal.sum(), abs=0.6)
    assert max(seen.fits) == seen.fits[list(SHAPES).index(shape)] > 0.85


# --- robustness -------------------------------------------------------------------------------------------------------


def test_noise_is_forgiven():
    prompts, _, pictures, _ = truth()
    noisy = pictures + np.random.default_rng(1).normal(0, 4, pictures.shape)
    assert strict(verify(noisy.clip(0, 255).round().astype(np.uint8), prompts)) >= 0.95


def test_the_blur_of_a_decoder_is_forgiven():
    prompts, _, pictures, _ = truth()
    blurred = ndimage.gaussian_filter(pictures.astype(np.float32), (0, 0.6, 0.6, 0)).round().astype(np.uint8)
    assert strict(verify(blurred, prompts)) >= 0.95


def test_dirt_is_forgiven():
    prompts, _, pictures, _ = truth()
    dirty = pictures.copy()
    dirty[:, 1:4, 1:4] = 0
    assert strict(verify(dirty, prompts)) >= 0.95


def test_order_of_the_batch_does_not_matter():
    prompts, _, pictures, verdicts = truth()
    order = np.random.default_rng(2).permutation(len(prompts))
    assert verify(pictures[order], [prompts[i] for i in order]) == [verdicts[i] for i in order]


def test_a_verdict_does_not_depend_on_the_others():
    prompts, _, pictures, verdicts = truth()
    assert [verify(pictures[i : i + 1], prompts[i : i + 1])[0] for i in range(60)] == verdicts[:60]
    blank = np.full_like(pictures[:1], 240)
    assert (
        verify(np.concatenate([blank, pictures[:60], blank]), [prompts[0], *prompts[:60], prompts[0]])[1:-1]
        == verdicts[:60]
    )


def test_a_verdict_does_not_depend_on_what_is_scored_beside():
    """To the last bit, with pictures that a model may make: blurred, noisy, some of nothing but noise."""
    prompts, _, pictures, _ = truth()
    rng = np.random.default_rng(6)
    level = rng.choice([0, 4, 20, 60, 200], (150, 1, 1, 1))
    mixed = ndimage.gaussian_filter(pictures[:150] + level * rng.normal(size=(150, 64, 64, 3)), (0, 0.8, 0.8, 0))
    mixed = mixed.clip(0, 255).round().astype(np.uint8)
    together = verify(mixed, prompts[:150])
    assert [verify(mixed[i : i + 1], prompts[i : i + 1])[0] for i in range(150)] == together
    for start, stop in ((0, 47), (1, 50), (50, 150)):
        assert verify(mixed[start:stop], prompts[start:stop]) == together[start:stop]


def test_components_are_those_of_a_plain_labelling():
    """Blocks of random colours: they nest, fork and join, touch at corners and lie on the border."""
    rng = np.random.default_rng(7)
    colours = np.array([(240, 240, 240), *(np.array(c) * 255 for c in COLOURS.values())], np.uint8)
    blocks = rng.choice(len(colours), (40, 16, 12), p=[0.6, 0.14, 0.14, *[0.12 / 5] * 5])
    blocks = blocks.repeat(3, axis=1).repeat(4, axis=2)
    for drawn, seen in zip(blocks, look(colours[blocks]), strict=True):
        expected = []
        for i, colour in enumerate(COLOURS, start=1):
            labels, count = ndimage.label(drawn == i)
            places = (np.nonzero(labels == k) for k in range(1, count + 1))
            expected += [
                (colour, len(ys), xs.sum() / len(xs), ys.sum() / len(ys)) for ys, xs in places if len(ys) >= 16
            ]
        assert sorted((s.colour, s.area, s.x, s.y) for s in seen) == sorted(expected)


# --- tampering --------------------------------------------------------------------------------------------------------


def reach(s: Shape) -> float:
    return s.size * EXTENT[s.shape]


def paint(picture: np.ndarray, inside: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    """The picture with a mask on the finer pixels painted over."""
    cover = inside.astype(np.float32).reshape(64, SUPERSAMPLE, 64, SUPERSAMPLE).mean((1, 3))[..., None]
    return (picture * (1 - cover) + np.asarray(colour) * 255 * cover + 0.5).astype(np.uint8)


def mask(s: Shape) -> np.ndarray:
    return SHAPES[s.shape]((axis[None] - s.x) / reach(s), (axis[:, None] - s.y) / reach(s))


def edited(scene: Scene, i: int, **changes) -> Scene:
    return replace(scene, shapes=tuple(replace(s, **changes) if j == i else s for j, s in enumerate(scene.shapes)))


def another(value: str, choices: dict, rng: np.random.Generator) -> str:
    return str(rng.choice([c for c in choices if c != value]))


def any_of(scene: Scene, rng: np.random.Generator) -> int:
    return int(rng.integers(len(scene.shapes)))


def without(scene: Scene, i: int) -> Scene:
    return replace(scene, shapes=scene.shapes[:i] + scene.shapes[i + 1 :])


def one_more(prompt, scene, rng):
    """A copy of one of the objects, in a free place."""
    twin = replace(scene.shapes[any_of(scene, rng)], size=7.5)
    for _ in range(200):
        x, y = rng.uniform(reach(twin) + 2, world.SIZE - reach(twin) - 2, 2)
        if all(np.hypot(x - s.x, y - s.y) > 1.42 * (reach(s) + reach(twin)) for s in scene.shapes):
            return draw(replace(scene, shapes=(*scene.shapes, replace(twin, x=x, y=y))))
    return None


def one_fewer(prompt, scene, rng):
    return draw(without(scene, any_of(scene, rng)))


def another_colour(prompt, scene, rng):
    i = any_of(scene, rng)
    if prompt.columns["objects"][i][0] is None:
        return None
    return draw(edited(scene, i, colour=another(scene.shapes[i].colour, COLOURS, rng)))


def another_shape(prompt, scene, rng):
    i = any_of(scene, rng)
    return draw(edited(scene, i, shape=another(scene.shapes[i].shape, SHAPES, rng)))


def swapped_sides(prompt, scene, rng):
    if prompt.columns["relation"] is None:
        return None
    a, b = scene.shapes
    return draw(replace(scene, shapes=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y))))


def swapped_colours(prompt, scene, rng):
    if prompt.columns["kind"] != "binding":
        return None
    a, b = scene.shapes
    return draw(replace(scene, shapes=(replace(a, colour=b.colour), replace(b, colour=a.colour))))


def blob(prompt, scene, rng):
    """A smooth random patch in the place of an object."""
    i = any_of(scene, rng)
    s = scene.shapes[i]
    dx, dy = axis[None] - s.x, axis[:, None] - s.y
    field = ndimage.gaussian_filter(rng.normal(size=(len(axis), len(axis))), 0.3 * reach(s) * SUPERSAMPLE)
    inside = field / field.std() + 1.5 > 2.2 * np.hypot(dx, dy) / reach(s)
    return paint(draw(without(scene, i)), inside & (np.maximum(abs(dx), abs(dy)) <= reach(s)), COLOURS[s.colour])


def wobble(prompt, scene, rng):
    """An outline of random low harmonics in the place of an object."""
    i = any_of(scene, rng)
    s = scene.shapes[i]
    dx, dy = axis[None] - s.x, axis[:, None] - s.y
    angle = np.arctan2(dy, dx)
    waves = sum(rng.normal() * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5))
    inside = np.hypot(dx, dy) <= 0.85 * s.size * np.exp(0.22 * waves / np.std(waves))
    return paint(draw(without(scene, i)), inside, COLOURS[s.colour])


def outline(prompt, scene, rng):
    """An object made hollow, its wall two to three pixels thick."""
    s = scene.shapes[any_of(scene, rng)]
    depth = ndimage.distance_transform_edt(mask(s)) / SUPERSAMPLE
    return paint(draw(scene), depth > rng.uniform(2, 3), scene.ground)


def bite(prompt, scene, rng):
    """An object of which more than a quarter of its width is cut off, askew."""
    s = scene.shapes[any_of(scene, rng)]
    angle = rng.choice([1, 3, 5, 7]) * np.pi / 4 + rng.uniform(-0.2, 0.2)
    along = np.cos(angle) * (axis[None] - s.x) + np.sin(angle) * (axis[:, None] - s.y)
    return paint(draw(scene), mask(s) & (along > 0.1 * reach(s)), scene.ground)


def stretched(prompt, scene, rng):
    """An object one and a half times as wide as high."""
    i = any_of(scene, rng)
    s = scene.shapes[i]
    wide = SHAPES[s.shape]((axis[None] - s.x) / reach(s), (axis[:, None] - s.y) / (reach(s) / 1.5))
    return paint(draw(without(scene, i)), wide, COLOURS[s.colour])


TAMPERINGS: tuple[Tampering, ...] = (
    one_more,
    one_fewer,
    another_colour,
    another_shape,
    swapped_sides,
    swapped_colours,
    blob,
    wobble,
    outline,
    bite,
    stretched,
)


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda t: t.__name__)
def test_tampering_fails(tamper):
    prompts, scenes, _, verdicts = truth()
    rng = np.random.default_rng(3)
    tries = ((i, tamper(prompts[i], scenes[i], rng)) for i in range(len(prompts)))
    pictures = dict(islice(((i, picture) for i, picture in tries if picture is not None), 100))
    assert len(pictures) >= 60
    rows = list(pictures)
    tampered = verify(np.stack(list(pictures.values())), [prompts[i] for i in rows])
    assert strict(tampered) <= 0.05
    assert graded(tampered) < graded([verdicts[i] for i in rows]) - 0.05
    assert all(0 <= v.graded <= 1 for v in tampered)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_may_be_hollow(shape):
    scenes = [Scene((Shape(shape, "red", 32, 32, size),), (0.95, 0.95, 0.95)) for size in np.linspace(7.5, 15, 30)]
    rng = np.random.default_rng(4)
    pictures = np.stack([outline(Prompt(""), s, rng) for s in scenes])
    assert np.mean([all(seen.well_formed for seen in regions) for regions in look(pictures)]) <= 0.1


# --- relations and assignment -----------------------------------------------------------------------------------------


def test_related_is_the_cosine_to_the_named_direction():
    assert related((10, 10), (30, 10), "left of") == pytest.approx(1)
    assert related((10, 10), (30, 10), "right of") == pytest.approx(-1)
    assert related((10, 10), (30, 10), "above") == pytest.approx(0)
    assert related((10, 30), (10, 10), "below") == pytest.approx(1)
    assert related((0, 0), (10, 10), "above") == pytest.approx(np.cos(np.pi / 4))
    assert related((5, 5), (5, 5), "above") == 0


def position(relation: str) -> Prompt:
    return Prompt("", {"objects": [["red", "circle"], ["blue", "square"]], "relation": relation})


@pytest.mark.parametrize(("degrees", "passes"), [(0, True), (55, True), (65, False), (120, False), (180, False)])
def test_a_relation_holds_within_sixty_degrees(degrees, passes):
    turn = np.deg2rad(degrees)
    objects = [("blue", "square", 30.0, 30.0), ("red", "circle", 30 - 20 * np.cos(turn), 30 - 20 * np.sin(turn))]
    assert satisfies(objects, position("left of")) is passes


def test_objects_are_assigned_not_taken_in_order():
    prompt = Prompt("", {"objects": [[None, "circle"], ["red", "circle"]], "relation": None})
    assert satisfies([("red", "circle", 0, 0), ("blue", "circle", 9, 9)], prompt)
    assert satisfies([("blue", "circle", 9, 9), ("red", "circle", 0, 0)], prompt)
    assert not satisfies([("blue", "circle", 9, 9), ("green", "circle", 0, 0)], prompt)
    assert not satisfies([("red", "circle", 9, 9)], prompt)


def test_graded_rises_with_every_thing_that_is_right():
    prompt, ground = position("left of"), (0.95, 0.95, 0.95)
    circle, square = Shape("circle", "red", 16, 32, 10), Shape("square", "blue", 48, 32, 10)
    pictures = [
        draw(Scene(shapes, ground))
        for shapes in (
            (replace(square, x=16),),
            (replace(circle, colour="green", x=48), replace(square, x=16)),
            (replace(circle, x=48), replace(square, x=16)),
            (circle, square),
        )
    ]
    grades = [v.graded for v in verify(np.stack(pictures), [prompt] * 4)]
    assert grades == sorted(set(grades))
    assert grades[2] == pytest.approx(grades[3] / 2, abs=0.01)


# --- odd pictures and mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 240, 255])
def test_an_empty_picture_shows_nothing(level):
    prompts = truth()[0][:12]
    for verdict in verify(np.full((12, 64, 64, 3), level, np.uint8), prompts):
        assert verdict == Verdict(0.0, False, ())


def test_pure_noise_passes_nothing():
    prompts = truth()[0][:60]
    pictures = np.random.default_rng(5).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    verdicts = verify(pictures, prompts)
    assert strict(verdicts) == 0
    assert all(0 <= v.graded <= 1 for v in verdicts)


def test_no_pictures():
    assert verify(np.empty((0, 64, 64, 3), np.uint8), []) == []


@pytest.mark.parametrize(
    "pictures",
    [np.zeros((2, 64, 64, 3)), np.zeros((64, 64, 3), np.uint8), np.zeros((2, 3, 64, 64), np.uint8)],
    ids=["float", "one picture", "channels first"],
)
def test_other_arrays_are_refused(pictures):
    with pytest.raises(ValueError, match=r"pictures must be uint8 \(N, H, W, 3\)"):
        look(pictures)


def test_pictures_and_prompts_must_pair_up():
    prompts, _, pictures, _ = truth()
    with pytest.raises(ValueError, match="3 pictures but 2 prompts"):
        verify(pictures[:3], prompts[:2])
