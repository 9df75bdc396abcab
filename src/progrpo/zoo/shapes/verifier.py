"""Measures a picture of the shapes world and says whether it shows what the prompt asks for.

Colour segmentation against the measured ground, connected components per colour, and the overlap of each component with
ideal shapes stretched to its bounding box. No learning: `judge.py` is the independent second opinion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from progrpo.types import Prompt
from progrpo.zoo.shapes.world import COLOURS, RELATIONS, SHAPES

_COLOURS, _SHAPES = tuple(COLOURS), tuple(SHAPES)
_PALETTE_C3 = np.array([COLOURS[c] for c in _COLOURS], np.float32)
_FAINT = 88  # of 255: distance from the ground below which no pixel is half covered by any colour
_SPECK = 16  # pixels: smaller components are dirt of the decoder, not objects
_SMALLEST, _LARGEST = 9, 40  # pixels: sides of a bounding box that an object may have
_MATCH = 0.84  # overlap from which a component counts as its shape (chosen by benchmarks/threshold.py)
_MARGIN = 0.04  # by which the best shape must beat the others
_SQUARENESS = 1.30  # longest side over shortest from which a shape counts as distorted
_CELLS = 16  # a component is compared with the ideal shapes on a grid of 16 x 16 cells over its bounding box
_DEPTH = 2  # cells: what lies deeper than this inside an ideal shape is its core
_SOLID = 0.9  # of its core that a shape must fill: outlines are no shapes (a decoder rounds tips, but leaves no holes)
_MALFORMED = 0.8  # of a form's grade that is left to a component that is stretched, hollow or of no object's size
_FIT_FLOOR = 0.5  # overlap that any patch reaches: graded scores count from here
_COS_DIRECTION = 0.5  # cosine of the largest angle to the named direction (GenEval's rule)


def _templates() -> tuple[np.ndarray, np.ndarray]:
    """(S, cells*cells) coverage in [0, 1] of the grid by each ideal shape, and by its core."""
    fine = 8
    axis = (np.arange(_CELLS * fine) + 0.5) / (_CELLS * fine) * 2 - 1
    masks = [SHAPES[s](axis[None], axis[:, None]) for s in _SHAPES]
    # a shape that fills the grid ends with it: without the frame, the border would not count as its outline
    depths = [distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] / fine for mask in masks]
    full = np.stack([*masks, *(depth > _DEPTH for depth in depths)]).astype(np.float32)
    cover = full.reshape(-1, _CELLS, fine, _CELLS, fine).mean((2, 4)).reshape(len(full), -1)
    return cover[: len(_SHAPES)], cover[len(_SHAPES) :]


def _overlap(patch_MX: np.ndarray, template_SX: np.ndarray) -> np.ndarray:
    """(M, S) intersection over union of binary patches with soft templates."""
    both = patch_MX @ template_SX.T
    return both / (patch_MX.sum(1)[:, None] + template_SX.sum(1)[None] - both)


_TEMPLATES_SX, _CORES_SX = _templates()
# a perfect shape on the grid does not reach 1, for its edge runs through cells: overlaps are relative to what it reaches
_PERFECT_S = np.diag(_overlap((_TEMPLATES_SX >= 0.5).astype(np.float32), _TEMPLATES_SX))


@dataclass(frozen=True)
class Seen:
    """One component of a picture: what it is closest to, its overlap in [0, 1] with each shape, centre in pixels."""

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


def _segment(pictures_NHWC: np.ndarray) -> np.ndarray:
    """int8 (N, H, W): the index of each pixel's colour, -1 for the ground.

    A pixel on an object's edge mixes object and ground, so what is compared is its direction away from the ground; it
    belongs to the object from half coverage on. The ground is what most of the border shows.
    """
    n, h, w, _ = pictures_NHWC.shape
    sides = [pictures_NHWC[:, 0], pictures_NHWC[:, -1], pictures_NHWC[:, :, 0], pictures_NHWC[:, :, -1]]
    ground_N3 = np.median(np.concatenate(sides, axis=1), axis=1).astype(np.float32)
    # a plane for each of red, green and blue: a loop over three numbers for every pixel would take most of the time
    planes = [pictures_NHWC[..., i].reshape(n, h * w) - ground_N3[:, i, None] for i in range(3)]
    # no colour is nearer to a light ground than this at half coverage, so most pixels need no closer look
    pixel = np.flatnonzero(sum(plane * plane for plane in planes) > _FAINT**2)
    picture = pixel // (h * w)
    away_3M = np.stack([plane.ravel()[pixel] for plane in planes])
    palette_C3 = _PALETTE_C3 * 255
    length_CN = np.linalg.norm(palette_C3[:, None] - ground_N3, axis=2) + np.float32(1e-3)
    # |away| times the cosine to each colour's direction, which is the colour less the ground
    on_ground_M = (away_3M * ground_N3.T[:, picture]).sum(0)
    # no matrix product, whose rounding may depend on what else is scored beside a picture
    on_palette_CM = sum(palette_C3[:, i, None] * away for i, away in enumerate(away_3M))
    along_CM = (on_palette_CM - on_ground_M) / length_CN[:, picture]
    nearest = along_CM.argmax(0)
    cover = along_CM[nearest, np.arange(len(pixel))] / length_CN[nearest, picture]
    colour_X = np.full(n * h * w, -1, np.int8)
    colour_X[pixel] = np.where(cover >= 0.5, nearest, -1)
    return colour_X.reshape(n, h, w)


def _components(colour_NHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of the coloured pixels, and for each the number of its 4-connected component of one colour."""
    index = np.flatnonzero(colour_NHW >= 0)
    compact = np.full(colour_NHW.shape, -1, np.int32)
    compact.flat[index] = np.arange(len(index), dtype=np.int32)
    same_x = (colour_NHW[:, :, 1:] == colour_NHW[:, :, :-1]) & (colour_NHW[:, :, 1:] >= 0)
    same_y = (colour_NHW[:, 1:] == colour_NHW[:, :-1]) & (colour_NHW[:, 1:] >= 0)
    start = np.concatenate([compact[:, :, :-1][same_x], compact[:, :-1][same_y]])
    end = np.concatenate([compact[:, :, 1:][same_x], compact[:, 1:][same_y]])
    edges = coo_array((np.ones(len(start), np.int8), (start, end)), shape=(len(index), len(index)))
    return index, connected_components(edges, directed=False)[1]


