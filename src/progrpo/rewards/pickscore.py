"""PickScore: a CLIP ViT-H/14 trained on what users of a web application preferred (arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from transformers import CLIPImageProcessorPil, CLIPModel

from progrpo.rewards.base import Score
from progrpo.rewards.clip import VIT_H, ClipCosine, load_tokenizer
from progrpo.rewards.hub import load_pretrained, place
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

MODEL, REVISION = "yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800"


class PickScore(ClipCosine):
    """exp(logit_scale) <f / |f|, g / |g|> / 26 for picture features f and text features g.

    It is the published score over 26, as in Flow-GRPO's code (arXiv 2505.05470): about 0..1, typically 0.8 to 0.9.
    Pictures are resized to 224 on their shorter side and cropped at the centre; texts are cut at 77 tokens.
    """

    parameters = 986_109_441  # of ViT-H/14

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load the published weights (safetensors)."""
        model = load_pretrained(CLIPModel, "pickscore", MODEL, REVISION)
        tokenizer = load_tokenizer("pickscore", *VIT_H)
        return cls(place(model, term), tokenizer, CLIPImageProcessorPil(), term.network_batch_size)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        scale = self._model.logit_scale.float().exp().item() / 26
        return [Score(scale * cosine) for cosine in self.cosines(pictures_NHWC, [p.text for p in prompts])]
