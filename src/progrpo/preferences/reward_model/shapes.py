"""The built-in backbone, for the shapes world: what lies where in a picture, by its pixels and by the shipped detector.

The detector is frozen: it learned to find drawn shapes, and nobody's taste. Features without learning are few, so that
a taste can be read from few pairs: how much ink there is, where, and of which colour.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from progrpo.preferences.reward_model.backbone import Features
from progrpo.types import Prompt
from progrpo.zoo import WEIGHTS
from progrpo.zoo.shapes.detector import load_detector
from progrpo.zoo.shapes.models import to_tensor
from progrpo.zoo.shapes.world import COLOURS, NUMBERS, PLURALS, RELATIONS, SHAPES, SIZE

_WORDS = (*COLOURS, *SHAPES, *NUMBERS.values(), *(relation.split()[0] for relation in RELATIONS))
_SINGULAR = {PLURALS.get(shape, f"{shape}s"): shape for shape in SHAPES}
_CLEAR = 0.35  # the distance from the ground, of sqrt(3) at most, from which a pixel is ink wholly
_AT_ONCE = 64
_LEAST = 1e-3  # the share of ink below which its place and colour are taken for those of a blank picture


class ShapesBackbone:
    """Three blocks: layout, the detector's channels with their places, and both by the words of the prompt."""

    def __init__(self) -> None:
        self._detector = load_detector(WEIGHTS / "shapes-judge").requires_grad_(False)

    def features(self, pictures: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> Features:
        other = next((p.shape for p in pictures if p.shape != (SIZE, SIZE, 3)), None)
        if other is not None:
            raise ValueError(
                f"the backbone shapes sees pictures of {SIZE}x{SIZE} pixels, not {other[1]}x{other[0]}; train the"
                " reward model on a CLIP"
            )
        pictures_NHWC = np.asarray(pictures).reshape(-1, SIZE, SIZE, 3)
        starts = range(0, max(len(prompts), 1), _AT_ONCE)
        return Features.cat(
            [self._features(pictures_NHWC[i : i + _AT_ONCE], prompts[i : i + _AT_ONCE]) for i in starts]
        )

    def lora(self) -> Mapping[str, Tensor]:
        return {}

    def load_lora(self, tensors: Mapping[str, Tensor]) -> None:
        raise ValueError("the backbone shapes takes no LoRA")

    @torch.no_grad()
    def _features(self, pictures_BHWC: np.ndarray, prompts: Sequence[Prompt]) -> Features:
        x_BCHW = to_tensor(pictures_BHWC)
        channels_BCXY = self._detector.body(x_BCHW)
        layout_BD, counts_BO = layout(x_BCHW), self._counts(channels_BCXY)
        words_BW = word_counts(prompts)
        seen_BD = torch.cat([layout_BD, counts_BO], 1)
        joint_BD = (words_BW[:, :, None] * seen_BD[:, None]).flatten(1)
        return Features((layout_BD, torch.cat([counts_BO, moments(channels_BCXY)], 1), joint_BD))

    def _counts(self, channels_BCXY: Tensor) -> Tensor:
        """The objects that the detector sees, softly counted: all, by colour and by shape."""
        out = self._detector.head(channels_BCXY)
        centre, colour, shape = out[:, :1].sigmoid(), out[:, 3 : 3 + len(COLOURS)], out[:, 3 + len(COLOURS) :]
        peak = centre * (centre == max_pool2d(centre, 3, 1, 1))
        maps = [peak, peak * colour.softmax(1), peak * shape.softmax(1)]
        return torch.cat(maps, 1).sum((2, 3))


def layout(x_BCHW: Tensor) -> Tensor:
    """Measure the ink of pictures, float32 (B, 3, H, W) in [-1, 1]: its amount, place, spread and colour.

    Ink is what differs from the picture's ground, the median colour of its border. Lengths are in halves of the
    picture's side.
    """
    x_BCHW = (x_BCHW + 1) / 2
    sides = [x_BCHW[:, :, 0], x_BCHW[:, :, -1], x_BCHW[..., 0], x_BCHW[..., -1]]
    ground_BC = torch.cat(sides, 2).median(2).values
    ink_BHW = ((x_BCHW - ground_BC[:, :, None, None]).norm(dim=1) / _CLEAR).clamp(max=1)
    ink_BHW = ink_BHW.where(ink_BHW > 0.3, 0.0)
    height, width = ink_BHW.shape[1:]
    y_H, x_W = (((torch.arange(n) + 0.5) * 2 / n - 1) for n in (height, width))
    area_B = ink_BHW.mean((1, 2))
    total_B = ink_BHW.sum((1, 2)) + _LEAST * height * width
    x_B = (ink_BHW * x_W).sum((1, 2)) / total_B
    y_B = (ink_BHW * y_H[:, None]).sum((1, 2)) / total_B
    square_B = (ink_BHW * (x_W.square() + y_H.square()[:, None])).sum((1, 2)) / total_B
    distance_B = x_B.square() + y_B.square()
    colour_BC = (ink_BHW[:, None] * x_BCHW).sum((2, 3)) / total_B[:, None]
    return torch.stack(
        [area_B, (area_B + _LEAST).log(), x_B, y_B, distance_B, distance_B.sqrt(), square_B, *colour_BC.T], 1
    )


def moments(channels_BCXY: Tensor) -> Tensor:
    """The mean of each channel, and its means weighted by x, y and x^2 + y^2."""
    height, width = channels_BCXY.shape[2:]
    y_H, x_W = (((torch.arange(n) + 0.5) * 2 / n - 1) for n in (height, width))
    weights = [torch.ones(height, width), x_W.expand(height, width), y_H[:, None].expand(height, width)]
    weights.append(weights[1].square() + weights[2].square())
    return torch.cat([(channels_BCXY * weight).mean((2, 3)) for weight in weights], 1)


def word_counts(prompts: Sequence[Prompt]) -> Tensor:
    """How often each word for a colour, a shape, a number and a relation stands in each prompt, float32."""
    words = [[_SINGULAR.get(word, word) for word in re.findall(r"[a-z]+", p.text.lower())] for p in prompts]
    return torch.tensor([[row.count(word) for word in _WORDS] for row in words]).float().reshape(-1, len(_WORDS))
