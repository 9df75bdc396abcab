"""HPSv3 (arXiv 2508.03789): a Qwen2-VL-7B that was trained on human preferences, converted from the published names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen2VLModel

from progrpo.rewards.base import Score
from progrpo.rewards.clip import batch_slices
from progrpo.rewards.hub import fetching, hub_file
from progrpo.rewards.questions import question_text
from progrpo.rewards.qwen2vl import (
    IMAGE,
    Qwen2VLReward,
    build_model,
    chat_ids,
    features,
    last_place,
    load_base,
    place_networks,
    token_id,
)
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

FILE = ("MizzenAI/HPSv3", "HPSv3.safetensors", "4f81e3e09edd82fe3c5f636444c721b592a735ca")
BASE = ("Qwen/Qwen2-VL-7B-Instruct", "eed13092ef92e448dd6875b2a00151bd3f7db0ac")
PIXELS = 256 * 28 * 28
TOKEN = "<|Reward|>"


class HPSv3(Qwen2VLReward):
    """The mean m of the Gaussian (m, s) that three layers give of Qwen2-VL's feature of the token <|Reward|>.

    It has no bounds; on its benchmark the means of models are about 0 to 11. Pictures are resized to about 200,704
    pixels, each side a multiple of 28. As in the published code, the positions of tokens are counted one by one, also
    those of the picture, where Qwen2-VL itself has three coordinates. The network computes in bfloat16, unless the term
    says otherwise, and the layers after it in float32.
    """

    parameters = 7_748_610_610

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load the published weights (safetensors), and the configuration and tokenizer of Qwen2-VL-7B-Instruct."""
        config, tokenizer = load_base("hpsv3", BASE, [TOKEN])
        path = hub_file("hpsv3", *FILE)
        with fetching("hpsv3", FILE[0]):
            model, head = convert_networks(load_file(path), config)
        return cls(*place_networks(model, head, term), tokenizer, image_processor(), term.network_batch_size)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        batches = batch_slices(len(prompts), self._batch_size)
        texts = [question_text("hpsv3").replace("{request}", prompt.text) for prompt in prompts]
        return [Score(mean) for batch in batches for mean in self._means(pictures_NHWC[batch], texts[batch]).tolist()]

    @torch.no_grad()
    def _means(self, pictures_BHWC: np.ndarray, texts: Sequence[str]) -> Tensor:
        inputs = self._image_processor(list(pictures_BHWC), return_tensors="pt", input_data_format="channels_last")
        places = (inputs.image_grid_thw.prod(1) // self._image_processor.merge_size**2).tolist()
        rows = [chat_ids(self._tokenizer, IMAGE * count, text) for text, count in zip(texts, places, strict=True)]
        features_BLD = features(
            self._model, rows, pixel_values=inputs.pixel_values, image_grid_thw=inputs.image_grid_thw
        )
        reward = token_id(self._tokenizer, TOKEN)
        last = [last_place(row, reward) for row in rows]
        means_B: Tensor = self._head(features_BLD[range(len(rows)), last].float())[:, 0]
        return means_B


def image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen2-VL's processor for pictures of the published size."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS, "longest_edge": PIXELS})


# --- from the published names to transformers' ------------------------------------------------------------------------


def convert_networks(state: Mapping[str, Tensor], config: Qwen2VLConfig) -> tuple[Qwen2VLModel, nn.Sequential]:
    """Convert a checkpoint of the published code to transformers' model and the head."""
    head = {name.removeprefix("rm_head."): weight for name, weight in state.items() if name.startswith("rm_head.")}
    return build_model(state, config), build_mean_head(head)


def build_mean_head(state: Mapping[str, Tensor]) -> nn.Sequential:
    """Build the three layers after Qwen2-VL, with ReLUs between them. In training there was dropout after the first."""
    layers = {place: nn.Linear(*state[f"{place}.weight"].shape[::-1]) for place in ("0", "3", "5")}
    head = nn.Sequential(OrderedDict({"0": layers["0"], "1": nn.ReLU(), "3": layers["3"], "4": nn.ReLU()}))
    head.add_module("5", layers["5"])
    head.load_state_dict(dict(state))
    return head
