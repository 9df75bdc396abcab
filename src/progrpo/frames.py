"""Frames that stand for a video."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Images = TypeVar("Images", np.ndarray, Tensor)


def frame_places(count: int, frames: int) -> list[int]:
    """The places of `count` of so many frames, evenly spaced, first and last included.

    One is the middle frame; all frames if there are no more than `count`.
    """
    if count == 1:
        return [frames // 2]
    count = min(count, frames)
    return [round(i * (frames - 1) / max(1, count - 1)) for i in range(count)]


def still_pictures(images: Images) -> Images:
    """The images for reports and simple measures: pictures (N, H, W, 3) themselves, or the middle frames of videos."""
    if images.ndim == 4:
        return images
    return images[:, [images.shape[1] // 2]][:, 0]  # copied: a view would keep whole videos in memory
