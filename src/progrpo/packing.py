"""Rows of any number as microbatches."""

from __future__ import annotations

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
