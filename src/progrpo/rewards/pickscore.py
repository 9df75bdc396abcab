"""PickScore: a CLIP ViT-H/14 trained on what users of a web application preferred (arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from transformers import CLIPImageProcessorPil, CLIPModel

from progrpo.rewards.base import Score
from progrpo.rewards.clip import ClipScore, fetching, on_device, vit_h_tokenizer
from progrpo.types import Prompt

MODEL = "yuvalkirstain/PickScore_v1"


class PickScore(ClipScore):
    """exp(logit_scale) <f / |f|, g / |g|> / 26 for picture features f and text features g.

    The published score, divided by 26 as Flow-GRPO's code does (arXiv 2505.05470): about 0..1, typically 0.8 to 0.9. Pictures are
    resized to 224 on their shorter side and cropped at the centre; texts are cut at 77 tokens.
    """

    @classmethod
    def from_hub(cls) -> Self:
        """The published weights (safetensors)."""
        with fetching("pickscore", MODEL):
            model = CLIPModel.from_pretrained(MODEL, use_safetensors=True)
        return cls(on_device(model), vit_h_tokenizer("pickscore"), CLIPImageProcessorPil())

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        scale = self._model.logit_scale.float().exp().item() / 26
        return [Score(scale * cosine) for cosine in self.cosines(pictures_NHWC, prompts)]
