"""The shapes world: 64x64 pictures of one to four flat shapes on a light ground, and the prompts that describe them.

The prompts have GenEval's six kinds (arXiv 2310.11513): one object, two objects, counting, colours, position and
attribute binding. Train, validation and test prompts hold different combinations. Everything follows from a seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from progrpo.types import Prompt
from progrpo.zoo.splits import in_turn, part_of

SIZE = 64
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.14, 0.16),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.95, 0.83, 0.10),
    "green": (0.16, 0.64, 0.26),
    "blue": (0.15, 0.34, 0.86),
    "purple": (0.58, 0.22, 0.74),
    "black": (0.10, 0.10, 0.10),
}
# each shape as a test on coordinates where its bounding box is [-1, 1]^2 and y points down
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 1,
    "triangle": lambda x, y: (abs(y) <= 1) & (2 * abs(x) <= y + 1),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1,
    "cross": lambda x, y: (np.maximum(abs(x), abs(y)) <= 1) & (np.minimum(abs(x), abs(y)) <= 1 / 3),
}
# half the bounding box at size 1: a square that fills its box looks larger than a circle that does
EXTENT = {"circle": 1.0, "square": 0.88, "triangle": 1.0, "diamond": 1.15, "cross": 1.2}
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
KINDS = ("single", "two", "counting", "colours", "position", "binding")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"cross": "crosses"}
SINGLE_PHRASES = ("a {}", "one {}", "a single {}", "a picture of a {}", "a drawing of a {}")
PAIR_PHRASES = ("a {} and a {}", "one {} and one {}", "a picture of a {} and a {}")


@dataclass(frozen=True)
class Shape:
    """A drawn object. Centre and size are in pixels; the size is half the extent of a circle."""

    shape: str
    colour: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    shapes: tuple[Shape, ...]
    ground: tuple[float, float, float]


# --- prompts ----------------------------------------------------------------------------------------------------------


def _prompt(text: str, kind: str, objects: Sequence[tuple[str | None, str]], relation: str | None = None) -> Prompt:
    """The prompt whose picture must hold exactly `objects`, each (colour or None for any, shape)."""
    text = text.replace("a orange", "an orange")
    return Prompt(text, {"kind": kind, "objects": [list(o) for o in objects], "relation": relation})


def _single() -> dict[str, list[Prompt]]:
    return {
        f"{phrase}|{shape}": [_prompt(phrase.format(shape), "single", [(None, shape)])]
        for phrase, shape in itertools.product(SINGLE_PHRASES, SHAPES)
    }


def _two() -> dict[str, list[Prompt]]:
    return {
        f"{phrase}|{a}|{b}": [
            _prompt(phrase.format(*order), "two", [(None, s) for s in order]) for order in ((a, b), (b, a))
        ]
        for phrase, (a, b) in itertools.product(PAIR_PHRASES, itertools.combinations(SHAPES, 2))
    }


def _counting() -> dict[str, list[Prompt]]:
    out = {}
    for n, colour, shape in itertools.product(NUMBERS, (None, *COLOURS), SHAPES):
        words = [NUMBERS[n], colour, PLURALS.get(shape, shape + "s")]
        out[f"{n}|{colour}|{shape}"] = [
            _prompt(" ".join(w for w in words if w), "counting", [(colour, shape)] * n),
        ]
    return out


def _colours() -> dict[str, list[Prompt]]:
    return {
        f"{colour}|{shape}": [_prompt(f"a {colour} {shape}", "colours", [(colour, shape)])]
        for colour, shape in itertools.product(COLOURS, SHAPES)
    }


def _pairs() -> list[tuple[tuple[str, str], tuple[str, str]]]:
    return list(itertools.combinations(itertools.product(COLOURS, SHAPES), 2))


def _position() -> dict[str, list[Prompt]]:
    out = {}
    for a, b in _pairs():
        out[f"{a}|{b}"] = [
            _prompt(f"a {p[0]} {p[1]} {relation} a {q[0]} {q[1]}", "position", [p, q], relation)
            for p, q in ((a, b), (b, a))
            for relation in RELATIONS
        ]
    return out


def _binding() -> dict[str, list[Prompt]]:
    return {
        f"{a}|{b}": [_prompt(f"a {p[0]} {p[1]} and a {q[0]} {q[1]}", "binding", [p, q]) for p, q in ((a, b), (b, a))]
        for a, b in _pairs()
        if a[0] != b[0] and a[1] != b[1]
    }


_COMBINATIONS = {
    "single": _single,
    "two": _two,
    "counting": _counting,
    "colours": _colours,
    "position": _position,
    "binding": _binding,
}


@cache
def prompts(split: str) -> dict[str, tuple[Prompt, ...]]:
    """All prompts of a split, by kind.

    A combination (for position and binding an unordered pair of coloured shapes) belongs to one split: the place of its
    hash among all hashes decides. So no two splits share a combination.
    """
    out = {}
    for kind, combinations in _COMBINATIONS.items():
        table = combinations()
        # position and binding must agree on the split of a pair, so both cut the order of all pairs
        keys = [f"{a}|{b}" for a, b in _pairs()] if kind in ("position", "binding") else list(table)
        out[kind] = tuple(p for key in part_of(keys, split) for p in table.get(key, ()))
    return out


def sample_prompts(split: str, count: int, seed: int, kinds: Sequence[str] = KINDS) -> list[Prompt]:
    """Sample `count` prompts of a split: the kinds in turn, and within a kind without repeats until all have been
    used.
    """
    table = prompts(split)
    return in_turn({kind: table[kind] for kind in kinds}, count, seed)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _overlaps(x: float, y: float, reach: float, placed: Sequence[Shape]) -> bool:
    gap = 3.0
    return any(
        max(abs(x - s.x), abs(y - s.y)) < reach + s.size * EXTENT[s.shape] + gap
        and np.hypot(x - s.x, y - s.y) < 1.15 * (reach + s.size * EXTENT[s.shape]) + gap
        for s in placed
    )


def _related(a: Shape, b: Shape, relation: str) -> bool:
    """Whether a pair lies within 40 degrees of the named direction. The verifier allows 60."""
    dx, dy = RELATIONS[relation]
    distance = np.hypot(a.x - b.x, a.y - b.y)
    return ((a.x - b.x) * dx + (a.y - b.y) * dy) > np.cos(np.deg2rad(40)) * distance


def scene_for(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A random scene that the prompt describes."""
    objects, relation = prompt.columns["objects"], prompt.columns["relation"]
    largest = {1: 15.0, 2: 13.0, 3: 11.5, 4: 10.0}[len(objects)]
    ground = tuple(np.clip(rng.uniform(0.88, 0.98) + rng.uniform(-0.015, 0.015, 3), 0, 1))
    while True:
        placed: list[Shape] = []
        for colour, shape in objects:
            colour = colour or str(rng.choice(list(COLOURS)))
            for _ in range(30):
                size = rng.uniform(7.5, largest)
                reach = size * EXTENT[shape]
                x, y = rng.uniform(reach + 2, SIZE - reach - 2, 2)
                if not _overlaps(x, y, reach, placed):
                    placed.append(Shape(shape, colour, float(x), float(y), float(size)))
                    break
        if len(placed) == len(objects) and (relation is None or _related(placed[0], placed[1], relation)):
            return Scene(tuple(placed), ground)


