"""CLIPScore: the agreement of a picture and its prompt, by a CLIP (arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from transformers import CLIPImageProcessorPil, CLIPModel

from progrpo.rewards.base import Score
from progrpo.rewards.clip import VIT_L, ClipCosine, load_tokenizer
from progrpo.rewards.hub import fetching, load_pretrained, place
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

PREFIX, WEIGHT = "A photo depicts ", 2.5


class CLIPScore(ClipCosine):
    """2.5 max(<f / |f|, g / |g|>, 0) for features f of the picture and g of "A photo depicts " and the prompt.

    The value is in 0..2.5, mostly 0.3 to 0.9. Formula and prefix are the published ones, with a ViT-B/32 in the paper.
    The default here is OpenAI's ViT-L/14, as in Flow-GRPO's code (arXiv 2505.05470), whose score is 100 / 30 of the
    cosine, without a prefix.
    """

    takes_model = True
    parameters = 427_616_513  # of ViT-L/14

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load OpenAI's ViT-L/14 (safetensors), or the CLIP that `term.model` names: a folder or a hub id."""
        repository, revision = (term.model, "main") if term.model else VIT_L
        model = load_pretrained(CLIPModel, "clipscore", repository, revision)
        with fetching("clipscore", repository):
            image_processor = CLIPImageProcessorPil.from_pretrained(repository, revision=revision)
        tokenizer = load_tokenizer("clipscore", repository, revision)
        return cls(place(model, term), tokenizer, image_processor, term.network_batch_size)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        cosines = self.cosines(pictures_NHWC, [PREFIX + p.text for p in prompts])
        return [Score(WEIGHT * max(cosine, 0.0)) for cosine in cosines]  # in this order NaN stays NaN
