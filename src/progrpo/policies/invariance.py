"""Batch invariance: a row's output is the same whatever rows are beside it, with and without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

ROUNDING = 64 * torch.finfo(torch.float32).eps
"""The difference that float32 kernels of another shape may make, as a share of an output's largest number."""


def is_batch_invariant(output: Callable[[Tensor], Tensor], sampled: Iterable[int], trained: Iterable[int]) -> bool:
    """Compare each row's output over calls of `sampled` rows without gradients, and of `trained` rows with them.

    `output(rows)` gives (len(rows), ...) for row numbers below the largest size. Each size is called with the first and
    with the last rows, since a kernel depends on the shape of a call, on the processor's instructions and, at the edges
    of its blocks, on a row's place in the call. So only a measurement tells.
    """
    sizes = [(size, False) for size in dict.fromkeys(sampled)] + [(size, True) for size in dict.fromkeys(trained)]
    most = max(size for size, _ in sizes)
    whole = _output(output, torch.arange(most), keep_graph=False)
    allowed = ROUNDING * whole.abs().max()
    for size, keep_graph in sizes:
        for start in dict.fromkeys((0, most - size)):
            if (size, keep_graph) == (most, False):
                continue
            rows = torch.arange(start, start + size)
            difference = _output(output, rows, keep_graph) - whole[rows.to(whole.device)]
            if not bool(difference.abs().max() <= allowed):
                return False
    return bool(whole.isfinite().all())


def _output(output: Callable[[Tensor], Tensor], rows: Tensor, keep_graph: bool) -> Tensor:
    with torch.set_grad_enabled(keep_graph):
        return output(rows).detach()
