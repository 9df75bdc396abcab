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
from torch.nn.functional import avg_pool2d, max_pool2d

from progrpo.preferences.reward_model.backbone import Features
from progrpo.types import Prompt
from progrpo.zoo import WEIGHTS
from progrpo.zoo.networks import to_tensor
from progrpo.zoo.shapes.detector import load_detector
from progrpo.zoo.shapes.world import COLOURS, NUMBERS, PLURALS, RELATIONS, SHAPES, SIZE

_KINDS = (*COLOURS, *SHAPES)
_NUMBERS = {word: number for number, word in NUMBERS.items()}
_WORDS = (*_KINDS, *_NUMBERS, *(relation.split()[0] for relation in RELATIONS))
_SINGULAR = {PLURALS.get(shape, f"{shape}s"): shape for shape in SHAPES}
_CLEAR = 0.35  # the distance from the ground, of sqrt(3) at most, from which a pixel is ink wholly
_FAINT = 0.3  # the share of that below which a pixel is none
_AROUND = 7  # cells of the detector's grid: the square around an object whose ink is taken for the object's own
_SHAPE_LOGITS = 3 + len(COLOURS)  # the place of the first shape's logit among the detector's outputs
_AT_ONCE = 64
_LEAST = 1e-3  # the share of ink below which its place and colour are taken for those of a blank picture


class ShapesBackbone:
    """Five blocks: layout, counts of objects and what the prompt names, objects by word, layout by word, channels."""

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
        objects_BOXY = _objects(self._detector.head(channels_BCXY))
        layout_BD, words_BW = layout(x_BCHW), word_counts(prompts)
        counts_BO = objects_BOXY.sum((2, 3))
        return Features(
            (
                layout_BD,
                torch.cat([counts_BO, agreement(counts_BO, target_counts(prompts))], 1),
                by_word(objects_BOXY, ink(x_BCHW)[0], words_BW),
                (words_BW[:, :, None] * layout_BD[:, None]).flatten(1),
                moments(channels_BCXY),
            )
        )


def _objects(out_BCXY: Tensor) -> Tensor:
    """The objects that the detector sees, as soft maps (B, O, X, Y) by colour and by shape, those of no shape last."""
    centre, colour, shape = out_BCXY[:, :1].sigmoid(), out_BCXY[:, 3:_SHAPE_LOGITS], out_BCXY[:, _SHAPE_LOGITS:]
    peak = centre * (centre == max_pool2d(centre, 3, 1, 1))
    return torch.cat([peak * colour.softmax(1), peak * shape.softmax(1)], 1)


def agreement(counts_BO: Tensor, targets_BO: Tensor) -> Tensor:
    """The numbers of objects too many and too few for the prompts, summed over colours and over shapes."""
    counts_BO = counts_BO[:, : len(_KINDS)]
    parts = (slice(0, len(COLOURS)), slice(len(COLOURS), None))
    over, under = (counts_BO - targets_BO).clamp(min=0), (targets_BO - counts_BO).clamp(min=0)
    return torch.stack([way[:, part].sum(1) for part in parts for way in (over, under)], 1)


