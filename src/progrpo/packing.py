"""Rows of any number as microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def of_one_shape(count: int, size: int) -> list[Tensor]:
    """0 .. count-1 in microbatches of exactly `size` rows; the last one is filled up with copies of its last row.

    Whatever is computed row by row then sees one shape, however many rows are left: a compiled network is not compiled
    again when a group is pruned, and a row's result does not depend on how many others there are.
    """
    rows = torch.arange(-(-count // size) * size).clamp(max=max(count - 1, 0))
    return list(rows.split(size)) if count else []


def in_equal_parts(count: int, size: int) -> list[Tensor]:
    """0 .. count-1 in as few microbatches as `size` allows, which differ by at most one row.

    Kernels round by shape, and in low precision a last microbatch of one row would look off-policy.
    """
    return list(torch.arange(count).tensor_split(-(-count // size))) if count else []


def of_whole_blocks(lengths: Sequence[int], size: int) -> list[Tensor]:
    """Rows in blocks of these lengths, none of them above `size`, as microbatches of neighbouring blocks; none is parted."""
    starts, filled, start = [0], 0, 0
    for length in lengths:
        if filled + length > size:
            starts, filled = [*starts, start], 0
        filled, start = filled + length, start + length
    return [torch.arange(a, b) for a, b in pairwise([*starts, start]) if b > a]


def filled_up(rows: Tensor, size: int) -> Tensor:
    """With copies of the last row, to `size` rows."""
    return torch.cat([rows, rows[-1:].expand(size - len(rows))])
