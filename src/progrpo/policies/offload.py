"""Modules that are on a device by turns, where it has no room for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class ModuleOffloader:
    """Two groups of modules, one of which is on `device` and the other on the CPU; `first` is on the device at first.

    When a module of the other group runs, the groups change places.
    """

    def __init__(self, device: torch.device, first: Sequence[nn.Module], second: Sequence[nn.Module]) -> None:
        self._device = device
        self._on_device = first
        self._offloaded = second
        for module in (*first, *second):
            module.register_forward_pre_hook(lambda called, inputs: self._bring(called))
        self._move()

    def _bring(self, module: nn.Module) -> None:
        """Have the module's group on the device."""
        if any(module is other for other in self._offloaded):
            self._on_device, self._offloaded = self._offloaded, self._on_device
            self._move()

    def _move(self) -> None:
        for module in self._offloaded:
            module.to("cpu")
        for module in self._on_device:
            module.to(self._device)

    def keep_only(self, module: nn.Module) -> None:
        """Leave the device to the module's group, and let go of the other one."""
        self._bring(module)
        self._offloaded = ()
