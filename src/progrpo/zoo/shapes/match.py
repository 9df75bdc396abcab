"""The match of a picture of the shapes world with its prompt, without thresholds: a stand-in for a preference.

The prompt's words say what each object should look like: its colour, its outline, its size and its place. The words of
shape and colour name a direction each, and the colour's word a size, so different prompts want different layouts, and
what was learnt of words holds for prompts that combine them anew. Nothing is counted: an object that fades, shrinks or
melts into another loses its score bit by bit. The score jumps only where two regions touch, and where another region
becomes the best one for an object: the share of the ink is then another region's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from progrpo.types import Prompt
from progrpo.zoo.shapes.world import COLOURS, EXTENT, RELATIONS, SHAPES, SIZE

_COLOURS, _SHAPES = tuple(COLOURS), tuple(SHAPES)
_EYE_3 = np.sqrt(np.array([2.0, 4.0, 3.0]) / 3) / 255  # a known cheap weighting of RGB by what the eye tells apart
_PALETTE_C3 = np.array([COLOURS[c] for c in _COLOURS]) * 255 * _EYE_3
_FAINT, _FULL = 0.2, 0.7  # distances from the ground: no ink, and all ink; half way lies half coverage by most colours
_NEAR = int(_FAINT * 255 / 3**0.5) - 1  # levels: a pixel that is no farther in any channel has no ink
_RIM = 1e-3  # the weight of a pixel on an edge beside one inside, so that specks have a colour too
# what is off by its spread keeps 1 / sqrt(2) of its agreement
_COLOUR_SPREAD = 0.3  # of the root mean squared distance to the colour
_SIZE_SPREAD = 0.45  # of the logarithm of the size over the target's
_PLACE_SPREAD = 20.0  # pixels
_LARGEST = {1: 14.0, 2: 12.0, 3: 10.5, 4: 9.0}  # preferred sizes by the number of objects, within what the world draws
_SMALLEST = 7.5
_RADIUS = {1: 12.0, 2: 16.0, 3: 17.0, 4: 20.0}  # pixels from the picture's centre to the places of objects


class _Form(NamedTuple):
    """A shape whose bounding box is [-h, h]^2; y points down."""

    outside: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    """The pixels between (x, y) and the outline of half extent h, negative inside, to first order near the outline."""
    area: float
    """The area where h = 1."""
    drop: float
    """The distance of the centre of mass below the box's centre where h = 1."""


_FORMS = {
    "circle": _Form(lambda x, y, h: np.hypot(x, y) - h, np.pi, 0),
    "square": _Form(lambda x, y, h: np.maximum(abs(x), abs(y)) - h, 4, 0),
    "triangle": _Form(lambda x, y, h: np.maximum(abs(y) - h, (2 * abs(x) - y - h) / 5**0.5), 2, 1 / 3),
    "diamond": _Form(lambda x, y, h: (abs(x) + abs(y) - h) / 2**0.5, 2, 0),
    "cross": _Form(
        lambda x, y, h: np.maximum(np.maximum(abs(x), abs(y)) - h, np.minimum(abs(x), abs(y)) - h / 3), 20 / 9, 0
    ),
}


@dataclass(frozen=True)
class Target:
    """An object that a prompt wants: a colour (None: any of the palette), a shape, a centre and a size in pixels."""

    colour: str | None
    shape: str
    x: float
    y: float
    size: float


def _direction(place: float) -> np.ndarray:
    return np.array([np.cos(2 * np.pi * place), np.sin(2 * np.pi * place)])


def _pull(colour: str | None, shape: str) -> np.ndarray:
    """The mean of the directions of an object's words; never 0."""
    by_shape = _direction(_SHAPES.index(shape) / len(_SHAPES))
    if colour is None:
        return by_shape
    mean: np.ndarray = (by_shape + _direction(_COLOURS.index(colour) / len(_COLOURS))) / 2
    return mean


