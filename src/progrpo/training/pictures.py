"""Statistics of pictures alone, without prompt or reward: they change when a model learns to cheat."""

from __future__ import annotations

from itertools import combinations

import numpy as np

_MEMBERS, _SIDE = 4, 64  # members of each group, and pixels per side at most: a cheap measure for every iteration


def sharpness(picture_HWC: np.ndarray) -> float:
    """The mean absolute difference of neighbouring pixels' brightness, in units of the full range."""
    grey = picture_HWC.mean(-1) / 255
    return float((np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2)


def saturation(picture_HWC: np.ndarray) -> float:
    """The mean of (max - min) / max over the colours of a pixel, 0 for black: HSV's saturation."""
    high, low = picture_HWC.max(-1).astype(float), picture_HWC.min(-1).astype(float)
    return float(np.divide(high - low, high, out=np.zeros_like(high), where=high > 0).mean())


def diversity(images_GHWC: np.ndarray) -> float | None:
    """The diversity of pictures of one prompt: root mean square pixel difference over the full range, mean over pairs.

    None for fewer than two.
    """
    flat = [image.ravel() / 255 for image in images_GHWC]
    pairs = [np.sqrt(np.mean((a - b) ** 2)) for a, b in combinations(flat, 2)]
    return float(np.mean(pairs)) if pairs else None


def group_diversities(images_NHWC: np.ndarray, group_N: np.ndarray) -> list[float]:
    """The diversity of a few members of each group that has two or more, on every so many pixels."""
    step = -(-max(images_NHWC.shape[1:3]) // _SIDE)
    groups = [np.flatnonzero(group_N == g)[:_MEMBERS] for g in np.unique(group_N)]
    values = [diversity(images_NHWC[rows][:, ::step, ::step]) for rows in groups]
    return [value for value in values if value is not None]
