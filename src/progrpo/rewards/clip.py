"""What the rewards made of a CLIP share: the cosine of a picture and its prompt, and how models come from the hub."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from tokenizers.models import BPE
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from progrpo.rewards.base import Reward, Score
from progrpo.types import Prompt

BATCH = 16
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class ClipScore:
    """A frozen CLIP that compares each picture with its prompt."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessorPil) -> None:
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._image_processor = image_processor

    def cosines(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[float]:
        """<f / |f|, g / |g|> of picture features f and text features g, in -1..1, one a picture; NaN where a norm is 0."""
        starts = range(0, len(prompts), BATCH)
        batches = [(pictures_NHWC[i : i + BATCH], [p.text for p in prompts[i : i + BATCH]]) for i in starts]
        return [cosine for pictures, texts in batches for cosine in self._cosines(pictures, texts).tolist()]

    @torch.no_grad()
    def _cosines(self, pictures_BHWC: np.ndarray, texts: list[str]) -> Tensor:
        # Without an attention mask: a text's features are those of its end, which sees nothing of the padding after it.
        length = self._model.config.text_config.max_position_embeddings
        ids_BL = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        device = self._model.device
        f_BD = self._model.get_image_features(self._pixels(pictures_BHWC).to(device)).pooler_output.float()
        g_BD = self._model.get_text_features(ids_BL.to(device)).pooler_output.float()
        return (f_BD / f_BD.norm(dim=-1, keepdim=True) * g_BD / g_BD.norm(dim=-1, keepdim=True)).sum(-1)

    def _pixels(self, pictures_BHWC: np.ndarray) -> Tensor:
        size = self._size(*pictures_BHWC.shape[1:3])
        made = self._image_processor(
            list(pictures_BHWC), size=size, input_data_format="channels_last", return_tensors="pt"
        )
        pixels_BCHW: Tensor = made.pixel_values
        return pixels_BCHW

    def _size(self, height: int, width: int) -> dict[str, int]:
        """What pictures are resized to, before the processor's central crop."""
        return dict(self._image_processor.size)


class OnFirstScore:
    """A reward whose weights are loaded when it is first asked for a score: once, whoever asks at the same time."""

    def __init__(self, load: Callable[[], Reward]) -> None:
        self._load, self._one = functools.cache(load), threading.Lock()

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        with self._one:
            reward = self._load()
        return reward.score(pictures_NHWC, prompts)


# --- from the hub -----------------------------------------------------------------------------------------------------


@contextmanager
def fetching(reward: str, repository: str) -> Iterator[None]:
    """Says in a ValueError which reward lacks what, where neither the cache nor the network has it."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"reward.name {reward!r}: there is no cached copy of {repository}, and the Hugging Face hub did not give one: {reason}"
        ) from error


def vit_h_tokenizer(reward: str) -> CLIPTokenizer:
    # Not by from_pretrained, which gives an empty tokenizer, and no error, where there are no files.
    with fetching(reward, VIT_H):
        vocabulary, merges = BPE.read_file(*(hf_hub_download(VIT_H, name) for name in ("vocab.json", "merges.txt")))
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


def on_device(model: CLIPModel) -> CLIPModel:
    """On the GPU in float16, if there is one, else on the CPU in float32."""
    return model.to("cuda", torch.float16) if torch.cuda.is_available() else model.to("cpu", torch.float32)
