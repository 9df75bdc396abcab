"""A denoiser whose weights are shared out among processes, for models that are too large for one device.

Each process holds a part of every weight, and a block is gathered while it runs (torch's `fully_shard`). A LoRA stays
whole in each. Weights that are trained in full are shared out with their gradients, copies and optimizer state. All
processes make a network call together, with the same weights: a process that has none of its own makes a dummy call.
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

_NO_CALL = 2**31  # above every number of a call


def share_out(denoiser: nn.Module, device: torch.device, replicated: Collection[Parameter]) -> None:
    """Make DTensors on `device` of all parameters but the `replicated` ones, in place and a block at a time.

    A backward pass leaves in each process the sum over processes of its part of the gradients.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*blocks(denoiser), denoiser):
        shared = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(replicated))
        shared.set_gradient_divide_factor(1.0)
        shared.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for parameter in replicated:
        parameter.data = parameter.data.to(device)


def blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks that the denoiser is stacked from; a U-Net's middle block too, which is in no list."""
    stacked = [block for child in denoiser.children() if isinstance(child, nn.ModuleList) for block in child]
    middle = getattr(denoiser, "mid_block", None)
    return stacked if middle is None else [*stacked, middle]


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be shared out. All processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_gathered(tree: Any, keep: bool) -> Any:
    """Gather the shared tensors of a nested state, one after another, and move them to the CPU where they are kept."""
    if isinstance(tree, DTensor):
        full = tree.full_tensor()
        return full.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {name: all_gathered(value, keep) for name, value in tree.items()}
    return [all_gathered(value, keep) for value in tree] if isinstance(tree, list | tuple) else tree


def as_shared(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of `tensor` on the device of `like` and in its dtype; this process' part where `like` is shared out."""
    if not isinstance(like, DTensor):
        return tensor.to(like, copy=True)
    moved = tensor.to(like.device, like.dtype, copy=True)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


class PeerCalls:
    """The network calls of all processes, kept in step: the same number, in the same order, with the same weights.

    `dummy_forward(weights, training)` makes a call that counts for nothing, and a backward pass if it is `training`.
    Weights have the same numbers in all processes.
    """

    def __init__(self, device: torch.device, dummy_forward: Callable[[int, bool], None]) -> None:
        self._device = device
        self._dummy_forward = dummy_forward

    def begin_call(self, weights: int, training: bool) -> None:
        """Wait until this process may make a call of its own, whose backward pass follows if it is `training`."""
        self._take_part_until(2 * weights + training)

    def drain(self) -> None:
        """Take part in the other processes' calls until none has one to make."""
        self._take_part_until(_NO_CALL)

    def _take_part_until(self, own: int) -> None:
        # the smallest number goes first: calls of different kinds never meet
        smallest = self._smallest(own)
        while smallest != own:
            self._dummy_forward(smallest // 2, bool(smallest % 2))
            smallest = self._smallest(own)

    def _smallest(self, own: int) -> int:
        number = torch.tensor(own, device=self._device)
        dist.all_reduce(number, dist.ReduceOp.MIN)
        return int(number)
