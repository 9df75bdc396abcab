"""How much pictures of one prompt differ, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from progrpo.training.pictures import diversity


def test_diversity_is_the_mean_distance_of_pairs_in_units_of_the_range():
    black, white = np.zeros((2, 2, 3), dtype=np.uint8), np.full((2, 2, 3), 255, dtype=np.uint8)
    assert diversity(np.stack([black, black])) == 0
    assert diversity(np.stack([black, white])) == 1
    assert diversity(np.stack([black, black, white])) == pytest.approx(2 / 3)  # two of three pairs
    half = black.copy()
    half[0] = 255  # half of the values
    assert diversity(np.stack([black, half])) == pytest.approx(np.sqrt(0.5))
