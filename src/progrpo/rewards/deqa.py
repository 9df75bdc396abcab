"""DeQA-Score (arXiv 2501.11561): an mPLUG-Owl2 that was trained to say in a word how good a picture's quality is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil

from progrpo.rewards.base import Score
from progrpo.rewards.clip import batch_slices, preprocess
from progrpo.rewards.hub import HubReward, load_pretrained, place
from progrpo.rewards.mplug_owl2 import MPLUGOwl2
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

DEQA = ("zhiyuanyou/DeQA-Score-Mix3", "246e219b7e3bc9b5dff5269c1a8564087aefca3f")
# Llama's tokens of the published question: "USER: How would you rate the quality of this image?\n", the picture, and
# "\nASSISTANT: The quality of the image is". The question is the same for every picture, so no tokenizer is loaded.
BEFORE = (1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973, 13)
AFTER = (29871, 13, 22933, 9047, 13566, 29901, 450, 11029, 310, 278, 1967, 338)
LEVELS = {15129: 5, 1781: 4, 6534: 3, 6460: 2, 4319: 1}
"""The values of the tokens excellent, good, fair, poor and bad."""
GROUND = (122, 116, 104)
"""The mean colour of CLIP's training pictures, 255 times it rounded down."""


class DeQANetwork(MPLUGOwl2):
    """mPLUG-Owl2 with the published question."""

    before = BEFORE
    after = AFTER


class DeQA(HubReward):
    """The mean of the values of the words excellent (5), good, fair, poor and bad (1), weighted by their probabilities
    as the next token after the published question, among these five: 1..5.

    It judges the technical quality of a picture (noise, blur, compression) and does not read the prompt. As in the
    published code, pictures are padded to a square with CLIP's mean colour and resized to 448 pixels.
    """

    takes_model = True
    parameters = 8_197_859_328

    def __init__(self, model: MPLUGOwl2, image_processor: CLIPImageProcessorPil, batch_size: int = 16) -> None:
        self._model = model.eval().requires_grad_(False)
        self._image_processor = image_processor
        self._batch_size = batch_size

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load the published weights (safetensors), or those of the folder or hub id that the term names."""
        repository, revision = (term.model, "main") if term.model else DEQA
        model = load_pretrained(DeQANetwork, term.name, repository, revision)
        return cls(place(model, term), image_processor(model.config.tower.image_size), term.network_batch_size)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        batches = batch_slices(len(prompts), self._batch_size)
        return [Score(value) for batch in batches for value in self._values(pictures_NHWC[batch]).tolist()]

    @torch.no_grad()
    def _values(self, pictures_BHWC: np.ndarray) -> Tensor:
        pixels_BCHW = preprocess(pad_to_squares(pictures_BHWC), self._image_processor)
        logits_BK = self._model.next_logits(pixels_BCHW)[:, list(LEVELS)].float()
        return logits_BK.softmax(-1) @ torch.tensor([*LEVELS.values()], device=logits_BK.device, dtype=torch.float32)


def image_processor(side: int) -> CLIPImageProcessorPil:
    """CLIP's processor for pictures of `side` pixels."""
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def pad_to_squares(pictures_BHWC: np.ndarray) -> np.ndarray:
    """Put pictures in the middle of squares of CLIP's mean colour.

    Of an odd number of added rows or columns, the greater half is below or on the right, as in the published code.
    """
    count, height, width, _ = pictures_BHWC.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    squares_BHWC = np.broadcast_to(np.array(GROUND, np.uint8), (count, side, side, 3)).copy()
    squares_BHWC[:, top : top + height, left : left + width] = pictures_BHWC
    return squares_BHWC
