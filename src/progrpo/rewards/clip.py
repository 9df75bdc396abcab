"""Parts of rewards that use a CLIP or a BLIP: preprocessing of pictures, the cosine with a text, a regression head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from progrpo.rewards.hub import HubReward, damaged, hub_file

VIT_H = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")
VIT_L = ("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")


class ClipCosine(HubReward):
    """A frozen CLIP that compares each picture with a text."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        image_processor: CLIPImageProcessorPil,
        batch_size: int = 16,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._batch_size = batch_size

    def cosines(self, pictures_NHWC: np.ndarray, texts: Sequence[str]) -> list[float]:
        """<f / |f|, g / |g|> of each picture's features f and its text's features g, in -1..1; NaN where a norm is
        0.
        """
        batches = batch_slices(len(texts), self._batch_size)
        return [cosine for batch in batches for cosine in self._cosines(pictures_NHWC[batch], texts[batch]).tolist()]

    @torch.no_grad()
    def _cosines(self, pictures_BHWC: np.ndarray, texts: Sequence[str]) -> Tensor:
        pixels_BCHW = preprocess(self._framed(pictures_BHWC), self._image_processor)
        f_BD, g_BD = directions(self._model, pixels_BCHW, tokenized(self._model, self._tokenizer, texts))
        return (f_BD * g_BD).sum(-1)

    def _framed(self, pictures_BHWC: np.ndarray) -> np.ndarray:
        """The pictures as the processor takes them, which resizes and crops them."""
        return pictures_BHWC


def batch_slices(count: int, size: int) -> list[slice]:
    """The batches of `count` rows, of `size` rows at most."""
    return [slice(i, i + size) for i in range(0, count, size)]


def directions(model: CLIPModel, pixels_BCHW: Tensor, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the features of pictures and of texts, (B, D) each, float32, of length 1; NaN where a length is 0."""
    f_BD = model.get_image_features(pixels_BCHW.to(model.device)).pooler_output.float()
    g_BD = model.get_text_features(ids_BL.to(model.device)).pooler_output.float()
    return f_BD / f_BD.norm(dim=-1, keepdim=True), g_BD / g_BD.norm(dim=-1, keepdim=True)


def tokenized(model: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """The tokens of texts, (B, L), cut at what the model takes."""
    # without an attention mask: a text's features are those of its end, which attends to nothing after it
    length = model.config.text_config.max_position_embeddings
    ids_BL: Tensor = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    return ids_BL


def preprocess(pictures: Sequence[np.ndarray] | np.ndarray, image_processor: CLIPImageProcessorPil) -> Tensor:
    """Resize pictures to the processor's size, crop them at the centre and normalise them."""
    pixels_BCHW: Tensor = image_processor(
        list(pictures), return_tensors="pt", input_data_format="channels_last"
    ).pixel_values
    return pixels_BCHW


def center_crop(picture_HWC: np.ndarray, side: int) -> np.ndarray:
    """Resize a picture to `side` pixels on its shorter side and crop its middle, as torchvision's Resize and
    CenterCrop.

    Where an odd number of rows or columns is cut, the half before the square is rounded to an even number. CLIP's own
    processor rounds it down.
    """
    height, width = picture_HWC.shape[:2]
    size = [int(side * length / min(height, width)) for length in (width, height)]
    left, top = (round((length - side) / 2) for length in size)
    resized = Image.fromarray(picture_HWC).resize((size[0], size[1]), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def build_head(state: Mapping[str, Tensor]) -> nn.Sequential:
    """Build the linear layers `NAME.0`, `NAME.2`, ... in a row. In training there was dropout between them."""
    layers = {name.split(".")[1]: weight for name, weight in state.items() if name.endswith(".weight")}
    head = nn.Sequential(OrderedDict((i, nn.Linear(*layers[i].shape[::-1])) for i in sorted(layers, key=int)))
    head.load_state_dict({name.partition(".")[2]: weight for name, weight in state.items()})
    return head


def load_tokenizer(reward: str, repository: str, revision: str) -> CLIPTokenizer:
    # not from_pretrained, which gives an empty tokenizer, and no error, where there are no files
    files = [hub_file(reward, repository, name, revision) for name in ("vocab.json", "merges.txt")]
    try:
        vocabulary, merges = BPE.read_file(*map(str, files))
    except Exception as error:  # tokenizers raises no other kind
        raise damaged(reward, f"vocab.json and merges.txt of {repository}", error) from error
    return CLIPTokenizer(vocab=vocabulary, merges=merges)
