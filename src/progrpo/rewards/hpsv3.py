"""HPSv3 (arXiv 2508.03789): a Qwen2-VL-7B that was trained on human preferences, converted from the published names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen2VLModel

from progrpo.rewards.base import Score
from progrpo.rewards.clip import batch_slices
from progrpo.rewards.hub import HubReward, build_network, damaged, fetching, hub_file, place
from progrpo.rewards.questions import question_text
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

FILE = ("MizzenAI/HPSv3", "HPSv3.safetensors", "4f81e3e09edd82fe3c5f636444c721b592a735ca")
BASE, BASE_REVISION = "Qwen/Qwen2-VL-7B-Instruct", "eed13092ef92e448dd6875b2a00151bd3f7db0ac"
PIXELS = 256 * 28 * 28
_IMAGE, _REWARD = "<|image_pad|>", "<|Reward|>"
_BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_BETWEEN, _AFTER = "<|vision_end|>", "\n<|im_end|>\n<|im_start|>assistant\n"


class HPSv3(HubReward):
    """The mean m of the Gaussian (m, s) that three layers give of Qwen2-VL's feature of the token <|Reward|>.

    It has no bounds; on its benchmark the means of models are about 0 to 11. Pictures are resized to about 200,704
    pixels, each side a multiple of 28. As in the published code, the positions of tokens are counted one by one, also
    those of the picture, where Qwen2-VL itself has three coordinates. The network computes in bfloat16, unless the term
    says otherwise, and the layers after it in float32.
    """

    parameters = 7_748_610_610

    def __init__(
        self,
        model: Qwen2VLModel,
        head: nn.Sequential,
        tokenizer: Tokenizer,
        image_processor: Qwen2VLImageProcessorPil,
        batch_size: int = 16,
    ) -> None:
        """`head` computes in float32. `tokenizer` knows Qwen2-VL's special tokens and <|Reward|>."""
        self._model = model.eval().requires_grad_(False)
        self._head = head.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._batch_size = batch_size

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load the published weights (safetensors), and the configuration and tokenizer of Qwen2-VL-7B-Instruct."""
        with fetching("hpsv3", BASE):
            config = Qwen2VLConfig.from_pretrained(BASE, revision=BASE_REVISION)
        tokenizer = load_tokenizer(hub_file("hpsv3", BASE, "tokenizer.json", BASE_REVISION))
        path = hub_file("hpsv3", *FILE)
        with fetching("hpsv3", FILE[0]):
            model, head = convert_networks(load_file(path), config)
        exact = replace(term, dtype="bfloat16") if term.dtype == "auto" else term
        head = place(head, replace(term, dtype="float32"))
        return cls(place(model, exact), head, tokenizer, image_processor(), term.network_batch_size)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        batches = batch_slices(len(prompts), self._batch_size)
        texts = [question_text("hpsv3").replace("{request}", prompt.text) for prompt in prompts]
        return [Score(mean) for batch in batches for mean in self._means(pictures_NHWC[batch], texts[batch]).tolist()]

    @torch.no_grad()
    def _means(self, pictures_BHWC: np.ndarray, texts: Sequence[str]) -> Tensor:
        device, dtype = self._model.device, self._model.dtype
        inputs = self._image_processor(list(pictures_BHWC), return_tensors="pt", input_data_format="channels_last")
        places = (inputs.image_grid_thw.prod(1) // self._image_processor.merge_size**2).tolist()
        rows = [self._ids(text, count) for text, count in zip(texts, places, strict=True)]
        ids_BL = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
        position_BL = torch.arange(ids_BL.shape[1], device=device).expand(len(rows), -1)
        features_BLD = self._model(
            input_ids=ids_BL,
            attention_mask=(torch.tensor([len(row) for row in rows], device=device)[:, None] > position_BL).long(),
            position_ids=position_BL.expand(3, -1, -1),
            pixel_values=inputs.pixel_values.to(device, dtype),
            image_grid_thw=inputs.image_grid_thw.to(device),
            use_cache=False,
        ).last_hidden_state
        (reward,) = self._tokenizer.encode(_REWARD, add_special_tokens=False).ids
        last = [len(row) - 1 - row[::-1].index(reward) for row in rows]  # a prompt may write that token, too
        means_B: Tensor = self._head(features_BLD[range(len(rows)), last].float())[:, 0]
        return means_B

    def _ids(self, text: str, places: int) -> list[int]:
        """The tokens of a question about a picture of so many tokens, as Qwen2-VL's chat has them."""
        text = f"{_BEFORE}{_IMAGE * places}{_BETWEEN}{text}{_AFTER}"
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen2-VL's processor for pictures of the published size."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS, "longest_edge": PIXELS})


def load_tokenizer(file: Path) -> Tokenizer:
    """Load Qwen2-VL's tokenizer, with the token that HPSv3 adds at its end."""
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no other kind
        raise damaged("hpsv3", f"tokenizer.json of {BASE}", error) from error
    tokenizer.add_special_tokens([AddedToken(_REWARD, special=True)])
    return tokenizer


# --- from the published names to transformers' ------------------------------------------------------------------------


def convert_networks(state: Mapping[str, Tensor], config: Qwen2VLConfig) -> tuple[Qwen2VLModel, nn.Sequential]:
    """Convert a checkpoint of the published code to transformers' model and the head. The size of the vocabulary is
    that of the checkpoint.
    """
    weights = {_renamed(name): weight for name, weight in state.items() if name.split(".")[0] in ("visual", "model")}
    config.text_config.vocab_size = len(weights["language_model.embed_tokens.weight"])
    config.text_config.pad_token_id = None  # it may be beyond a small vocabulary, and no embedding is trained here
    head = {name.removeprefix("rm_head."): weight for name, weight in state.items() if name.startswith("rm_head.")}
    return build_network(Qwen2VLModel, config, weights), build_mean_head(head)


def _renamed(name: str) -> str:
    """The name in Qwen2VLModel. Under `model` transformers 4 had the text's network alone, and later both."""
    if name.startswith(("model.language_model.", "model.visual.")):
        return name.removeprefix("model.")
    return name.replace("model.", "language_model.", 1) if name.startswith("model.") else name


def build_mean_head(state: Mapping[str, Tensor]) -> nn.Sequential:
    """Build the three layers after Qwen2-VL, with ReLUs between them. In training there was dropout after the first."""
    layers = {place: nn.Linear(*state[f"{place}.weight"].shape[::-1]) for place in ("0", "3", "5")}
    head = nn.Sequential(OrderedDict({"0": layers["0"], "1": nn.ReLU(), "3": layers["3"], "4": nn.ReLU()}))
    head.add_module("5", layers["5"])
    head.load_state_dict(dict(state))
    return head
