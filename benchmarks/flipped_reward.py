"""The strict verdict of the shapes world with a fifth of its answers wrong, as a reward of `road_to_reward.py`."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from progrpo.rewards.base import Score
from progrpo.rewards.shapes import StrictShapesReward
from progrpo.types import Prompt

FLIPPED = 0.2
"""The share of wrong verdicts, as in the study of S-GRPO (arXiv 2508.05928)."""


class FlippedStrict(StrictShapesReward):
    """A picture's bytes decide whether its verdict is turned round, so the same picture has the same score."""

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        scores = super().score(pictures_NHWC, prompts)
        return [
            score if score.value is None else Score(abs(score.value - _flips(picture)))
            for score, picture in zip(scores, pictures_NHWC, strict=True)
        ]


def _flips(picture_HWC: np.ndarray) -> bool:
    digest = blake2b(picture_HWC.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < FLIPPED * 2**64
