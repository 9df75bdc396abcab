"""Parts of rewards that are a Qwen2-VL with a head on tokens of its own: its tokens, features and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen2VLModel

from progrpo.rewards.hub import HubReward, build_network, damaged, fetching, hub_file, place
from progrpo.rewards.settings import RewardTerm

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
_BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_BETWEEN, _AFTER = "<|vision_end|>", "\n<|im_end|>\n<|im_start|>assistant\n"
_Head = TypeVar("_Head", bound=nn.Module)


class Qwen2VLReward(HubReward):
    """A reward of what a head gives of a Qwen2-VL's features. `head` computes in float32.

    `tokenizer` knows Qwen2-VL's special tokens, and those that the reward adds (`read_tokenizer`).
    """

    def __init__(
        self,
        model: Qwen2VLModel,
        head: nn.Module,
        tokenizer: Tokenizer,
        image_processor: Qwen2VLImageProcessorPil,
        batch_size: int = 16,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._head = head.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._batch_size = batch_size


def load_base(reward: str, base: tuple[str, str], tokens: Sequence[str]) -> tuple[Qwen2VLConfig, Tokenizer]:
    """Load the configuration and the tokenizer of a published Qwen2-VL (repository and revision), and add tokens."""
    repository, revision = base
    with fetching(reward, repository):
        config: Qwen2VLConfig = Qwen2VLConfig.from_pretrained(repository, revision=revision)
    file = hub_file(reward, repository, "tokenizer.json", revision)
    return config, read_tokenizer(reward, file, tokens)


def read_tokenizer(reward: str, file: Path, tokens: Sequence[str]) -> Tokenizer:
    """Read a tokenizer and add special tokens at its end. Refusal where the file is damaged."""
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no other kind
        raise damaged(reward, f"contents of {file}", error) from error
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer


def place_networks(model: Qwen2VLModel, head: _Head, term: RewardTerm) -> tuple[Qwen2VLModel, _Head]:
    """Freeze both and move them: the network in bfloat16, unless the term says otherwise, and the head in float32."""
    exact = replace(term, dtype="bfloat16") if term.dtype == "auto" else term
    return place(model, exact), place(head, replace(term, dtype="float32"))


def chat_ids(tokenizer: Tokenizer, seen: str, text: str) -> list[int]:
    """The tokens of a text after what is seen (IMAGE or VIDEO, once for each place), as Qwen2-VL's chat has them."""
    ids: list[int] = tokenizer.encode(f"{_BEFORE}{seen}{_BETWEEN}{text}{_AFTER}", add_special_tokens=False).ids
    return ids


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The number of a text that is one token."""
    (number,) = tokenizer.encode(token, add_special_tokens=False).ids
    return int(number)


def last_place(row: Sequence[int], token: int) -> int:
    """The last place of a token. A prompt may write that token, too, and stands before the question's own."""
    return len(row) - 1 - row[::-1].index(token)


@torch.no_grad()
def features(model: Qwen2VLModel, rows: Sequence[Sequence[int]], **pixels: Tensor) -> Tensor:
    """Compute the features (B, L, D) of rows of tokens, padded at their ends, given the patches of what they see.

    Positions are counted one by one, also within a picture or a video, as code written for transformers 4.45 does,
    where Qwen2-VL itself has three coordinates.
    """
    device = model.device
    ids_BL = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
    position_BL = torch.arange(ids_BL.shape[1], device=device).expand(len(rows), -1)
    features_BLD: Tensor = model(
        input_ids=ids_BL,
        attention_mask=(torch.tensor([len(row) for row in rows], device=device)[:, None] > position_BL).long(),
        position_ids=position_BL.expand(3, -1, -1),
        use_cache=False,
        **{name: x.to(device, model.dtype if x.is_floating_point() else x.dtype) for name, x in pixels.items()},
    ).last_hidden_state
    return features_BLD


def build_model(state: Mapping[str, Tensor], config: Qwen2VLConfig) -> Qwen2VLModel:
    """Build transformers' network from a checkpoint of published code; what belongs to neither pictures nor text is
    left out. The size of the vocabulary is that of the checkpoint.
    """
    weights = {_renamed(name): weight for name, weight in state.items() if name.split(".")[0] in ("visual", "model")}
    config.text_config.vocab_size = len(weights["language_model.embed_tokens.weight"])
    config.text_config.pad_token_id = None  # it may be beyond a small vocabulary, and no embedding is trained here
    return build_network(Qwen2VLModel, config, weights)


def _renamed(name: str) -> str:
    """The name in Qwen2VLModel. Under `model` transformers 4 had the text's network alone, and later both."""
    if name.startswith(("model.language_model.", "model.visual.")):
        return name.removeprefix("model.")
    return name.replace("model.", "language_model.", 1) if name.startswith("model.") else name
