"""The words world: 64x64 pictures of one short word on a light ground, and the prompts that ask for it.

In a word, consonants and vowels alternate, so that it can be spoken. Train, validation and test prompts hold different
words. Everything follows from a seed. The font is the one in PIL's package.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from progrpo.types import Prompt
from progrpo.zoo.shapes.world import COLOURS
from progrpo.zoo.splits import in_turn, part_of

SIZE = 64
FONT_SIZE = 20
ADVANCE = 16
"""The width of a letter's place in pixels: the width of two tokens of the denoiser."""
CONSONANTS = "BCDFGHJKLMNPRSTVWXYZ"
VOWELS = "AEIOU"
KINDS = ("2 letters", "3 letters", "4 letters")
INKS = ("red", "green", "blue", "purple", "black")
BASELINE = 40
"""The line on which letters stand, in pixels from above."""
# words that insult people or are crude, by the first eight digits of their SHA-256
_LEFT_OUT = (
    "16a22f11 1bd4cc82 61ce49d2 6fa84cd4 7427402f 84364951 88a83e6e 8ad8fd1c 8b5024f7 8e38f23d a6c3f60e "
    "ae385fce b4bed028 b7484d3d c4ad8a72 cf4c1c4b d8f390b0 e43b4556 e7488880 ec96e33d f04736a5 "
)


def _alternating(letters: int) -> list[str]:
    """All words of so many letters."""
    first, second = CONSONANTS, VOWELS
    return [
        "".join(word)
        for start in ((first, second), (second, first))
        for word in itertools.product(*(start[i % 2] for i in range(letters)))
    ]


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


@cache
def prompts(split: str) -> dict[str, tuple[Prompt, ...]]:
    """All prompts of a split, by kind. A word belongs to one split."""
    return {
        kind: tuple(
            Prompt(f'the word "{word}"', {"kind": kind, "target": word})
            for word in part_of(_alternating(int(kind[0])), split)
            if hashlib.sha256(word.encode()).hexdigest()[:8] not in _LEFT_OUT
        )
        for kind in KINDS
    }


def sample_prompts(split: str, count: int, seed: int) -> list[Prompt]:
    """Sample `count` prompts of a split: the kinds in turn."""
    return in_turn(prompts(split), count, seed)


def draw(word: str, colour: str, ground: Sequence[float]) -> np.ndarray:
    """The picture of a word that begins at the left edge, uint8 (64, 64, 3)."""
    picture = Image.new("RGB", (SIZE, SIZE), tuple(round(255 * c) for c in ground))
    pen = ImageDraw.Draw(picture)
    ink = tuple(round(255 * c) for c in COLOURS[colour])
    for i, letter in enumerate(word):
        place = (ADVANCE * (i + 0.5), BASELINE)
        pen.text(place, letter, fill=ink, font=_font(), anchor="ms", stroke_width=0.5)
    return np.asarray(picture)


def picture_for(prompt: Prompt, rng: np.random.Generator) -> np.ndarray:
    """A picture of the prompt's word, uint8 (64, 64, 3). Its colour and the ground are random."""
    ground = np.clip(rng.uniform(0.88, 0.98) + rng.uniform(-0.015, 0.015, 3), 0, 1).tolist()
    return draw(prompt.columns["target"], str(rng.choice(INKS)), ground)


def examples(split: str, count: int, seed: int) -> tuple[list[Prompt], np.ndarray]:
    """Sample `count` prompts of a split and draw a picture of each, uint8 (count, 64, 64, 3)."""
    chosen = sample_prompts(split, count, seed)
    rng = np.random.default_rng([seed, 2])
    return chosen, np.stack([picture_for(p, rng) for p in chosen])
