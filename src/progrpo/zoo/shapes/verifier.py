"""The verifier of the shapes world: it measures a picture and decides whether it shows what the prompt asks for.

It segments colours against the measured ground, finds connected components per colour, and overlaps each component with
ideal shapes stretched to its bounding box. Nothing is learnt: `detector.py` is the independent second opinion.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from progrpo.types import Prompt
from progrpo.zoo.shapes.world import COLOURS, RELATIONS, SHAPES

_COLOURS, _SHAPES = tuple(COLOURS), tuple(SHAPES)
_PALETTE_C3 = np.array([COLOURS[c] for c in _COLOURS], np.float32)
_FAINT = 88  # of 255: distance from the ground below which no pixel is half covered by any colour
_NEAR = int(_FAINT / 3**0.5 - 0.5)  # a pixel that is no farther in any channel, whole levels counted, is not farther
_SPECK = 16  # pixels: smaller components are dirt of the decoder, not objects
_SMALLEST, _LARGEST = 9, 40  # pixels: sides of a bounding box that an object may have
_MATCH = 0.84  # overlap from which a component counts as its shape (chosen by benchmarks/threshold.py)
_MARGIN = 0.04  # the overlap by which the best shape must beat the others
_SQUARENESS = 1.30  # the ratio of longest to shortest side from which a shape counts as distorted
_CELLS = 16  # a component is compared with the ideal shapes on a grid of 16 x 16 cells over its bounding box
_DEPTH = 2  # cells: the core of an ideal shape is what lies deeper inside it
_SOLID = 0.9  # the share of its core that a shape must fill: outlines are no shapes (decoders leave no holes)
_MALFORMED = 0.8  # the factor on the grade of a component that is stretched, hollow or of no object's size
_FIT_FLOOR = 0.5  # the overlap that any patch reaches: graded scores count from here
_COS_DIRECTION = 0.5  # cosine of the largest angle to the named direction (GenEval's rule)
_AT_ONCE = 48  # pictures: with more, the data would not stay in the processor's cache from one step to the next


def _templates() -> tuple[np.ndarray, np.ndarray]:
    """The coverage in [0, 1] of the grid by each ideal shape, and by its core, each (S, cells*cells)."""
    fine = 8
    axis = (np.arange(_CELLS * fine) + 0.5) / (_CELLS * fine) * 2 - 1
    masks = [SHAPES[s](axis[None], axis[:, None]) for s in _SHAPES]
    # a shape that fills the grid ends with it: without the frame, the border would not count as its outline
    depths = [distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] / fine for mask in masks]
    full = np.stack([*masks, *(depth > _DEPTH for depth in depths)]).astype(np.float32)
    cover = full.reshape(-1, _CELLS, fine, _CELLS, fine).mean((2, 4)).reshape(len(full), -1)
    return cover[: len(_SHAPES)], cover[len(_SHAPES) :]


def _overlap(patch_MX: np.ndarray, template_SX: np.ndarray) -> np.ndarray:
    """The intersection over union (M, S) of binary patches with soft templates."""
    both = patch_MX @ template_SX.T
    return both / (patch_MX.sum(1)[:, None] + template_SX.sum(1)[None] - both)


_TEMPLATES_SX, _CORES_SX = _templates()
# a perfect shape on the grid does not reach 1, because its edge runs through cells: overlaps are relative to its own
_PERFECT_S = np.diag(_overlap((_TEMPLATES_SX >= 0.5).astype(np.float32), _TEMPLATES_SX))


@dataclass(frozen=True)
class Seen:
    """A component of a picture: its colour, its nearest shape, its overlap in [0, 1] with each shape, its centre in
    pixels.
    """

    colour: str
    shape: str
    fits: tuple[float, ...]
    well_formed: bool
    x: float
    y: float
    area: int


@dataclass(frozen=True)
class Verdict:
    graded: float
    strict: bool
    seen: tuple[Seen, ...]


def _segment(pictures_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The flat indices of the coloured pixels in rising order, and the index of each one's colour.

    A pixel on an object's edge mixes object and ground. So its direction away from the ground is compared, and it
    belongs to the object from half coverage on. The ground is the median colour of the border.
    """
    n, h, w, _ = pictures_NHWC.shape
    sides = [pictures_NHWC[:, 0], pictures_NHWC[:, -1], pictures_NHWC[:, :, 0], pictures_NHWC[:, :, -1]]
    ground_N3 = np.median(np.concatenate(sides, axis=1), axis=1).astype(np.float32)
    # most pixels are near the ground in every channel; bytes, in whole rows, are the fastest to compare
    rows_NHX = pictures_NHWC.reshape(n, h, w * 3)
    floor_N1X = np.tile(ground_N3.astype(np.uint8), w)[:, None]
    far_X3 = (np.maximum(rows_NHX, floor_N1X) - np.minimum(rows_NHX, floor_N1X)).reshape(-1, 3)
    pixel = np.flatnonzero(np.maximum(np.maximum(far_X3[:, 0], far_X3[:, 1]), far_X3[:, 2]) > _NEAR)
    picture = pixel // (h * w)
    count_N = np.bincount(picture, minlength=n)
    ground_3M = np.repeat(ground_N3.T, count_N, axis=1)
    away_3M = rows_NHX.reshape(-1, 3).take(pixel, axis=0).T.astype(np.float32, order="C") - ground_3M
    palette_C3 = _PALETTE_C3 * 255
    length_CN = np.linalg.norm(palette_C3[:, None] - ground_N3, axis=2) + np.float32(1e-3)
    # |away| times the cosine to each colour's direction, which is the colour less the ground. No matrix product: its
    # rounding may depend on the other pictures. In place: new memory costs as much as the sums
    along_CM = palette_C3[:, 0, None] * away_3M[0]
    along_CM += palette_C3[:, 1, None] * away_3M[1]
    along_CM += palette_C3[:, 2, None] * away_3M[2]
    along_CM -= (ground_3M * away_3M).sum(0)
    along_CM /= np.repeat(length_CN, count_N, axis=1)
    best_M = along_CM.max(0)
    # count the colours before the first of the nearest: `argmax` over a few long rows is slow
    before_CM = along_CM < best_M
    for former_M, later_M in itertools.pairwise(before_CM):
        later_M &= former_M
    nearest_M = before_CM.sum(0, dtype=np.int8)
    cover_M = best_M / length_CN.ravel().take(nearest_M * np.int64(n) + picture)
    # no colour is nearer to a light ground than `_FAINT` at half coverage
    covered = (cover_M >= 0.5) & ((away_3M * away_3M).sum(0) > _FAINT**2)
    return pixel[covered], nearest_M[covered]


