"""The source pictures that an edit is compared with, at the size of the edited pictures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from progrpo.messages import quoted
from progrpo.prompts.pictures import IMAGE_COLUMN, check_sources, open_pictures
from progrpo.rewards.base import Refusal, Score
from progrpo.rewards.clip import batch_slices
from progrpo.rewards.hub import HubReward
from progrpo.types import Prompt


class SourceSimilarity(HubReward):
    """The similarity of each picture to its prompt's source picture, the column `image`.

    The source is first resized until it covers the picture's size, and cropped at its middle, as it is for FLUX.1
    Kontext.
    """

    needed = (IMAGE_COLUMN,)
    name: str

    def __init__(self, batch_size: int = 16) -> None:
        self._batch_size = batch_size

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_source_column(self.name, prompts)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        batches = batch_slices(len(prompts), self._batch_size)
        return [Score(value) for batch in batches for value in self._batch(pictures_NHWC[batch], prompts[batch])]

    def _batch(self, pictures_BHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[float]:
        sources_SHWC, source_B = resized_sources(prompts, pictures_BHWC.shape[1:3])
        return self._similarities(pictures_BHWC, sources_SHWC, source_B)

    @abstractmethod
    def _similarities(
        self, pictures_BHWC: np.ndarray, sources_SHWC: np.ndarray, source_B: Sequence[int]
    ) -> list[float]:
        """The similarity of each picture to the source at its place in `source_B`."""


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
