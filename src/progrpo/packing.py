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


def evenly(count: int, size: int) -> int:
    """Rows of a microbatch where `count` rows are shared out evenly among as few as `size` allows: with of_one_shape, little is filled up."""
    return -(-count // -(-count // size)) if count else size


def in_equal_parts(count: int, size: int) -> list[Tensor]:
    """0 .. count-1 in as few microbatches as `size` allows, which differ by at most one row.

    Kernels round by shape, and in low precision a last microbatch of one row would look off-policy.
    """
    return list(torch.arange(count).tensor_split(-(-count // size))) if count else []


def of_update(count: int, size: int, one_shape: bool) -> list[Tensor]:
    """0 .. count-1 as an update goes through them: in equal parts, or for a compiled network in parts of one shape."""
    return of_one_shape(count, size) if one_shape else in_equal_parts(count, size)


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
