"""A denoiser whose weights are shared out among processes, for models that are too large for one device.

Each process holds a part of every weight, and a block is gathered while it runs (torch's `fully_shard`). A LoRA stays whole
everywhere; weights that are trained in full are shared out with their gradients, copies and optimizer state. A network call
then is one that all processes make with the same weights: who has none of its own stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

_NOTHING = 2**31


def share_out(denoiser: nn.Module, device: torch.device, whole: Collection[Parameter]) -> None:
    """In place: parameters but the `whole` ones become DTensors on `device`, a block at a time, so that it never holds them all.

    A backward pass leaves in each process the sum over processes of its part of the gradients.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*blocks(denoiser), denoiser):
        shared = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(whole))
        shared.set_gradient_divide_factor(1.0)
        shared.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for parameter in whole:
        parameter.data = parameter.data.to(device)


def blocks(denoiser: nn.Module) -> list[nn.Module]:
    """What it is stacked from, each of which runs as a whole; of a U-Net the middle one, too, which stands alone."""
    stacked = [block for child in denoiser.children() if isinstance(child, nn.ModuleList) for block in child]
    middle = getattr(denoiser, "mid_block", None)
    return stacked if middle is None else [*stacked, middle]


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_gathered(tree: Any, keep: bool) -> Any:
    """Nested state with what is shared out gathered, one tensor after another, and moved to the CPU where it is to be kept."""
    if isinstance(tree, DTensor):
        whole = tree.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {name: all_gathered(value, keep) for name, value in tree.items()}
    return [all_gathered(value, keep) for value in tree] if isinstance(tree, list | tuple) else tree


def as_shared(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of `tensor`, on the device of `like` and in its dtype, and of one that is shared out this process' part."""
    if not isinstance(like, DTensor):
        return tensor.to(like, copy=True)
    moved = tensor.to(like.device, like.dtype, copy=True)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


class Step:
    """Keeps the network calls of all processes in step: each makes as many, in the same order, by the same weights, with or
    without a backward pass.

    `stand_in(weights, training)` makes a call that counts for nothing; `weights` are numbered alike in all processes.
    """

    def __init__(self, device: torch.device, stand_in: Callable[[int, bool], None]) -> None:
        self._device, self._stand_in = device, stand_in

    def call(self, weights: int, training: bool) -> None:
        """Before each call of one's own, which is followed by its backward pass if it is `training`."""
        self._until(2 * weights + training)

    def attend(self) -> None:
        """Stand in until no process has a call to make."""
        self._until(_NOTHING)

    def _until(self, own: int) -> None:
        # Who has a lesser thing to do goes first: calls of different kinds never meet.
        while (now := self._least(own)) != own:
            self._stand_in(now // 2, bool(now % 2))

    def _least(self, own: int) -> int:
        told = torch.tensor(own, device=self._device)
        dist.all_reduce(told, dist.ReduceOp.MIN)
        return int(told)
