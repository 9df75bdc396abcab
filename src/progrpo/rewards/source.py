"""The source pictures of edits, the column `image`, as rewards take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from progrpo.messages import quoted
from progrpo.prompts.pictures import IMAGE_COLUMN, check_sources, open_pictures, source_picture
from progrpo.rewards.base import Refusal
from progrpo.types import Prompt


def check_source_column(reward: str, prompts: Sequence[Prompt]) -> None:
    """Refuse the first prompt without a source picture, or whose picture cannot be opened."""
    for prompt in prompts:
        if prompt.columns.get(IMAGE_COLUMN) is None:
            raise Refusal(
                f"reward {reward!r} compares with a source picture, but the prompt {quoted(prompt.text)} has no column"
                f" {IMAGE_COLUMN}; give each prompt the path of its picture there"
            )
    try:
        check_sources(prompts)
    except ValueError as error:
        raise Refusal(f"reward {reward!r}: {error}") from error


def source_pixels(prompt: Prompt) -> np.ndarray:
    """A prompt's source picture (uint8, (H, W, 3)), in its own size."""
    return np.asarray(source_picture(prompt))


def resized_sources(prompts: Sequence[Prompt], shape: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """The distinct source pictures (uint8, (S, H, W, 3)) of prompts, and the place of each prompt's among them."""
    values = [prompt.columns[IMAGE_COLUMN] for prompt in prompts]
    place_of: dict[int, int] = {}
    for value in values:
        place_of.setdefault(id(value), len(place_of))
    distinct = {id(value): value for value in values}
    height, width = shape
    resized = [
        np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
        for image in open_pictures(list(distinct.values()))
        if image is not None
    ]
    return np.stack(resized), [place_of[id(value)] for value in values]