def draw(scene: Scene, size: int = SIZE, supersample: int = 4) -> np.ndarray:
    """The picture of a scene, uint8 (size, size, 3), edges smoothed by supersampling."""
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = scene.ground
    scale = size / SIZE
    for s in scene.shapes:
        reach = s.size * EXTENT[s.shape] * scale
        cx, cy = s.x * scale, s.y * scale
        x0, y0 = (max(0, int(c - reach)) for c in (cx, cy))
        x1, y1 = (min(size, int(c + reach) + 1) for c in (cx, cy))
        xs = (np.arange(x0 * supersample, x1 * supersample) + 0.5) / supersample
        ys = (np.arange(y0 * supersample, y1 * supersample) + 0.5) / supersample
        inside = SHAPES[s.shape]((xs[None] - cx) / reach, (ys[:, None] - cy) / reach).astype(np.float32)
        cover = inside.reshape(y1 - y0, supersample, x1 - x0, supersample).mean((1, 3))[..., None]
        patch = picture[y0:y1, x0:x1]
        patch += cover * (np.asarray(COLOURS[s.colour], np.float32) - patch)
    return (picture * 255 + 0.5).astype(np.uint8)


def examples(split: str, count: int, seed: int) -> tuple[list[Prompt], np.ndarray]:
    """Sample `count` prompts of a split and draw a picture of each, uint8 (count, 64, 64, 3)."""
    chosen = sample_prompts(split, count, seed)
    rng = np.random.default_rng([seed, 2])
    return chosen, np.stack([draw(scene_for(p, rng)) for p in chosen])