def _patches(label_NHW: np.ndarray, names: np.ndarray, picture: np.ndarray, box_M4: np.ndarray) -> np.ndarray:
    """(M, cells*cells) float32, 1 where a component covers the middle of a cell of its bounding box."""
    cell = (np.arange(_CELLS) + 0.5) / _CELLS
    left, right, top, bottom = box_M4.T[..., None]
    rows = (top + cell * (bottom - top)).astype(np.int64)
    columns = (left + cell * (right - left)).astype(np.int64)
    inside = label_NHW[picture[:, None, None], rows[:, :, None], columns[:, None, :]]
    return (inside == names[:, None, None]).reshape(len(names), -1).astype(np.float32)


def _fits(patch_MX: np.ndarray) -> np.ndarray:
    """(M, S) overlap (intersection over union) of each component with each ideal shape stretched to its box."""
    return np.minimum(_overlap(patch_MX, _TEMPLATES_SX) / _PERFECT_S, 1.0)


def look(pictures_NHWC: np.ndarray) -> list[tuple[Seen, ...]]:
    """What each picture (uint8, (N, H, W, 3)) shows: its components above the size of a speck."""
    if pictures_NHWC.ndim != 4 or pictures_NHWC.shape[-1] != 3 or pictures_NHWC.dtype != np.uint8:
        raise ValueError(f"pictures must be uint8 (N, H, W, 3), not {pictures_NHWC.dtype} {pictures_NHWC.shape}")
    _, height, width, _ = pictures_NHWC.shape
    colour_NHW = _segment(pictures_NHWC)
    index, label = _components(colour_NHW)
    area = np.bincount(label)
    names = np.flatnonzero(area >= _SPECK)
    out: list[list[Seen]] = [[] for _ in pictures_NHWC]
    if len(names) == 0:
        return [() for _ in pictures_NHWC]
    order = np.argsort(label, kind="stable")  # pixels of a component side by side, so that each reduces in one run
    first = np.concatenate([[0], np.cumsum(area)[:-1]])
    ys, xs = np.divmod(index[order] % (height * width), width)
    extremes = [(np.minimum, xs, 0), (np.maximum, xs, 1), (np.minimum, ys, 0), (np.maximum, ys, 1)]
    box_M4 = np.stack([reduce.reduceat(v, first)[names] + past for reduce, v, past in extremes], axis=1)
    x_M, y_M = (np.add.reduceat(v, first)[names] / area[names] for v in (xs, ys))
    pixel = index[order[first[names]]]
    label_NHW = np.full(colour_NHW.size, -1, np.int32)
    label_NHW[index] = label
    patch_MX = _patches(label_NHW.reshape(colour_NHW.shape), names, pixel // (height * width), box_M4)
    fits_MS = _fits(patch_MX)
    well_formed_M = _well_formed(patch_MX, fits_MS, box_M4)
    for m, best in enumerate(fits_MS.argmax(1)):
        out[pixel[m] // (height * width)].append(
            Seen(
                colour=_COLOURS[colour_NHW.flat[pixel[m]]],
                shape=_SHAPES[best],
                fits=tuple(fits_MS[m].tolist()),
                well_formed=bool(well_formed_M[m]),
                x=float(x_M[m]),
                y=float(y_M[m]),
                area=int(area[names[m]]),
            )
        )
    return [tuple(seen) for seen in out]


def _well_formed(patch_MX: np.ndarray, fits_MS: np.ndarray, box_M4: np.ndarray) -> np.ndarray:
    """bool (M,): of an object's size, not stretched, clearly one of the shapes, and solid."""
    core_MX = _CORES_SX[fits_MS.argmax(1)]
    sides = np.stack([box_M4[:, 1] - box_M4[:, 0], box_M4[:, 3] - box_M4[:, 2]])
    ranked = np.sort(fits_MS, axis=1)
    return (
        (sides.max(0) <= _SQUARENESS * sides.min(0))
        & (sides.min(0) >= _SMALLEST)
        & (sides.max(0) <= _LARGEST)
        & (ranked[:, -1] >= _MATCH)
        & (ranked[:, -1] - ranked[:, -2] >= _MARGIN)
        & ((patch_MX * core_MX).sum(1) >= _SOLID * core_MX.sum(1))
    )


def _quality(seen: Seen, colour: str | None, shape: str) -> float:
    """How much of the wanted object a component is: half for its colour, half for its form."""
    fit = max(0.0, seen.fits[_SHAPES.index(shape)] - _FIT_FLOOR) / (1 - _FIT_FLOOR)
    form = min(1.0, fit / 0.8) * (1.0 if seen.well_formed else _MALFORMED)
    hue = 1.0 if colour is None or seen.colour == colour else 0.0
    return 0.5 * hue + 0.5 * form * (0.5 + 0.5 * hue)


def related(a: tuple[float, float], b: tuple[float, float], relation: str) -> float:
    """Cosine between the named direction and the way from b's centre to a's; 1 is straight in that direction."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    distance = max(np.hypot(dx, dy), 1e-6)
    ux, uy = RELATIONS[relation]
    return float((dx * ux + dy * uy) / distance)


def _grade(seen: Sequence[Seen], prompt: Prompt) -> float:
    """Mean quality of the best assignment of components to wanted objects, over the larger of the two counts.

    A relation scales the score between 0.5 (opposite side) and 1 (named side).
    """
    wanted, relation = prompt.columns["objects"], prompt.columns["relation"]
    if not seen:
        return 0.0
    quality = np.array([[_quality(s, colour, shape) for colour, shape in wanted] for s in seen])
    rows, columns = linear_sum_assignment(quality, maximize=True)
    score = quality[rows, columns].sum() / max(len(seen), len(wanted))
    if relation is None:
        return float(score)
    place = {int(c): (seen[r].x, seen[r].y) for r, c in zip(rows, columns, strict=True)}
    cosine = related(place[0], place[1], relation) if len(place) == 2 else -1.0
    return float(score * (0.75 + 0.25 * np.clip(cosine / _COS_DIRECTION, -1, 1)))


def satisfies(objects: Sequence[tuple[str, str, float, float]], prompt: Prompt) -> bool:
    """Whether (colour, shape, x, y) of all objects in a picture are exactly what the prompt lists, placed as it says."""
    wanted, relation = prompt.columns["objects"], prompt.columns["relation"]
    if len(objects) != len(wanted):
        return False
    fits = np.array([[(c is None or c == o[0]) and s == o[1] for c, s in wanted] for o in objects])
    rows, columns = linear_sum_assignment(fits, maximize=True)
    if not fits[rows, columns].all():
        return False
    if relation is None:
        return True
    place = {int(c): objects[r][2:] for r, c in zip(rows, columns, strict=True)}
    return related(place[0], place[1], relation) >= _COS_DIRECTION


def verify(pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Verdict]:
    """Graded score in [0, 1], strict pass or fail, and what was seen, for each picture and its prompt."""
    if len(pictures_NHWC) != len(prompts):
        raise ValueError(f"{len(pictures_NHWC)} pictures but {len(prompts)} prompts: they must pair up")
    out = []
    for seen, prompt in zip(look(pictures_NHWC), prompts, strict=True):
        strict = all(s.well_formed for s in seen) and satisfies([(s.colour, s.shape, s.x, s.y) for s in seen], prompt)
        out.append(Verdict(_grade(seen, prompt), strict, seen))
    return out
