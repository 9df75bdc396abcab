"""Rewards that compare an edit with its source picture by a network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from progrpo.prompts.pictures import IMAGE_COLUMN
from progrpo.rewards.base import Score
from progrpo.rewards.clip import batch_slices
from progrpo.rewards.hub import HubReward
from progrpo.rewards.source import check_source_column, resized_sources
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


class SourceCosine(SourceSimilarity):
    """The cosine of a network's features of the picture and of its source."""

    def _similarities(
        self, pictures_BHWC: np.ndarray, sources_SHWC: np.ndarray, source_B: Sequence[int]
    ) -> list[float]:
        f_BD, g_SD = self._features(pictures_BHWC), self._features(sources_SHWC)
        cosines_B: Tensor = torch.nn.functional.cosine_similarity(f_BD, g_SD[list(source_B)])
        return cosines_B.tolist()

    @abstractmethod
    def _features(self, pictures_BHWC: np.ndarray) -> Tensor:
        """The features (B, D) of pictures, float32."""
