"""Blocks of items: all items of a group and a draw, for objectives whose loss of one depends on the others."""

from __future__ import annotations

import torch
from torch import Tensor

from progrpo.objectives.base import Experience
from progrpo.objectives.forward_process import NoisedLatents


def fits_microbatch(experience: Experience, microbatch: int) -> bool:
    """Whether every group's items of a draw fit into one microbatch."""
    group_N = experience.trajectories.group_N
    return len(group_N) == 0 or int(torch.bincount(group_N).max()) <= microbatch


def block_sums(experience: Experience, noised: NoisedLatents, values_B: Tensor) -> Tensor:
    """The sum of the values over each item's block, (B,), for groups that are present whole.

    An item that occurs twice, to fill up the microbatch, counts once.
    """
    assert experience.group_size_N is not None, "prepare first"
    group_B = experience.trajectories.group_N[noised.rows]
    block_B = (noised.draw * (group_B.max() + 1) + group_B).to(values_B.device)
    same_row = noised.rows.diff(prepend=noised.rows[:1] - 1) == 0
    same_draw = noised.draw.diff(prepend=noised.draw[:1] - 1) == 0
    repeated = (same_row & same_draw).to(values_B.device)
    total = values_B.new_zeros(int(block_B.max()) + 1)
    total.index_add_(0, block_B, values_B.masked_fill(repeated, 0))
    return total[block_B]
