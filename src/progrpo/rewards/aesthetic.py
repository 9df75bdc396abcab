"""LAION's aesthetic predictor v2: how much people like a picture, whatever its prompt, from a CLIP's features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from progrpo.rewards.base import Score
from progrpo.rewards.clip import VIT_L, batch_slices, build_head, preprocess
from progrpo.rewards.hub import HubReward, downloaded_file, load_pretrained, place, read_pickle
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/6934dd81792f086e613a121dbce43082cb8be85e/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


class Aesthetic(HubReward):
    """h(f / |f|) for features f of OpenAI's CLIP ViT-L/14 and five linear layers h: a rating, about 1..10, mostly 4 to
    7.

    The value is the published one, as in Flow-GRPO's code (arXiv 2505.05470). CLIP's processor resizes pictures to 224
    on their shorter side and crops them at the centre, as in Flow-GRPO's code. The published code rounds an odd rest
    otherwise (`center_crop`): a pixel of difference where a picture is not square.
    """

    parameters = 303_966_208  # the half of CLIP's ViT-L/14 that sees pictures

    def __init__(
        self,
        model: PreTrainedModel,
        head: nn.Sequential,
        image_processor: BaseImageProcessor,
        batch_size: int = 16,
    ) -> None:
        """`head` computes in float32."""
        self._model = model.eval().requires_grad_(False)
        self._head = head.requires_grad_(False)
        self._image_processor = image_processor
        self._batch_size = batch_size

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load the published weights. The head's are a pickle: its checksum is tested, and it is read as tensors
        alone.
        """
        model = load_pretrained(CLIPVisionModelWithProjection, "aesthetic", *VIT_L)
        head = build_head(read_pickle("aesthetic", downloaded_file("aesthetic", URL), SHA256))
        head = place(head, replace(term, dtype="float32"))
        return cls(place(model, term), head, CLIPImageProcessorPil(), term.network_batch_size)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        batches = batch_slices(len(prompts), self._batch_size)
        return [Score(rating) for batch in batches for rating in self._ratings(pictures_NHWC[batch]).tolist()]

    @torch.no_grad()
    def _ratings(self, pictures_BHWC: np.ndarray) -> Tensor:
        f_BD = self._features(preprocess(pictures_BHWC, self._image_processor)).float()
        ratings_B1: Tensor = self._head(f_BD / f_BD.norm(dim=-1, keepdim=True))
        return ratings_B1.squeeze(-1)

    def _features(self, pixels_BCHW: Tensor) -> Tensor:
        """The network's features (B, D) of preprocessed pictures."""
        features_BD: Tensor = self._model(pixels_BCHW.to(self._model.device)).image_embeds
        return features_BD