def target_objects(prompt: Prompt) -> list[Target]:
    """The objects that the prompt wants, in the order of its columns.

    One object lies towards the pull of its words. Two lie on opposite sides of the centre: on those that the relation
    names, or along the difference of their pulls. Equal objects lie on a circle, the first one towards their pull.
    """
    objects, relation = prompt.columns["objects"], prompt.columns["relation"]
    pulls = [_pull(*o) for o in objects]
    count = len(objects)
    if count == 1:
        aways = pulls
    else:
        if relation is not None:
            first = np.array(RELATIONS[relation], float)
        else:
            first = pulls[0] if objects[0] == objects[1] else pulls[0] - pulls[1]
        turn = np.arctan2(first[1], first[0]) / (2 * np.pi)
        aways = [_direction(turn + i / count) for i in range(count)]
    out = []
    for (colour, shape), away in zip(objects, aways, strict=True):
        share = 0.5 if colour is None else _COLOURS.index(colour) / (len(_COLOURS) - 1)
        x, y = SIZE / 2 + _RADIUS[count] * away
        out.append(Target(colour, shape, float(x), float(y), _SMALLEST + share * (_LARGEST[count] - _SMALLEST)))
    return out


@dataclass(frozen=True)
class Ink:
    """The M pixels of N pictures that differ from their picture's ground, in rising order."""

    picture_M: np.ndarray
    row_M: np.ndarray
    column_M: np.ndarray
    amount_M: np.ndarray  # in (0, 1]
    away_3M: np.ndarray  # the difference from the ground, in the eye's weighting
    ground_N3: np.ndarray  # in the eye's weighting


def inked(pictures_NHWC: np.ndarray) -> Ink:
    """The ink of pictures. A picture's ground is the median colour of its border."""
    n, h, w, _ = pictures_NHWC.shape
    sides = [pictures_NHWC[:, 0], pictures_NHWC[:, -1], pictures_NHWC[:, :, 0], pictures_NHWC[:, :, -1]]
    ground_N3 = np.median(np.concatenate(sides, axis=1), axis=1)
    # most pixels are near the ground in every channel; bytes, in whole rows, are the fastest to compare
    rows_NHX = pictures_NHWC.reshape(n, h, w * 3)
    floor_N1X = np.tile(ground_N3.astype(np.uint8), w)[:, None]
    far_X3 = (np.maximum(rows_NHX, floor_N1X) - np.minimum(rows_NHX, floor_N1X)).reshape(-1, 3)
    pixel_M = np.flatnonzero(np.maximum(np.maximum(far_X3[:, 0], far_X3[:, 1]), far_X3[:, 2]) > _NEAR)
    picture_M = pixel_M // (h * w)
    away_3M = (rows_NHX.reshape(-1, 3).take(pixel_M, axis=0) - ground_N3.take(picture_M, axis=0)).T * _EYE_3[:, None]
    distance_M = np.sqrt((away_3M * away_3M).sum(0))
    there_M = distance_M > _FAINT
    amount_M = np.minimum((distance_M[there_M] - _FAINT) / (_FULL - _FAINT), 1.0)
    row_M, column_M = np.divmod(pixel_M[there_M] % (h * w), w)
    return Ink(picture_M[there_M], row_M, column_M, amount_M, away_3M[:, there_M], ground_N3 * _EYE_3)


@dataclass(frozen=True)
class _Regions:
    """Measurements of R connected regions of ink, picture by picture."""

    picture_R: np.ndarray
    area_R: np.ndarray
    x_R: np.ndarray  # centre of mass
    y_R: np.ndarray
    colours_RC: np.ndarray  # agreement in (0, 1] with each colour of the palette
    outlines_RS: np.ndarray  # agreement in [0, 1] with each shape


_TOUCHING = np.zeros((3, 3, 3), bool)  # pixels side by side in one picture
_TOUCHING[1] = ndimage.generate_binary_structure(2, 1)


def _regions(pictures_NHWC: np.ndarray) -> _Regions:
    ink = inked(pictures_NHWC)
    # a frame of one pixel, so that every pixel has neighbours in its own picture
    frame = len(pictures_NHWC), pictures_NHWC.shape[1] + 2, pictures_NHWC.shape[2] + 2
    at_M = np.ravel_multi_index((ink.picture_M, ink.row_M + 1, ink.column_M + 1), frame)
    amount_NHW = np.zeros(frame)
    amount_NHW.ravel()[at_M] = ink.amount_M
    labels_NHW, count = ndimage.label(amount_NHW, _TOUCHING)
    region_M = labels_NHW.ravel()[at_M] - 1
    picture_R = np.zeros(count, np.int64)
    picture_R[region_M] = ink.picture_M
    area_R = np.bincount(region_M, ink.amount_M, count)
    x_M, y_M = ink.column_M + 0.5, ink.row_M + 0.5
    x_R, y_R = (np.bincount(region_M, ink.amount_M * of_M, count) / area_R for of_M in (x_M, y_M))
    beside = [amount_NHW.ravel().take(at_M + step) for step in (-1, 1, -frame[2], frame[2])]
    core_M = np.minimum.reduce([ink.amount_M, *beside])
    outlines_RS = _outlines(ink.amount_M, x_M - x_R[region_M], y_M - y_R[region_M], region_M, area_R)
    return _Regions(picture_R, area_R, x_R, y_R, _colours(ink, core_M, region_M, count), outlines_RS)