@dataclass(frozen=True)
class _Runs:
    """The runs of pixels of one colour in a row, in rising order. Run 0 stands for the ground and has no pixels."""

    colour: np.ndarray
    start: np.ndarray  # flat index of the first pixel
    length: np.ndarray
    at_NHW: np.ndarray  # the run that each pixel belongs to


def _runs(pixel: np.ndarray, colour: np.ndarray, shape: tuple[int, ...]) -> _Runs:
    """The runs of the coloured pixels that `_segment` found in pictures of this shape (N, H, W)."""
    fresh = pixel == pixel // shape[2] * shape[2]
    fresh[:1] = True
    fresh[1:] |= (pixel[1:] != pixel[:-1] + 1) | (colour[1:] != colour[:-1])
    first = np.flatnonzero(fresh)
    at_NHW = np.zeros(shape, np.int32)
    at_NHW.reshape(-1)[pixel] = np.cumsum(fresh, dtype=np.int32)
    return _Runs(
        colour=np.concatenate([np.array([-1], np.int8), colour[first]]),
        start=np.concatenate([[0], pixel[first]]),
        length=np.concatenate([[0], np.diff(first, append=len(pixel))]),
        at_NHW=at_NHW,
    )


def _components(runs: _Runs) -> np.ndarray:
    """The number of each run's 4-connected component of one colour. Components are numbered by their first runs.

    Where two runs touch, the first pixel of one lies above or below the other. So each run has two edges from its first
    pixel, up and down, which lead back to itself where there is nothing to join.
    """
    _, height, width = runs.at_NHW.shape
    beside_R2 = runs.start[:, None] + [-width, width]
    other_R2 = runs.at_NHW.take(beside_R2, mode="clip")
    same_colour = runs.colour[other_R2] == runs.colour[:, None]
    same_picture = beside_R2 // (height * width) == runs.start[:, None] // (height * width)
    count = len(runs.start)
    ends = np.where(same_colour & same_picture, other_R2, np.arange(count, dtype=np.int32)[:, None]).ravel()
    edges = csr_array((np.ones(2 * count), ends, np.arange(0, 2 * count + 1, 2, dtype=np.int32)), shape=(count, count))
    return connected_components(edges, directed=False)[1]


