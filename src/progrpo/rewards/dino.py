"""DINOv2 (arXiv 2304.07193): features that say how alike pictures are, and the similarity of an edit to its source."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, Dinov2Model
from transformers.image_processing_utils import BaseImageProcessor

from progrpo.rewards.clip import preprocess
from progrpo.rewards.hub import fetching, load_pretrained, place
from progrpo.rewards.settings import RewardTerm
from progrpo.rewards.similarity import SourceCosine

DINO = ("facebook/dinov2-small", "ed25f3a31f01632728cabb09d1542f84ab7b0056")


class Dino:
    """A frozen DINOv2 and the way its pictures are resized."""

    def __init__(self, model: Dinov2Model, image_processor: BaseImageProcessor) -> None:
        self._model = model.eval().requires_grad_(False)
        self._image_processor = image_processor

    @classmethod
    def load(cls, reward: str, term: RewardTerm) -> Self:
        """Load facebook/dinov2-small, or the DINOv2 that `term.model` names: a folder or a hub id."""
        repository, revision = (term.model, "main") if term.model else DINO
        model = place(load_pretrained(Dinov2Model, reward, repository, revision), term)
        with fetching(reward, repository):
            image_processor = AutoImageProcessor.from_pretrained(repository, revision=revision, backend="pil")
        return cls(model, image_processor)

    @torch.no_grad()
    def features(self, pictures_BHWC: np.ndarray) -> Tensor:
        """The class token after the last norm, (B, D), in float32."""
        pixels_BCHW = preprocess(pictures_BHWC, self._image_processor)
        features_BD: Tensor = self._model(pixels_BCHW.to(self._model.device, self._model.dtype)).pooler_output
        return features_BD.float()


class DinoSimilarity(SourceCosine):
    """<f / |f|, g / |g|> of DINOv2's class tokens f of the picture and g of its source: -1..1, mostly 0 to 1."""

    name = "dino_similarity"
    takes_model = True
    parameters = 22_056_576

    def __init__(self, dino: Dino, batch_size: int = 16) -> None:
        super().__init__(batch_size)
        self._dino = dino

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load the published weights (safetensors)."""
        return cls(Dino.load(cls.name, term), term.network_batch_size)

    def _features(self, pictures_BHWC: np.ndarray) -> Tensor:
        return self._dino.features(pictures_BHWC)
