"""The backbone for all pictures: a CLIP of transformers, as PickScore has it (arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from progrpo.preferences.reward_model.backbone import Features
from progrpo.rewards.clip import batch_slices, directions, load_tokenizer, preprocess, tokenized
from progrpo.rewards.hub import fetching, load_pretrained, place_at
from progrpo.types import Prompt

_AT_ONCE = 16
_NAME = "reward_model"


class ClipBackbone:
    """Features f of pictures, and their products f g with the features g of texts, whose sum is the cosine.

    A head starts from the cosine. The texts' own features are left out: they are equal for both pictures of a pair, so
    that pairs say nothing of their weights.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessorPil) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._image_processor = image_processor

    @classmethod
    def from_hub(cls, name: str, device: str = "auto", dtype: str = "auto") -> Self:
        """Load the safetensors of a folder or a hub id. Refusal where neither the cache nor the hub has them."""
        model = load_pretrained(CLIPModel, _NAME, name, "main")
        with fetching(_NAME, name):
            image_processor = CLIPImageProcessorPil.from_pretrained(name, revision="main")
        return cls(place_at(model, device, dtype), load_tokenizer(_NAME, name, "main"), image_processor)

    @torch.no_grad()
    def features(self, pictures: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> Features:
        parts = [
            self.attached(preprocess(pictures[batch], self._image_processor), self.tokens(prompts[batch]))
            for batch in batch_slices(len(prompts), _AT_ONCE)
        ]
        return Features.cat(parts) if parts else self._empty()

    def attached(self, pixels_BCHW: Tensor, ids_BL: Tensor) -> Features:
        """The features on the CPU, with gradients where the network has them."""
        f_BD, g_BD = directions(self.model, pixels_BCHW, ids_BL)
        product_BD = (f_BD * g_BD).cpu()
        return Features((f_BD.cpu(), product_BD), product_BD.sum(1))

    def tokens(self, prompts: Sequence[Prompt]) -> Tensor:
        return tokenized(self.model, self._tokenizer, [prompt.text for prompt in prompts])

    def lora(self) -> Mapping[str, Tensor]:
        return {}

    def load_lora(self, tensors: Mapping[str, Tensor]) -> None:
        raise ValueError("no LoRA")

    def _empty(self) -> Features:
        width = self.model.config.projection_dim
        return Features((torch.zeros(0, width), torch.zeros(0, width)), torch.zeros(0))
