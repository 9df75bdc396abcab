"""A taste in pictures of the shapes world, the same for every prompt and without thresholds: large, centred, warm."""

from __future__ import annotations

import numpy as np

from progrpo.zoo.shapes.match import SIZE, inked, kept

_LARGE = 500.0  # pixels of ink at which half of the agreement is reached
_CENTRE_SPREAD = 12.0  # pixels from the picture's centre to that of the ink that leave 1 / sqrt(2) of the agreement


def taste(pictures_NHWC: np.ndarray) -> list[float]:
    """The geometric mean, in [0, 1], of how large, how centred and how warm the ink is.

    Warmth grows with the ink's mean red less blue. A picture without ink has 0.
    """
    ink, count = inked(pictures_NHWC), len(pictures_NHWC)

    def total(values_M: np.ndarray) -> np.ndarray:
        return np.bincount(ink.picture_M, ink.amount_M * values_M, count)

    area_N = np.bincount(ink.picture_M, ink.amount_M, count)
    some_N = np.maximum(area_N, 1e-9)
    x_N = total(ink.column_M + 0.5 - SIZE / 2) / some_N
    y_N = total(ink.row_M + 0.5 - SIZE / 2) / some_N
    levels_3M = pictures_NHWC[ink.picture_M, ink.row_M, ink.column_M].T / 255
    warm_N = (1 + total(levels_3M[0] - levels_3M[2]) / some_N) / 2
    large_N, centred_N = area_N / (area_N + _LARGE), kept((x_N**2 + y_N**2) / _CENTRE_SPREAD**2)
    values: list[float] = np.cbrt(large_N * centred_N * warm_N).tolist()
    return values