def by_word(objects_BOXY: Tensor, ink_BHW: Tensor, words_BW: Tensor) -> Tensor:
    """The place and size of the objects of each colour and shape, times the count of that word."""
    height, width = objects_BOXY.shape[2:]
    ink_BXY = avg_pool2d(ink_BHW[:, None], ink_BHW.shape[1] // height)
    around_BXY = (avg_pool2d(ink_BXY, _AROUND, 1, _AROUND // 2)[:, 0] + _LEAST).log()
    x_XY, y_XY = (axis.expand(height, width) for axis in _axes(height, width))
    maps = [x_XY, y_XY, x_XY.square() + y_XY.square()]
    fields = [*(field.expand_as(around_BXY) for field in maps), around_BXY, around_BXY.square()]
    objects_BOXY = objects_BOXY[:, : len(_KINDS)]
    sums_BOF = torch.stack([(objects_BOXY * field[:, None]).sum((2, 3)) for field in fields], 2)
    return (words_BW[:, : len(_KINDS), None] * sums_BOF).flatten(1)


def ink(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The amount of ink of each pixel (B, H, W), in [0, 1], and the pictures' levels (B, 3, H, W) in [0, 1].

    Ink is what differs from the picture's ground, the median colour of its border.
    """
    levels_BCHW = (x_BCHW + 1) / 2
    sides = [levels_BCHW[:, :, 0], levels_BCHW[:, :, -1], levels_BCHW[..., 0], levels_BCHW[..., -1]]
    ground_BC = torch.cat(sides, 2).median(2).values
    ink_BHW = ((levels_BCHW - ground_BC[:, :, None, None]).norm(dim=1) / _CLEAR).clamp(max=1)
    return ink_BHW.where(ink_BHW > _FAINT, 0.0), levels_BCHW


def layout(x_BCHW: Tensor) -> Tensor:
    """Measure the ink of pictures, float32 (B, 3, H, W) in [-1, 1]: its amount, place, spread and colour.

    Lengths are in halves of the picture's side.
    """
    ink_BHW, levels_BCHW = ink(x_BCHW)
    height, width = ink_BHW.shape[1:]
    x_W, y_H = _axes(height, width)
    area_B = ink_BHW.mean((1, 2))
    total_B = ink_BHW.sum((1, 2)) + _LEAST * height * width
    x_B = (ink_BHW * x_W).sum((1, 2)) / total_B
    y_B = (ink_BHW * y_H).sum((1, 2)) / total_B
    square_B = (ink_BHW * (x_W.square() + y_H.square())).sum((1, 2)) / total_B
    distance_B = x_B.square() + y_B.square()
    colour_BC = (ink_BHW[:, None] * levels_BCHW).sum((2, 3)) / total_B[:, None]
    return torch.stack(
        [area_B, (area_B + _LEAST).log(), x_B, y_B, distance_B, distance_B.sqrt(), square_B, *colour_BC.T], 1
    )


def moments(channels_BCXY: Tensor) -> Tensor:
    """The mean of each channel, and its means weighted by x, y and x^2 + y^2."""
    x_W, y_H = _axes(*channels_BCXY.shape[2:])
    weights = (torch.ones(1), x_W, y_H, x_W.square() + y_H.square())
    return torch.cat([(channels_BCXY * weight).mean((2, 3)) for weight in weights], 1)


def _axes(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The centres of a grid's cells in [-1, 1]: x (1, W) and y (H, 1)."""
    x_W, y_H = (((torch.arange(n) + 0.5) * 2 / n - 1) for n in (width, height))
    return x_W[None], y_H[:, None]


def word_counts(prompts: Sequence[Prompt]) -> Tensor:
    """The counts of each word for a colour, a shape, a number and a relation in each prompt, float32."""
    rows = [[_words(prompt).count(word) for word in _WORDS] for prompt in prompts]
    return torch.tensor(rows).float().reshape(-1, len(_WORDS))


def target_counts(prompts: Sequence[Prompt]) -> Tensor:
    """The number of objects of each colour and shape in each prompt, float32: a number counts the shape after it."""
    rows = []
    for prompt in prompts:
        row, number, colour = dict.fromkeys(_KINDS, 0), 1, ""
        for word in _words(prompt):
            number = _NUMBERS.get(word, number)
            colour = word if word in COLOURS else colour
            if word in SHAPES:
                for kind in filter(None, (word, colour)):
                    row[kind] += number
                number, colour = 1, ""
        rows.append(list(row.values()))
    return torch.tensor(rows).float().reshape(-1, len(_KINDS))


def _words(prompt: Prompt) -> list[str]:
    """The words of a prompt in the singular and in small letters."""
    return [_SINGULAR.get(word, word) for word in re.findall(r"[a-z]+", prompt.text.lower())]
