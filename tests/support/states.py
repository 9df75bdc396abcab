"""Nested states of runs, compared."""

from __future__ import annotations

from typing import Any

import torch


def same_state(a: Any, b: Any) -> bool:
    """Whether two states are equal to the last bit, tensors and all."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
