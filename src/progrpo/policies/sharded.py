"""A denoiser whose frozen weights are shared out among processes, for models that are too large for one device.

Each process holds a part of every weight, and a block is gathered while it runs (torch's `fully_shard`). Trained weights, a
LoRA's, stay whole everywhere. A network call then is one that all processes make: who has none of its own stands in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

_FORWARD, _TRAINING, _NOTHING = 1, 2, 3


def shard_frozen(denoiser: nn.Module, device: torch.device) -> None:
    """In place: frozen parameters become DTensors on `device`, a block at a time, so that it never holds them all."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    trained = {p for p in denoiser.parameters() if p.requires_grad}
    stacks = [child for child in denoiser.children() if isinstance(child, nn.ModuleList)]
    for module in (*(block for stack in stacks for block in stack), denoiser):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    for parameter in trained:
        parameter.data = parameter.data.to(device)


class Step:
    """Keeps the network calls of all processes in step: each makes as many, in the same order, with or without a backward pass.

    `stand_in(training)` makes a call that counts for nothing.
    """

    def __init__(self, device: torch.device, stand_in: Callable[[bool], None]) -> None:
        self._device, self._stand_in = device, stand_in

    def call(self, training: bool) -> None:
        """Before each call of one's own, which is followed by its backward pass if it is `training`."""
        self._until(_TRAINING if training else _FORWARD)

    def attend(self) -> None:
        """Stand in until no process has a call to make."""
        self._until(_NOTHING)

    def _until(self, own: int) -> None:
        # Who has a lesser thing to do goes first: calls with and without a backward pass never meet.
        while (now := self._least(own)) != own:
            self._stand_in(now == _TRAINING)

    def _least(self, own: int) -> int:
        told = torch.tensor(own, device=self._device)
        dist.all_reduce(told, dist.ReduceOp.MIN)
        return int(told)
