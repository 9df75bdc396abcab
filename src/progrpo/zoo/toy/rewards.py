"""Rewards of the toy world, in closed form: functions of the distance of a latent to what its prompt asks for."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from progrpo.rewards.base import Reward, Score
from progrpo.types import Prompt
from progrpo.zoo.toy import world

_MEAN, _STD = -0.70, 0.14  # of minus the distance on the pretrained model's own latents: `nearness` is about normal


def nearness(x_ND: Tensor, code_ND: Tensor) -> Tensor:
    """Minus the root mean square distance of latents to their targets, in the pretrained model's stds: float64 (N,)."""
    distance_N = (x_ND.double() - world.targets(code_ND)).square().mean(1).sqrt()
    return (-distance_N - _MEAN) / _STD


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "smooth": lambda z_N: z_N,
    "heavy": lambda z_N: (0.8 * z_N).exp(),
    "peaked": lambda z_N: (-(z_N - 3.0).square() / 2).exp().where(z_N < 3.0, 1.0),
    "binary": lambda z_N: (z_N > 0.5).double(),
    "noisy": lambda z_N: z_N,
}
"""Rewards by the nearness z of a latent. `noisy` is what `smooth` is, seen with noise of the same variance."""


class ToyReward(Reward):
    """One of `SHAPES`. The noise of `noisy` follows from the picture, so that a picture keeps its score."""

    def __init__(self, shape: str, seen: bool = True) -> None:
        """Without `seen` the reward has no noise: what a model is judged by."""
        self._shape = SHAPES[shape]
        self._noise = 1.0 if shape == "noisy" and seen else 0.0

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        code_ND = world.codes([int(prompt.text) for prompt in prompts])
        values_N = self._shape(nearness(world.from_pictures(pictures_NHWC), code_ND))
        if self._noise:
            values_N = values_N + self._noise * torch.tensor(
                [_normal(image) for image in pictures_NHWC], dtype=torch.float64
            )
        return [Score(value) for value in values_N.tolist()]


def _normal(picture: np.ndarray) -> float:
    """A standard normal number that follows from a picture."""
    return float(np.random.default_rng(zlib.crc32(picture.tobytes())).standard_normal())
