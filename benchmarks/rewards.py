"""The cost of a built-in reward: milliseconds per picture on one CPU thread.

    python benchmarks/rewards.py [--names ocr jpeg_compressibility nsfw shapes] [--size 256] [--pictures 8] [--json]

Rewards of the hub are built in their published sizes with random weights, which cost the same and need no download;
their scores mean nothing. The pictures are of the shapes world with a word drawn over them, and the prompt asks for
both. Figures are the median of five rounds after one that does not count, in processor time, which other jobs on the
machine disturb less.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when numpy is imported

import argparse
import json
import statistics
import string
import time
from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from transformers import (
    BitImageProcessorPil,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from progrpo.rewards.aesthetic import Aesthetic
from progrpo.rewards.base import Reward
from progrpo.rewards.clip_similarity import CLIPSimilarity
from progrpo.rewards.clipscore import CLIPScore
from progrpo.rewards.dino import Dino, DinoSimilarity
from progrpo.rewards.hpsv2 import HPSv2
from progrpo.rewards.imagereward import ImageReward, blip_tokenizer
from progrpo.rewards.load import load_reward
from progrpo.rewards.lpips import LPIPS, LPIPSSimilarity
from progrpo.rewards.pickscore import PickScore
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt
from progrpo.zoo.shapes import world

NAMES = ("shapes", "jpeg_compressibility", "ocr", "nsfw")
WORDS = ("OPEN", "Hello", "Bakery", "Jazz Club", "New York", "Fresh Bread", "No Parking", "Quiet Please")
ROUNDS = 5


def drawn(count: int, size: int) -> tuple[list[Prompt], np.ndarray]:
    prompts, pictures = world.examples("test", count, seed=0)
    words = [WORDS[i % len(WORDS)] for i in range(count)]
    sources = [Image.fromarray(picture_HWC).resize((size, size)) for picture_HWC in pictures]
    extended = [
        Prompt(f'{p.text} and "{word}"', {**p.columns, "image": source})
        for p, word, source in zip(prompts, words, sources, strict=True)
    ]
    return extended, np.stack([write(word, p, size) for word, p in zip(words, pictures, strict=True)])


def write(word: str, picture_HWC: np.ndarray, size: int) -> np.ndarray:
    picture = Image.fromarray(picture_HWC).resize((size, size))
    font = ImageFont.load_default(size=size / 8)
    ImageDraw.Draw(picture).text((size / 2, size / 2), word, "black", font, anchor="mm")
    return np.asarray(picture)


# --- the published sizes ----------------------------------------------------------------------------------------------

VIT_H = {"text": (1024, 24, 16), "vision": (1280, 32, 16), "projection": 1024}  # width, layers, heads
VIT_L = {"text": (768, 12, 12), "vision": (1024, 24, 16), "projection": 768}
LETTERS = [*string.printable, "<|startoftext|>", "<|endoftext|>"]


def tower(width: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def clip(sizes: dict) -> CLIPModel:
    vision = {"patch_size": 14, **tower(*sizes["vision"])}
    return CLIPModel(
        CLIPConfig(text_config=tower(*sizes["text"]), vision_config=vision, projection_dim=sizes["projection"])
    )


def cosine(kind: type, sizes: dict) -> Reward:
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    return kind(clip(sizes), CLIPTokenizer(vocab=vocabulary, merges=[]), CLIPImageProcessorPil())


def head(width: int) -> nn.Sequential:
    sizes = (width, 1024, 128, 64, 16, 1)
    return nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(sizes)))


def aesthetic() -> Reward:
    vision = CLIPVisionModelWithProjection(clip(VIT_L).config.vision_config)
    return Aesthetic(vision, head(vision.config.projection_dim), CLIPImageProcessorPil())


def imagereward() -> Reward:
    words = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"))}
    vision = BlipVisionModel(BlipVisionConfig(image_size=224, patch_size=16, **tower(1024, 24, 16)))
    text = BlipTextConfig(vocab_size=30524, encoder_hidden_size=1024, **tower(768, 12, 12))
    encoder = BlipTextModel(text, add_pooling_layer=False)
    return ImageReward(vision, encoder, head(768), blip_tokenizer(words), CLIPImageProcessorPil())


def dino_similarity() -> Reward:
    size, crop = {"shortest_edge": 256}, {"height": 224, "width": 224}
    model = Dinov2Model(Dinov2Config(image_size=518, patch_size=14, **tower(384, 12, 6)))
    return DinoSimilarity(Dino(model, BitImageProcessorPil(size=size, crop_size=crop)))


def clip_similarity() -> Reward:
    vision = clip(VIT_L).config.vision_config
    return CLIPSimilarity(CLIPVisionModelWithProjection(vision), CLIPImageProcessorPil())


OF_THE_HUB = {
    "clip_similarity": clip_similarity,
    "dino_similarity": dino_similarity,
    "lpips_similarity": lambda: LPIPSSimilarity(LPIPS()),
    "clipscore": lambda: cosine(CLIPScore, VIT_L),
    "pickscore": lambda: cosine(PickScore, VIT_H),
    "hpsv2": lambda: cosine(HPSv2, VIT_H),
    "aesthetic": aesthetic,
    "imagereward": imagereward,
}


def ms_a_picture(reward: Reward, prompts: list[Prompt], pictures_NHWC: np.ndarray) -> float:
    reward.score(pictures_NHWC, prompts)  # the first call pays for loading and allocations
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        reward.score(pictures_NHWC, prompts)
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times) / len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=NAMES)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    prompts, pictures = drawn(options.pictures, options.size)
    torch.set_num_threads(1)
    rewards = {n: OF_THE_HUB[n]() if n in OF_THE_HUB else load_reward(RewardTerm(n)) for n in options.names}
    times = {name: ms_a_picture(reward, prompts, pictures) for name, reward in rewards.items()}
    lines = (f"{name:24s} {value:8.2f}" for name, value in times.items())
    print(json.dumps({**vars(options), "ms_a_picture": times}, indent=1) if options.json else "\n".join(lines))


if __name__ == "__main__":
    main()
