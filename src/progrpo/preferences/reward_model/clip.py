"""The backbone for all pictures: a CLIP of transformers, as PickScore has it (arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from progrpo.preferences.reward_model.backbone import Features
from progrpo.rewards.clip import batch_slices, directions, load_tokenizer, preprocess, tokenized
from progrpo.rewards.hub import fetching, load_pretrained, place_at
from progrpo.types import Prompt

_AT_ONCE = 16
_NAME = "reward_model"
_TUNED = ("q_proj", "k_proj", "v_proj", "out_proj")


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
        parts = [self.attached(pictures[batch], prompts[batch]) for batch in batch_slices(len(prompts), _AT_ONCE)]
        return Features.cat(parts) if parts else self._empty()

    def attached(self, pictures: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> Features:
        """Compute the features of at least one picture, on the CPU, with gradients for a LoRA that is trained."""
        ids_BL = tokenized(self.model, self._tokenizer, [prompt.text for prompt in prompts])
        f_BD, g_BD = directions(self.model, preprocess(pictures, self._image_processor), ids_BL)
        product_BD = (f_BD * g_BD).cpu()
        return Features((f_BD.cpu(), product_BD), product_BD.sum(1))

    def add_lora(self, rank: int, seed: int) -> list[nn.Parameter]:
        """Add a LoRA that changes nothing yet to the attention of both towers, and return its parameters."""
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_TUNED))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(config, self.model)
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def lora(self) -> Mapping[str, Tensor]:
        if not any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
            return {}
        return {name: t.cpu().contiguous() for name, t in get_peft_model_state_dict(self.model).items()}

    def load_lora(self, tensors: Mapping[str, Tensor]) -> None:
        ranks = {len(tensor) for name, tensor in tensors.items() if ".lora_A." in name}
        if not self.lora() and len(ranks) == 1:
            self.add_lora(ranks.pop(), seed=0)
        own = self.lora()
        if {name: tensor.shape for name, tensor in tensors.items()} != {name: t.shape for name, t in own.items()}:
            raise ValueError("its LoRA is of another CLIP")
        set_peft_model_state_dict(self.model, dict(tensors))
        self.model.requires_grad_(False)

    def _empty(self) -> Features:
        width = self.model.config.projection_dim
        return Features((torch.zeros(0, width), torch.zeros(0, width)), torch.zeros(0))
