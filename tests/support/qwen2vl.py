"""A Qwen2-VL of random weights with the heads of HPSv3 and of VideoReward, and a small tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen2VLModel

from progrpo.rewards.hpsv3 import TOKEN, HPSv3, build_mean_head
from progrpo.rewards.questions import question_text
from progrpo.rewards.qwen2vl import read_tokenizer
from progrpo.rewards.videoalign import TOKENS, VideoAlign

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _small_tokenizer() -> Tokenizer:
    """A tokenizer of bytes and of what recurs in the questions, which would be thousands of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([question_text("hpsv3"), question_text("videoalign")], trainer)
    return tokenizer


_TOKENIZER = _small_tokenizer()
FIRST = _TOKENIZER.get_vocab_size()
"""The id of the first special token."""
_TOKENIZER.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])


def tokenizer_file(folder: Path) -> Path:
    """A small tokenizer with Qwen2-VL's special tokens after its own."""
    _TOKENIZER.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def small_config() -> Qwen2VLConfig:
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}
    return Qwen2VLConfig(
        text_config={
            **text,
            **{"num_key_value_heads": 1, "vocab_size": FIRST + len(SPECIAL) + len(TOKENS), "rope_parameters": rope},
            **{"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.2},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "initializer_range": 0.2},
        image_token_id=FIRST + SPECIAL.index("<|image_pad|>"),
        video_token_id=FIRST + SPECIAL.index("<|video_pad|>"),
        vision_start_token_id=FIRST + SPECIAL.index("<|vision_start|>"),
    )


def random_head() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"0": (24, 8), "3": (8, 4), "5": (4, 2)}
    return {
        f"{place}.{kind}": torch.randn(shape, generator=generator)
        for place, (inputs, outputs) in sizes.items()
        for kind, shape in (("weight", (outputs, inputs)), ("bias", (outputs,)))
    }


def small_model() -> Qwen2VLModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2VLModel(small_config()).eval()


def small_processor() -> Qwen2VLImageProcessorPil:
    """For pictures of 16 tokens."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 16 * 28**2, "longest_edge": 16 * 28**2})


def small_hpsv3(folder: Path, batch_size: int = 16) -> HPSv3:
    """HPSv3 on the small model, with its tokenizer's file in a folder."""
    tokenizer = read_tokenizer("hpsv3", tokenizer_file(folder), [TOKEN])
    return HPSv3(small_model(), build_mean_head(random_head()), tokenizer, small_processor(), batch_size)


def small_videoalign(folder: Path, kind: type[VideoAlign] = VideoAlign, batch_size: int = 16) -> VideoAlign:
    """VideoReward on the small model, with its tokenizer's file in a folder."""
    tokenizer = read_tokenizer("videoalign", tokenizer_file(folder), TOKENS)
    return kind(small_model(), random_linear(), tokenizer, small_processor(), batch_size)


def random_linear() -> nn.Linear:
    """A head of one number without a bias."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Linear(24, 1, bias=False)
