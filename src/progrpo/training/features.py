"""Features of pictures, whose cosines say how alike they are: of DINOv2, of the built-in detector, or their pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, Dinov2Model

from progrpo.rewards.clip import batch_slices
from progrpo.rewards.hub import fetching, load_pretrained, place_at
from progrpo.zoo import WEIGHTS
from progrpo.zoo.networks import to_tensor
from progrpo.zoo.shapes.detector import load_detector

Features = Callable[[np.ndarray], np.ndarray]
"""A function of pictures (uint8, (N, H, W, 3)) that gives their features (N, D)."""

DINO = ("facebook/dinov2-small", "ed25f3a31f01632728cabb09d1542f84ab7b0056")
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
    return _of_dino(*(DINO if name == "dino" else (name, "main")))


def pixels(pictures_NHWC: np.ndarray) -> np.ndarray:
    """The pixels of pictures that are resized to 32 by 32, around grey."""
    small = [Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BOX) for picture in pictures_NHWC]
    return np.stack([np.asarray(picture, dtype=np.float64).ravel() / 127.5 - 1 for picture in small])


def _of_detector(folder: Path) -> Features:
    """What the detector of the shapes world sees in each sixteenth of a picture, before it names it."""
    detector = load_detector(folder)

    @torch.no_grad()
    def features(pictures_NHWC: np.ndarray) -> np.ndarray:
        seen_NCHW: Tensor = detector.body(to_tensor(pictures_NHWC))
        return nn.functional.adaptive_avg_pool2d(seen_NCHW, _CELLS).flatten(1).numpy()

    return features


def _of_dino(repository: str, revision: str) -> Features:
    """The class token of a DINOv2 after its last norm (arXiv 2304.07193)."""
    model = place_at(load_pretrained(Dinov2Model, "dino", repository, revision), "auto", "float32")
    with fetching("dino", repository):
        image_processor = AutoImageProcessor.from_pretrained(repository, revision=revision, backend="pil")

    @torch.no_grad()
    def features(pictures_NHWC: np.ndarray) -> np.ndarray:
        parts: list[np.ndarray] = []
        for batch in batch_slices(len(pictures_NHWC), _AT_ONCE):
            inputs = image_processor(list(pictures_NHWC[batch]), return_tensors="pt", input_data_format="channels_last")
            parts.append(model(inputs.pixel_values.to(model.device)).pooler_output.cpu().numpy())
        return np.concatenate(parts)

    return features