def _patches(component_R: np.ndarray, at_NHW: np.ndarray, picture_M: np.ndarray, box_M4: np.ndarray) -> np.ndarray:
    """The components on their grids, float32 (M, cells*cells): 1 where one covers the middle of a cell of its box."""
    _, height, width = at_NHW.shape
    cell = (np.arange(_CELLS) + 0.5) / _CELLS
    left, right, top, bottom = box_M4.T[..., None]
    rows = (top + cell * (bottom - top)).astype(np.int64) + picture_M[:, None] * height
    columns = (left + cell * (right - left)).astype(np.int64)
    inside = component_R.take(at_NHW.take(rows[:, :, None] * width + columns[:, None, :]))
    return (inside == np.arange(len(box_M4))[:, None, None]).reshape(len(box_M4), -1).astype(np.float32)


def _fits(patch_MX: np.ndarray) -> np.ndarray:
    """The overlap (M, S), intersection over union, of each component with each ideal shape stretched to its box."""
    return np.minimum(_overlap(patch_MX, _TEMPLATES_SX) / _PERFECT_S, 1.0)


def look(pictures_NHWC: np.ndarray) -> list[tuple[Seen, ...]]:
    """Find the components of each picture (uint8, (N, H, W, 3)) that are larger than a speck."""
    if pictures_NHWC.ndim != 4 or pictures_NHWC.shape[-1] != 3 or pictures_NHWC.dtype != np.uint8:
        raise ValueError(f"pictures must be uint8 (N, H, W, 3), not {pictures_NHWC.dtype} {pictures_NHWC.shape}")
    starts = range(0, len(pictures_NHWC), _AT_ONCE)
    return [seen for i in starts for seen in _look(pictures_NHWC[i : i + _AT_ONCE])]


