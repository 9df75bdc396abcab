"""Parts of a pipeline that take turns on a device, where it has no room for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Turns:
    """Of two parties of modules the one of which a module runs is on `device`, and the other is on the CPU; `first` is there at first."""

    def __init__(self, device: torch.device, first: Sequence[nn.Module], second: Sequence[nn.Module]) -> None:
        self._device, self._there, self._away = device, first, second
        for party in (first, second):
            for module in party:
                module.register_forward_pre_hook(self._before)
        self._move()

    def _before(self, module: nn.Module, inputs: Any) -> None:
        if any(module is other for other in self._away):
            self._there, self._away = self._away, self._there
            self._move()

    def _move(self) -> None:
        for module in self._away:
            module.to("cpu")
        for module in self._there:
            module.to(self._device)

    def leave_to(self, module: nn.Module) -> None:
        """Its party is there from now on, and the other one is let go of."""
        self._before(module, None)
        self._away = ()
