"""HPSv2.1: a CLIP ViT-H/14 trained on human preferences (arXiv 2306.09341), converted from open_clip's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from progrpo.rewards.base import Score
from progrpo.rewards.clip import VIT_H, ClipCosine, load_tokenizer
from progrpo.rewards.hub import build_network, hub_file, place, read_pickle, rename
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

REPOSITORY, REVISION = "xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a"
CHECKPOINT = "HPS_v2.1_compressed.pt"
SHA256 = "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"


class HPSv2(ClipCosine):
    """<f / |f|, g / |g|> for picture features f and text features g, without a logit scale: about 0.2 to 0.35.

    As in the published code, pictures are resized to 224 on their longer side and padded with black to a square
    (`pad_to_square`), and texts are cut at 77 tokens. Unlike there, resizing always smooths (there it depends on
    torchvision's version) and rounds to 8 bits, and ftfy does not repair texts.
    """

    parameters = 986_109_441  # of ViT-H/14

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load the published weights. They are a pickle: its checksum is tested, and it is read as tensors alone."""
        state = read_pickle("hpsv2", hub_file("hpsv2", REPOSITORY, CHECKPOINT, REVISION), SHA256)["state_dict"]
        tokenizer = load_tokenizer("hpsv2", *VIT_H)
        return cls(place(convert_clip(state), term), tokenizer, CLIPImageProcessorPil(), term.network_batch_size)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score(cosine) for cosine in self.cosines(pictures_NHWC, [p.text for p in prompts])]

    def _framed(self, pictures_BHWC: np.ndarray) -> np.ndarray:
        side = self._image_processor.crop_size["height"]
        return np.stack([pad_to_square(picture_HWC, side) for picture_HWC in pictures_BHWC])


def pad_to_square(picture_HWC: np.ndarray, side: int) -> np.ndarray:
    """Resize a picture to `side` pixels on its longer side and put it in the middle of a black square.

    Of an odd number of black rows or columns, the greater half is below or on the right, as in the published code.
    """
    height, width = (max(1, round(side / max(picture_HWC.shape[:2]) * length)) for length in picture_HWC.shape[:2])
    resized = Image.fromarray(picture_HWC).resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side))
    square.paste(resized, ((side - width) // 2, (side - height) // 2))
    return np.asarray(square)


# --- from open_clip to transformers -----------------------------------------------------------------------------------

_NAMES = {  # in this order
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "transformer.resblocks": "text_model.encoder.layers",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    ".attn.": ".self_attn.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".c_fc.": ".fc1.",
    ".c_proj.": ".fc2.",
}


def convert_clip(state: Mapping[str, Tensor], text_heads: int = 16, vision_heads: int = 16) -> CLIPModel:
    """Convert a state dict of open_clip's CLIP to transformers' model. Only the numbers of heads are not in its
    tensors.
    """
    return build_network(CLIPModel, infer_config(state, text_heads, vision_heads), convert_weights(state))


def convert_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, weight in state.items():
        new = rename(name, _NAMES)
        if ".in_proj_" in name:  # queries, keys and values in one tensor
            thirds = zip("qkv", weight.chunk(3), strict=True)
            weights |= {new.replace(".in_proj_", f".{letter}_proj."): third for letter, third in thirds}
        else:
            weights[new] = weight.T if name in ("visual.proj", "text_projection") else weight
    return weights


def infer_config(state: Mapping[str, Tensor], text_heads: int = 16, vision_heads: int = 16) -> CLIPConfig:
    vocabulary, text_width = state["token_embedding.weight"].shape
    vision_width, _, patch, _ = state["visual.conv1.weight"].shape
    patches = len(state["visual.positional_embedding"]) - 1
    return CLIPConfig(
        projection_dim=state["text_projection"].shape[1],
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "max_position_embeddings": len(state["positional_embedding"]),
            "eos_token_id": vocabulary - 1,  # the highest id, at which open_clip takes the text's features
            **_tower(state, "transformer", text_heads),
        },
        vision_config={
            "hidden_size": vision_width,
            "patch_size": patch,
            "image_size": patch * round(patches**0.5),
            **_tower(state, "visual.transformer", vision_heads),
        },
    )


def _tower(state: Mapping[str, Tensor], name: str, heads: int) -> dict[str, int | str]:
    return {
        "num_hidden_layers": sum(n.startswith(f"{name}.") and n.endswith(".ln_1.weight") for n in state),
        "num_attention_heads": heads,
        "intermediate_size": len(state[f"{name}.resblocks.0.mlp.c_fc.weight"]),
        "hidden_act": "gelu",
    }
