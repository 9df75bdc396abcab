"""ImageReward: a BLIP trained on experts' rankings (arXiv 2304.05977), converted from the published names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from tokenizers.models import WordPiece
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPImageProcessorPil,
)

from progrpo.rewards.base import Score
from progrpo.rewards.clip import batch_slices, build_head, center_crop, preprocess
from progrpo.rewards.hub import HubReward, build_network, hub_file, place, read_pickle, rename, sha256_at_hub
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

FILE = ("zai-org/ImageReward", "ImageReward.pt", "5736be03b2652728fb87788c9797b0570450ab72")
VOCABULARY = ("google-bert/bert-base-uncased", "vocab.txt", "86b5e0934494bd15c9632b12f734a8a67f723594")
MEAN, STD = 0.16717362830052426, 1.0333394966054072
LENGTH = 35


class ImageReward(HubReward):
    """(h(t) - 0.167) / 1.033 for five linear layers h and BLIP's feature t of the text's first token, given the
    picture.

    It has mean 0 and standard deviation 1 on its training pictures, so it is mostly -2 to 2. As in the published code,
    texts are cut at 35 tokens, and pictures are resized to 224 on their shorter side and cropped at the centre.
    """

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        head: nn.Sequential,
        tokenizer: BertTokenizer,
        image_processor: CLIPImageProcessorPil,
        batch_size: int = 16,
    ) -> None:
        """`head` computes in float32."""
        self._vision = vision.eval().requires_grad_(False)
        self._text = text.eval().requires_grad_(False)
        self._head = head.requires_grad_(False)
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._batch_size = batch_size

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load the published weights. They are a pickle: the hub's checksum is tested, and it is read as tensors
        alone.
        """
        path = hub_file("imagereward", *FILE)
        sha256 = sha256_at_hub("imagereward", *FILE)
        vision, text, head = convert_networks(read_pickle("imagereward", path, sha256))
        return cls(
            place(vision, term),
            place(text, term),
            place(head, replace(term, dtype="float32")),
            blip_tokenizer(WordPiece.read_file(str(hub_file("imagereward", *VOCABULARY)))),
            CLIPImageProcessorPil(),
            term.network_batch_size,
        )

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        batches = batch_slices(len(prompts), self._batch_size)
        texts = [p.text for p in prompts]
        return [Score(r) for batch in batches for r in self._rewards(pictures_NHWC[batch], texts[batch]).tolist()]

    @torch.no_grad()
    def _rewards(self, pictures_BHWC: np.ndarray, texts: list[str]) -> Tensor:
        device = self._vision.device
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        side = self._image_processor.crop_size["height"]
        middles_BHWC = np.stack([center_crop(picture_HWC, side) for picture_HWC in pictures_BHWC])
        picture_BPD = self._vision(preprocess(middles_BHWC, self._image_processor).to(device)).last_hidden_state
        text_BLD = self._text(
            input_ids=tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device),
            encoder_hidden_states=picture_BPD,
        ).last_hidden_state
        rewards_B1: Tensor = (self._head(text_BLD[:, 0].float()) - MEAN) / STD
        return rewards_B1.squeeze(-1)


def blip_tokenizer(vocabulary: Mapping[str, int]) -> BertTokenizer:
    """BERT's tokenizer with the two tokens that BLIP adds at its end."""
    tokenizer = BertTokenizer(vocab=dict(vocabulary))
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer


# --- from the published code to transformers --------------------------------------------------------------------------

_VISION = {  # in this order
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    "norm.": "post_layernorm.",
}


def convert_networks(
    state: Mapping[str, Tensor], vision_heads: int = 16, text_heads: int = 12
) -> tuple[BlipVisionModel, BlipTextModel, nn.Sequential]:
    """Convert a checkpoint of the published code to transformers' models. Only the numbers of heads are not in its
    tensors.
    """
    vision, text, head = split_weights(state)
    return (
        build_network(BlipVisionModel, infer_vision_config(vision, vision_heads), vision),
        build_network(BlipTextModel, infer_text_config(text, text_heads), text, add_pooling_layer=False),
        build_head(head),
    )


def split_weights(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the picture's network, of the text's and of the head, without BLIP's projections for
    pretraining.
    """

    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}

    vision = {rename(name, _VISION): weight for name, weight in below("blip.visual_encoder.").items()}
    text = below("blip.text_encoder.")
    text.pop("embeddings.position_ids", None)  # 0, 1, 2, ...
    return vision, text, below("mlp.")


def infer_vision_config(weights: Mapping[str, Tensor], heads: int = 16) -> BlipVisionConfig:
    width, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    patches = weights["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=sum(name.endswith(".layer_norm1.weight") for name in weights),
        num_attention_heads=heads,
        image_size=patch * round(patches**0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def infer_text_config(weights: Mapping[str, Tensor], heads: int = 12) -> BlipTextConfig:
    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(weights["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=sum(name.endswith(".intermediate.dense.weight") for name in weights),
        num_attention_heads=heads,
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
    )
