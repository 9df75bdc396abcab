"""The second opinion: what it is trained on, that it can learn, and that the shipped one has learnt."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from progrpo.types import Prompt
from progrpo.zoo import WEIGHTS
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.detector import ShapeDetector, _spoil, _targets, detector_loss, load_detector, save_detector
from progrpo.zoo.shapes.verifier import look
from progrpo.zoo.shapes.world import COLOURS, EXTENT, SHAPES, Scene, Shape, draw

FORMS = (*SHAPES, "other")


def sampled(count: int, kinds=world.KINDS) -> tuple[list[Prompt], list[Scene]]:
    prompts = world.sample_prompts("test", count, 11, kinds)
    rng = np.random.default_rng(0)
    return prompts, [world.scene_for(p, rng) for p in prompts]


def objects(scene: Scene) -> list[tuple[str, str, float, float]]:
    return [(s.colour, s.shape, s.x, s.y) for s in scene.shapes]


def small() -> ShapeDetector:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ShapeDetector(width=16)


# --- what it puts out -------------------------------------------------------------------------------------------------


def test_shapes_of_the_outputs():
    centre, offset, colour, shape = ShapeDetector(width=16)(torch.zeros(2, 3, 64, 64))
    assert centre.shape == (2, 16, 16)
    assert offset.shape == (2, 2, 16, 16)
    assert colour.shape == (2, len(COLOURS), 16, 16)
    assert shape.shape == (2, len(FORMS), 16, 16)


class Oracle(ShapeDetector):
    """Says what the targets say, whatever the picture."""

    def __init__(self, centre: Tensor, offset: Tensor, colour: Tensor, shape: Tensor):
        super().__init__(width=4)
        self.said = (
            20 * centre - 10,
            offset,
            nn.functional.one_hot(colour.clamp(min=0), len(COLOURS)).movedim(-1, 1),
            nn.functional.one_hot(shape.clamp(min=0), len(FORMS)).movedim(-1, 1),
        )

    def forward(self, x_NCHW):
        return self.said


def test_targets_are_what_find_reads():
    prompts, scenes = sampled(60)
    oracle = Oracle(*_targets(scenes, [[False] * len(s.shapes) for s in scenes]))
    pictures = np.zeros((60, 64, 64, 3), np.uint8)
    for scene, detected in zip(scenes, oracle.find(pictures), strict=True):
        expected = sorted(objects(scene), key=lambda o: o[2])
        detected = sorted(detected, key=lambda o: o[2])
        assert [o[:2] for o in detected] == [o[:2] for o in expected]
        np.testing.assert_allclose([o[2:] for o in detected], [o[2:] for o in expected], atol=1e-4)
    assert oracle.passes(pictures, prompts) == [True] * 60


def test_a_malformed_object_is_no_shape():
    prompts, scenes = sampled(20)
    oracle = Oracle(*_targets(scenes, [[True] * len(s.shapes) for s in scenes]))
    pictures = np.zeros((20, 64, 64, 3), np.uint8)
    assert {shape for detected in oracle.find(pictures) for _, shape, _, _ in detected} == {"other"}
    assert oracle.passes(pictures, prompts) == [False] * 20


def test_spoilt_objects_are_malformed_to_the_verifier_too():
    _, scenes = sampled(60, ("colours",))
    pictures = np.stack([draw(s) for s in scenes])
    rng = np.random.default_rng(1)
    for picture, scene in zip(pictures, scenes, strict=True):
        _spoil(picture, scene.shapes[0], np.asarray(scene.ground) * 255, rng)
    right = [
        any(s.well_formed and s.shape == scene.shapes[0].shape for s in seen)
        for seen, scene in zip(look(pictures), scenes, strict=True)
    ]
    assert np.mean(right) <= 0.2  # the verifier forgives a triangle its lost tip


# --- learning ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_a_function_of_its_seed():
    judge = small()
    first, second, other = (detector_loss(judge, 4, seed).item() for seed in (1, 1, 2))
    assert first == second != other


def test_the_loss_falls():
    judge = small()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        loss = detector_loss(judge, 6, seed=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_a_saved_judge_says_the_same(tmp_path):
    torch.manual_seed(0)
    judge = ShapeDetector()
    detector_loss(judge, 4, seed=0)  # moves the running statistics of the normalisation
    save_detector(judge, tmp_path / "judge")
    loaded = load_detector(tmp_path / "judge")
    x = torch.randn(2, 3, 64, 64)
    assert not loaded.training
    for a, b in zip(judge.eval()(x), loaded(x), strict=True):
        assert torch.equal(a, b)


# --- the shipped one --------------------------------------------------------------------------------------------------


@cache
def shipped() -> ShapeDetector:
    return load_detector(WEIGHTS / "shapes-judge")


def pass_rate(prompts: list[Prompt], scenes: list[Scene]) -> float:
    return float(np.mean(shipped().passes(np.stack([draw(s) for s in scenes]), prompts)))


def changed(scene: Scene, **values: Any) -> Scene:
    return replace(scene, shapes=(replace(scene.shapes[0], **values), *scene.shapes[1:]))


def another(value: str, choices: dict) -> str:
    names = list(choices)
    return names[(names.index(value) + 1) % len(names)]


def test_the_shipped_judge_passes_drawn_truth():
    assert pass_rate(*sampled(300)) >= 0.95


@pytest.mark.parametrize(
    ("kinds", "tamper"),
    [
        (world.KINDS, lambda s: replace(s, shapes=s.shapes[1:])),
        (
            ("single", "colours"),
            lambda s: replace(s, shapes=(*s.shapes, replace(s.shapes[0], **far_from(s.shapes[0])))),
        ),
        (("colours", "position", "binding"), lambda s: changed(s, colour=another(s.shapes[0].colour, COLOURS))),
        (world.KINDS, lambda s: changed(s, shape=another(s.shapes[0].shape, SHAPES))),
        (("position",), lambda s: replace(s, shapes=tuple(mirrored(o) for o in s.shapes))),
    ],
    ids=["one fewer", "one more", "another colour", "another shape", "swapped sides"],
)
def test_the_shipped_judge_fails_tampering(kinds, tamper):
    prompts, scenes = sampled(120, kinds)
    assert pass_rate(prompts, [tamper(s) for s in scenes]) <= 0.05


def far_from(s: Shape) -> dict[str, float]:
    """The corner opposite to a shape, at the smallest size."""
    return {"x": 12.0 if s.x > 32 else 52.0, "y": 12.0 if s.y > 32 else 52.0, "size": 7.5}


def mirrored(s: Shape) -> Shape:
    return replace(s, x=world.SIZE - s.x, y=world.SIZE - s.y)


def test_the_shipped_judge_fails_outlines():
    prompts, scenes = sampled(120, ("single", "colours"))
    pictures = np.stack([draw(s) for s in scenes])
    y, x = np.mgrid[: world.SIZE, : world.SIZE] + 0.5
    for picture, scene in zip(pictures, scenes, strict=True):
        s = scene.shapes[0]
        inner = s.size * EXTENT[s.shape] - 3  # walls of 3 pixels at the narrowest
        picture[SHAPES[s.shape]((x - s.x) / inner, (y - s.y) / inner)] = np.asarray(scene.ground) * 255
    assert np.mean(shipped().passes(pictures, prompts)) <= 0.1
