"""CLIP's similarity of an edit to its source, the CLIP-I of editing benchmarks."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from progrpo.rewards.clip import VIT_L, preprocess
from progrpo.rewards.hub import fetching, load_pretrained, place
from progrpo.rewards.settings import RewardTerm
from progrpo.rewards.similarity import SourceCosine


class CLIPSimilarity(SourceCosine):
    """<f / |f|, g / |g|> of CLIP's features f of the picture and g of its source: -1..1, mostly 0.5 to 1.

    OpenAI's ViT-L/14 is the default, as in Flow-GRPO's code (arXiv 2505.05470).
    """

    name = "clip_similarity"
    takes_model = True
    parameters = 303_966_208  # the half of CLIP's ViT-L/14 that sees pictures

    def __init__(
        self, model: CLIPVisionModelWithProjection, image_processor: CLIPImageProcessorPil, batch_size: int = 16
    ) -> None:
        super().__init__(batch_size)
        self._model = model.eval().requires_grad_(False)
        self._image_processor = image_processor

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load OpenAI's ViT-L/14 (safetensors), or the CLIP that `term.model` names: a folder or a hub id."""
        repository, revision = (term.model, "main") if term.model else VIT_L
        model = load_pretrained(CLIPVisionModelWithProjection, cls.name, repository, revision)
        with fetching(cls.name, repository):
            image_processor = CLIPImageProcessorPil.from_pretrained(repository, revision=revision)
        return cls(place(model, term), image_processor, term.network_batch_size)

    @torch.no_grad()
    def _features(self, pictures_BHWC: np.ndarray) -> Tensor:
        pixels_BCHW = preprocess(pictures_BHWC, self._image_processor)
        features_BD: Tensor = self._model(pixels_BCHW.to(self._model.device, self._model.dtype)).image_embeds
        return features_BD.float()
