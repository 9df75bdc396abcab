"""Microbatches of any number of rows. Each is a tensor of row numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def fixed_size_batches(count: int, size: int) -> list[Tensor]:
    """Rows 0 .. count-1 in microbatches of exactly `size`; copies of the last row fill up the last one.

    Computations by row then see one shape, however many rows are left. So a compiled network is not compiled again when
    a group is pruned, and a row's result does not depend on the number of others.
    """
    rows = torch.arange(-(-count // size) * size).clamp(max=max(count - 1, 0))
    return list(rows.split(size)) if count else []


def balanced_size(count: int, size: int) -> int:
    """The size of equal microbatches for `count` rows, in as few calls as `size` allows.

    With `fixed_size_batches` few rows are then filled up.
    """
    return -(-count // -(-count // size)) if count else size


def balanced_batches(count: int, size: int) -> list[Tensor]:
    """Rows 0 .. count-1 in as few microbatches as `size` allows, which differ by at most one row.

    Kernels round by shape, and in low precision a last microbatch of one row would look off-policy.
    """
    return list(torch.arange(count).tensor_split(-(-count // size))) if count else []


def update_batches(count: int, size: int, fixed_size: bool) -> list[Tensor]:
    """Rows 0 .. count-1 in the microbatches of an update: balanced, or of a fixed size for a compiled network."""
    return fixed_size_batches(count, size) if fixed_size else balanced_batches(count, size)


def whole_block_batches(lengths: Sequence[int], size: int) -> list[Tensor]:
    """Rows in blocks of these lengths, none above `size`, in microbatches of neighbouring blocks that stay whole."""
    starts, filled, start = [0], 0, 0
    for length in lengths:
        if filled + length > size:
            starts.append(start)
            filled = 0
        filled += length
        start += length
    return [torch.arange(a, b) for a, b in pairwise([*starts, start]) if b > a]


def padded(rows: Tensor, size: int) -> Tensor:
    """The rows with copies of the last one, up to `size` rows."""
    return torch.cat([rows, rows[-1:].expand(size - len(rows))])
