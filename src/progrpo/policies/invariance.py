"""Batch invariance: a row's output is the same whatever rows are beside it, with and without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

ROUNDING = 64 * torch.finfo(torch.float32).eps
"""The difference that float32 kernels of another shape may make, as a share of an output's largest number."""


def is_batch_invariant(output: Callable[[int], Tensor], sampled: Iterable[int], trained: Iterable[int]) -> bool:
    """Compare the first row's output over calls of `sampled` rows without gradients, and of `trained` rows with them.

    `output(size)` gives (size, ...) and has the same inputs in its first row every time. The kernel depends on the
    shape of a call and on the processor's instructions, so only a measurement tells.
    """
    first_rows = [_first_row(output, size, keep_graph=False) for size in dict.fromkeys(sampled)]
    first_rows += [_first_row(output, size, keep_graph=True) for size in dict.fromkeys(trained)]
    allowed = ROUNDING * first_rows[0].abs().max()
    return all(bool((row - first_rows[0]).abs().max() <= allowed) for row in first_rows)


def _first_row(output: Callable[[int], Tensor], size: int, keep_graph: bool) -> Tensor:
    with torch.set_grad_enabled(keep_graph):
        return output(size)[0].detach().clone()