def _look(pictures_NHWC: np.ndarray) -> list[tuple[Seen, ...]]:
    """Find the components of a few pictures, all steps for all of them at once."""
    runs = _runs(*_segment(pictures_NHWC), pictures_NHWC.shape[:3])
    label_R = _components(runs)
    area_L = np.bincount(label_R, runs.length)
    names_M = np.flatnonzero(area_L >= _SPECK)
    if len(names_M) == 0:
        return [() for _ in pictures_NHWC]
    component_L = np.full(len(area_L), -1)
    component_L[names_M] = np.arange(len(names_M))
    component_R = component_L[label_R]
    large = np.flatnonzero(component_R >= 0)
    order = large[np.argsort(component_R[large], kind="stable")]  # runs of a component side by side, to be reduced
    first_M = np.searchsorted(component_R[order], np.arange(len(names_M)))
    _, height, width = runs.at_NHW.shape
    row, x = np.divmod(runs.start[order], width)
    picture, y = np.divmod(row, height)
    length = runs.length[order]
    extremes = [(np.minimum, x), (np.maximum, x + length), (np.minimum, y), (np.maximum, y + 1)]
    box_M4 = np.stack([reduce.reduceat(v, first_M) for reduce, v in extremes], axis=1)
    sums = (length * x + length * (length - 1) // 2, length * y)
    x_M, y_M = (np.add.reduceat(v, first_M) / area_L[names_M] for v in sums)
    picture_M, colour_M = picture[first_M], runs.colour[order[first_M]]
    patch_MX = _patches(component_R, runs.at_NHW, picture_M, box_M4)
    fits_MS = _fits(patch_MX)
    well_formed_M = _well_formed(patch_MX, fits_MS, box_M4)
    area_M = area_L[names_M].astype(np.int64)
    columns = (picture_M, colour_M, fits_MS.argmax(1), fits_MS, well_formed_M, x_M, y_M, area_M)
    out: list[list[Seen]] = [[] for _ in pictures_NHWC]
    for n, colour, shape, fits, *rest in zip(*(column.tolist() for column in columns), strict=True):
        out[n].append(Seen(_COLOURS[colour], _SHAPES[shape], tuple(fits), *rest))
    return [tuple(seen) for seen in out]


def _well_formed(patch_MX: np.ndarray, fits_MS: np.ndarray, box_M4: np.ndarray) -> np.ndarray:
    """Whether each component has an object's size, is not stretched, is clearly one shape, and is solid: bool (M,)."""
    best_M = fits_MS.argmax(1)
    solid_MS = patch_MX @ _CORES_SX.T >= _SOLID * _CORES_SX.sum(1)
    sides = np.stack([box_M4[:, 1] - box_M4[:, 0], box_M4[:, 3] - box_M4[:, 2]])
    ranked = np.sort(fits_MS, axis=1)
    return (
        (sides.max(0) <= _SQUARENESS * sides.min(0))
        & (sides.min(0) >= _SMALLEST)
        & (sides.max(0) <= _LARGEST)
        & (ranked[:, -1] >= _MATCH)
        & (ranked[:, -1] - ranked[:, -2] >= _MARGIN)
        & solid_MS[np.arange(len(best_M)), best_M]
    )


def _quality(seen: Seen, colour: str | None, shape: str) -> float:
    """The agreement of a component with an object of the prompt: half for its colour, half for its form."""
    fit = max(0.0, seen.fits[_SHAPES.index(shape)] - _FIT_FLOOR) / (1 - _FIT_FLOOR)
    form = min(1.0, fit / 0.8) * (1.0 if seen.well_formed else _MALFORMED)
    hue = 1.0 if colour is None or seen.colour == colour else 0.0
    return 0.5 * hue + 0.5 * form * (0.5 + 0.5 * hue)


def related(a: tuple[float, float], b: tuple[float, float], relation: str) -> float:
    """The cosine between the named direction and the way from b's centre to a's; 1 is straight in that direction."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    distance = max(np.hypot(dx, dy), 1e-6)
    ux, uy = RELATIONS[relation]
    return float((dx * ux + dy * uy) / distance)


def _grade(seen: Sequence[Seen], prompt: Prompt) -> float:
    """The mean quality of the best assignment of components to the prompt's objects, over the larger of the two counts.

    A relation scales the score between 0.5 (opposite side) and 1 (named side).
    """
    objects, relation = prompt.columns["objects"], prompt.columns["relation"]
    if not seen:
        return 0.0
    quality = [[_quality(s, colour, shape) for colour, shape in objects] for s in seen]
    most = max(len(seen), len(objects))
    if min(len(seen), len(objects)) == 1:  # one pair to assign, and nothing that can be on the named side
        return max(map(max, quality)) / most * (1.0 if relation is None else 0.5)
    quality_MO = np.array(quality)
    rows, columns = linear_sum_assignment(quality_MO, maximize=True)
    score = float(quality_MO[rows, columns].sum()) / most
    if relation is None:
        return score
    place = {int(c): (seen[r].x, seen[r].y) for r, c in zip(rows, columns, strict=True)}
    cosine = related(place[0], place[1], relation) if len(place) == 2 else -1.0
    return score * (0.75 + 0.25 * max(-1.0, min(1.0, cosine / _COS_DIRECTION)))


def satisfies(objects: Sequence[tuple[str, str, float, float]], prompt: Prompt) -> bool:
    """Whether a picture's objects, each (colour, shape, x, y), are exactly those of the prompt, in its relation."""
    required, relation = prompt.columns["objects"], prompt.columns["relation"]
    if len(objects) != len(required):
        return False
    fits = np.array([[(c is None or c == o[0]) and s == o[1] for c, s in required] for o in objects])
    rows, columns = linear_sum_assignment(fits, maximize=True)
    if not fits[rows, columns].all():
        return False
    if relation is None:
        return True
    place = {int(c): objects[r][2:] for r, c in zip(rows, columns, strict=True)}
    return related(place[0], place[1], relation) >= _COS_DIRECTION


def verify(pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Verdict]:
    """Verify each picture against its prompt: a graded score in [0, 1], a strict verdict, and the components seen."""
    if len(pictures_NHWC) != len(prompts):
        raise ValueError(f"{len(pictures_NHWC)} pictures but {len(prompts)} prompts: they must pair up")
    out = []
    for seen, prompt in zip(look(pictures_NHWC), prompts, strict=True):
        strict = all(s.well_formed for s in seen) and satisfies([(s.colour, s.shape, s.x, s.y) for s in seen], prompt)
        out.append(Verdict(_grade(seen, prompt), strict, seen))
    return out
