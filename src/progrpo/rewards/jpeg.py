"""The size of a picture as a JPEG: DDPO's two rewards without a model (arXiv 2305.13301)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from progrpo.rewards.base import Reward, Score
from progrpo.types import Prompt


class JpegIncompressibility(Reward):
    """The size of the picture as a JPEG of quality 95, in kB of 1000 bytes, as in DDPO's code.

    It rewards detail and noise. Its range grows with the picture: from 0.7 (blank) to 5 (noise) at 64x64, and from 5 to
    308 at 512x512. Prompts are not read.
    """

    parameters = 0
    _sign = 1

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score(self._sign * _bytes(picture) / 1000) for picture in pictures_NHWC]


class JpegCompressibility(JpegIncompressibility):
    """The negative of that size. It rewards smooth pictures."""

    _sign = -1


def _bytes(picture_HWC: np.ndarray) -> int:
    file = io.BytesIO()
    Image.fromarray(picture_HWC).save(file, "JPEG", quality=95)
    return file.tell()