def _colours(ink: Ink, core_M: np.ndarray, region_M: np.ndarray, count: int) -> np.ndarray:
    """The agreement of each region with each colour, by the mean squared distance of its pixels from the colour.

    Pixels on edges are mixed with the ground, so a pixel counts as much as there is ink in all pixels beside it.
    """
    weight_M = core_M + _RIM * ink.amount_M
    wrong = []
    for colour_3 in _PALETTE_C3:
        away_3M = ink.away_3M - (colour_3 - ink.ground_N3).T.take(ink.picture_M, axis=1)
        wrong.append(np.bincount(region_M, weight_M * (away_3M * away_3M).sum(0), count))
    return kept(np.stack(wrong, 1) / np.bincount(region_M, weight_M, count)[:, None] / _COLOUR_SPREAD**2)


def _outlines(
    amount_M: np.ndarray, dx_M: np.ndarray, dy_M: np.ndarray, region_M: np.ndarray, area_R: np.ndarray
) -> np.ndarray:
    """The squared soft overlap (intersection over union) of each region with each shape of its area and centre."""
    outlines = []
    for form in (_FORMS[shape] for shape in _SHAPES):
        half_M = np.sqrt(area_R / form.area).take(region_M)
        cover_M = np.clip(0.5 - form.outside(dx_M, dy_M + form.drop * half_M, half_M), 0.0, 1.0)
        both_R = np.bincount(region_M, np.minimum(amount_M, cover_M), len(area_R))
        outlines.append(both_R / (2 * area_R - both_R))
    agreement_RS: np.ndarray = np.stack(outlines, 1) ** 2  # two shapes of one area overlap by .53 to .83
    return agreement_RS


def kept(squares: np.ndarray) -> np.ndarray:
    """The agreement that is left at a squared distance in units of its spread: 1 / sqrt(1 + squares), never 0."""
    left: np.ndarray = 1 / np.sqrt(1 + squares)
    return left


def match(pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[float]:
    """The agreement in [0, 1] of each picture with its prompt.

    A region agrees with an object by the product of its agreements in colour, outline, size and place. The best
    assignment counts: the mean over the objects, 0 for one without a region, times the share of the ink that lies in
    assigned regions.
    """
    regions = _regions(pictures_NHWC)
    ends = np.searchsorted(regions.picture_R, np.arange(len(prompts) + 1))
    return [_best(regions, slice(*ends[n : n + 2]), target_objects(prompt)) for n, prompt in enumerate(prompts)]


def _agreement(regions: _Regions, rows: slice, target: Target) -> np.ndarray:
    """The agreement of these regions with an object that the prompt wants."""
    form, shape = _FORMS[target.shape], _SHAPES.index(target.shape)
    half_R = np.sqrt(regions.area_R[rows] / form.area)
    colours_RC = regions.colours_RC[rows]
    colour_R = colours_RC.max(1) if target.colour is None else colours_RC[:, _COLOURS.index(target.colour)]
    size_R = kept((np.log(half_R / (EXTENT[target.shape] * target.size)) / _SIZE_SPREAD) ** 2)
    dx_R, dy_R = regions.x_R[rows] - target.x, regions.y_R[rows] - form.drop * half_R - target.y
    place_R = kept((dx_R**2 + dy_R**2) / _PLACE_SPREAD**2)
    agreement_R: np.ndarray = colour_R * regions.outlines_RS[rows, shape] * size_R * place_R
    return agreement_R


def _best(regions: _Regions, rows: slice, targets: Sequence[Target]) -> float:
    if rows.start == rows.stop:
        return 0.0
    agreement_RK = np.stack([_agreement(regions, rows, target) for target in targets], 1)
    chosen_R, chosen_K = linear_sum_assignment(agreement_RK, maximize=True)
    area_R = regions.area_R[rows]
    share = area_R[chosen_R].sum() / area_R.sum()
    return float(agreement_RK[chosen_R, chosen_K].sum() / len(targets) * share)
