"""Features of pictures, whose cosines say how alike they are: of DINOv2, of the built-in detector, or their pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from progrpo.rewards.clip import batch_slices
from progrpo.rewards.dino import Dino
from progrpo.rewards.lpips import LPIPS
from progrpo.rewards.settings import RewardTerm
from progrpo.zoo import WEIGHTS
from progrpo.zoo.networks import to_tensor
from progrpo.zoo.shapes.detector import load_detector

Features = Callable[[np.ndarray], np.ndarray]
"""A function of pictures (uint8, (N, H, W, 3)) that gives their features (N, D)."""

PIXELS, SHAPES = "pixels", "shapes"
_SIDE = 32  # pixels: pictures of any size become vectors of one length
_CELLS = 4
_AT_ONCE = 16


def load_features(name: str) -> Features:
    """The features of a name: `pixels`, `shapes`, `dino`, or a DINOv2 as a folder or a hub id.

    Refusal where neither the cache nor the hub has the network.
    """
    if name == PIXELS:
        return pixels
    if name == SHAPES:
        return _of_detector(WEIGHTS / "shapes-judge")
    return _of_dino("" if name == "dino" else name)


def pixels(pictures_NHWC: np.ndarray) -> np.ndarray:
    """The pixels of pictures that are resized to 32 by 32, around grey."""
    small = [Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BOX) for picture in pictures_NHWC]
    return np.stack([np.asarray(picture, dtype=np.float64).ravel() / 127.5 - 1 for picture in small])


def _of_detector(folder: Path) -> Features:
    """The mean activations of the shapes world's detector in each sixteenth of a picture, before it names objects."""
    detector = load_detector(folder)

    @torch.no_grad()
    def features(pictures_NHWC: np.ndarray) -> np.ndarray:
        seen_NCHW: Tensor = detector.body(to_tensor(pictures_NHWC))
        return nn.functional.adaptive_avg_pool2d(seen_NCHW, _CELLS).flatten(1).numpy()

    return features


def _of_dino(model: str) -> Features:
    """The class token of a DINOv2, by its folder or hub id; empty: that of the reward `dino_similarity`."""
    dino = Dino.load("dino", RewardTerm("dino", model=model, dtype="float32"))
    return _in_batches(dino.features)


def load_lpips() -> Features:
    """Vectors whose squared distances are LPIPS. Refusal where neither the cache nor their servers have the weights."""
    return _in_batches(LPIPS.load("lpips").vectors)


def _in_batches(vectors: Callable[[np.ndarray], Tensor]) -> Features:
    def features(pictures_NHWC: np.ndarray) -> np.ndarray:
        batches = batch_slices(len(pictures_NHWC), _AT_ONCE)
        return np.concatenate([vectors(pictures_NHWC[batch]).cpu().numpy() for batch in batches])

    return features
