"""Latent reward heads: a head on the latents of a model's autoencoder, which ranks unfinished trajectories without a
decoder or a reward.

It learns from the latents of the pairs' pictures, and is asked about x0 projections, which lie in the same space: it
needs no network call, and no noise level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from progrpo.messages import named
from progrpo.preferences.reward_model.backbone import Features
from progrpo.preferences.reward_model.head import Ensemble
from progrpo.preferences.reward_model.load import LATENT
from progrpo.preferences.reward_model.model import load_ensemble, read_description
from progrpo.types import Prompt

_LEVEL = 0.25  # the mean squared deviation of a place's channels, in stds of latents, at which it counts half as ink
_ALIKE = 0.2
"""The relative distance of a test picture's features up to which two autoencoders are one: dtypes and sizes differ by
less, other autoencoders by more."""

Encode = Callable[[Sequence[Image.Image]], Tensor]
"""The latents (N, C, H, W) of pictures, as `Policy.encode_pictures` gives them."""


@torch.no_grad()
def latent_features(x0_NCHW: Tensor) -> Tensor:
    """Compute the features of latents, float32 (N, 5 (3 C + 2)) on the CPU; NaN where a latent is not finite.

    A place has the deviations of its channels from their medians over places, their magnitudes, the sum of their
    squares e, a soft mask e / (e + C / 4), and the channels under that mask. The features are the mean and the standard
    deviation of each over places, and its means weighted by x, y and x^2 + y^2, with x and y in [-1, 1].
    """
    x_NCP = x0_NCHW.float().flatten(2)
    (channels, height, width), device = x0_NCHW.shape[1:], x0_NCHW.device
    deviation_NCP = x_NCP - x_NCP.median(2, keepdim=True).values
    energy_N1P = deviation_NCP.square().sum(1, keepdim=True)
    mask_N1P = energy_N1P / (energy_N1P + channels * _LEVEL)
    part_NQP = torch.cat([deviation_NCP, deviation_NCP.abs(), energy_N1P, mask_N1P, mask_N1P * x_NCP], 1)
    y_H, x_W = (torch.linspace(-1, 1, count, device=device) for count in (height, width))
    square_HW = y_H[:, None].square() + x_W.square()
    weight_3P = torch.stack([x_W.expand(height, -1), y_H[:, None].expand(-1, width), square_HW - square_HW.mean()])
    weighted_NQ3 = part_NQP @ weight_3P.flatten(1).T / (height * width)
    features_NQ5 = torch.cat([part_NQP.mean(2)[..., None], part_NQP.std(2)[..., None], weighted_NQ3], 2)
    return features_NQ5.flatten(1).cpu()


def picture_features(encode: Encode, pictures: Sequence[Image.Image]) -> Tensor:
    """Compute the features of the latents of pictures."""
    return latent_features(encode(pictures))


class LatentBackbone:
    """The latents of the autoencoder of `model`, a name for messages."""

    def __init__(self, model: str, encode: Encode) -> None:
        self.model = model
        self._encode = encode

    def features(self, pictures: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> Features:
        return Features((picture_features(self._encode, [Image.fromarray(picture) for picture in pictures]),))

    def lora(self) -> Mapping[str, Tensor]:
        return {}

    def load_lora(self, tensors: Mapping[str, Tensor]) -> None:
        raise ValueError("a latent reward head takes no LoRA")

    def facts(self) -> dict[str, Any]:
        """The facts by which the autoencoder is recognised: its model's name, and the features of a test picture."""
        (test_D,) = picture_features(self._encode, [_test_picture()]).tolist()
        return {"model": self.model, "test_picture": test_D}


@dataclass(frozen=True)
class LatentHead:
    """The mean score of an ensemble, of latents."""

    ensemble: Ensemble

    def score(self, x0_NCHW: Tensor, prompts_N: Sequence[Prompt] = ()) -> Tensor:
        """Score x0 projections, float64 (N,): in one scale for all prompts, which are not read. NaN where one is not
        finite.
        """
        return self.ensemble.scores(Features((latent_features(x0_NCHW),))).mean(0)


def load_latent_head(folder: Path, encode: Encode) -> LatentHead:
    """Load the latent reward head of a folder, for the autoencoder behind `encode`.

    ValueError where the folder holds none, or one of another autoencoder.
    """
    description = read_description(folder)
    if description.backbone != LATENT:
        raise ValueError(
            f"{named(folder)} is a reward model of pictures; train a latent reward head with progrpo reward-model train"
            " PAIRS --latent MODEL --out FOLDER"
        )
    ensemble = load_ensemble(folder, description)
    trained = description.facts["latent"]
    expected_D = torch.tensor(trained["test_picture"])
    (test_D,) = picture_features(encode, [_test_picture()])
    if test_D.shape != expected_D.shape or (test_D - expected_D).norm() > _ALIKE * expected_D.norm():
        raise ValueError(
            f"{named(folder)} was trained on latents of {named(str(trained['model']))}, and this model's autoencoder is"
            " another one; train a head of this model with progrpo reward-model train PAIRS --latent MODEL --out FOLDER"
        )
    return LatentHead(ensemble)


def _test_picture() -> Image.Image:
    """A picture that autoencoders encode differently: a disc on a slope of colours, 64 x 64."""
    y_HW, x_HW = np.mgrid[0:64, 0:64] / 63
    inside_HW = np.hypot(x_HW - 0.4, y_HW - 0.6) < 0.25
    slope_HWC = np.stack([x_HW, y_HW, 1 - x_HW], axis=2)
    return Image.fromarray((255 * np.where(inside_HW[..., None], (0.9, 0.2, 0.1), slope_HWC)).astype(np.uint8))
