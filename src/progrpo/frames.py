"""A video as pictures: which of its frames stand for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Pictures = TypeVar("Pictures", np.ndarray, Tensor)


def evenly(count: int, frames: int) -> list[int]:
    """Places of `count` frames of so many, evenly spaced, first and last included; the middle one for 1, all if there are no more."""
    if count == 1:
        return [frames // 2]
    count = min(count, frames)
    return [round(i * (frames - 1) / max(1, count - 1)) for i in range(count)]


def still(pictures: Pictures) -> Pictures:
    """What reports show and simple measures see: pictures (N, H, W, 3) as they are, the middle frames of videos (N, F, H, W, 3)."""
    if pictures.ndim == 4:
        return pictures
    return pictures[:, [pictures.shape[1] // 2]][:, 0]  # copied: a view would keep whole videos in memory
