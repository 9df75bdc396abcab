"""What a built-in reward costs: milliseconds a picture on one CPU thread, the median of five rounds after one that does not count.

    python benchmarks/rewards.py [--names ocr jpeg_compressibility nsfw shapes] [--size 256] [--pictures 8] [--json]

For rewards that need no download. Pictures of the shapes world with a word drawn over them, a prompt that asks for both. In
processor time, which other jobs on the machine disturb less.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when numpy is imported

import argparse
import json
import statistics
import time

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from progrpo.rewards.base import Reward, RewardSettings
from progrpo.rewards.load import load_reward
from progrpo.types import Prompt
from progrpo.zoo.shapes import world

NAMES = ("shapes", "jpeg_compressibility", "ocr", "nsfw")
WORDS = ("OPEN", "Hello", "Bakery", "Jazz Club", "New York", "Fresh Bread", "No Parking", "Quiet Please")
ROUNDS = 5


def drawn(count: int, size: int) -> tuple[list[Prompt], np.ndarray]:
    prompts, pictures = world.examples("test", count, seed=0)
    words = [WORDS[i % len(WORDS)] for i in range(count)]
    wanted = [Prompt(f'{p.text} and "{word}"', p.columns) for p, word in zip(prompts, words, strict=True)]
    return wanted, np.stack([write(word, p, size) for word, p in zip(words, pictures, strict=True)])


def write(word: str, picture_HWC: np.ndarray, size: int) -> np.ndarray:
    picture = Image.fromarray(picture_HWC).resize((size, size))
    font = ImageFont.load_default(size=size / 8)
    ImageDraw.Draw(picture).text((size / 2, size / 2), word, "black", font, anchor="mm")
    return np.asarray(picture)


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
    wanted = parser.parse_args()
    prompts, pictures = drawn(wanted.pictures, wanted.size)
    found = {n: ms_a_picture(load_reward(n, RewardSettings()), prompts, pictures) for n in wanted.names}
    lines = (f"{name:24s} {value:8.2f}" for name, value in found.items())
    print(json.dumps({**vars(wanted), "ms_a_picture": found}, indent=1) if wanted.json else "\n".join(lines))


if __name__ == "__main__":
    main()
