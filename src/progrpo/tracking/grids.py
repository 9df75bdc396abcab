"""Grids of pictures."""

from __future__ import annotations

import numpy as np

_GAP_GREY = 236
_SIDE = 192  # pixels of a picture on an audit's sheet, as many as the report shows


def tile(images_NHWC: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """The N pictures as one, row by row, with `gap` grey pixels between them."""
    n, height, width, channels = images_NHWC.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap), columns * (width + gap), channels), _GAP_GREY, np.uint8)
    for i, image in enumerate(images_NHWC):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return sheet[: sheet.shape[0] - gap, : sheet.shape[1] - gap]


def audit_sheet(pictures_GSHWC: np.ndarray) -> np.ndarray:
    """The sheet of a group's pictures: a row per member, a column per step and one for the final pictures."""
    group, columns = pictures_GSHWC.shape[:2]
    return tile(reduced(pictures_GSHWC.reshape(group * columns, *pictures_GSHWC.shape[2:])), columns, gap=0)


def reduced(images_NHWC: np.ndarray) -> np.ndarray:
    """The pictures, reduced by a whole number to at most 192 pixels per side: viewers fail on larger sheets."""
    from PIL import Image

    factor = -(-max(images_NHWC.shape[1:3]) // _SIDE)
    if factor == 1:
        return images_NHWC
    return np.stack([np.asarray(Image.fromarray(image).reduce(factor)) for image in images_NHWC])
