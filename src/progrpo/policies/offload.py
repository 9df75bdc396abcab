"""Modules that are on a device by turns, where it has no room for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from progrpo.policies.family import ModelFamily


class ModuleOffloader:
    """Two groups of modules, one of which is on `device` and the other on the CPU; `first` is on the device at first.

    When a module of the other group runs, the groups change places.
    """

    def __init__(self, device: torch.device, first: Sequence[nn.Module], second: Sequence[nn.Module]) -> None:
        self._device = device
        self._on_device = first
        self._offloaded = second
        self._hooks = [
            module.register_forward_pre_hook(lambda called, inputs: self._bring(called)) for module in (*first, *second)
        ]
        self._move()

    def stop(self) -> None:
        """Leave the modules where they are from now on."""
        for hook in self._hooks:
            hook.remove()

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


def offloader_of(family: ModelFamily) -> ModuleOffloader:
    """The offloader of denoiser and text encoders. The denoiser comes first, since its weights are copied at once."""
    others = (family.pipeline.vae, *family.denoisers.values())
    networks = [module for module in family.pipeline.components.values() if isinstance(module, nn.Module)]
    encoders = [module for module in networks if not any(module is other for other in others)]
    return ModuleOffloader(family.device, [family.denoiser], encoders)


@contextmanager
def offloaded(family: ModelFamily) -> Iterator[None]:
    """Have denoiser and text encoders take turns on the device within the block."""
    offloader = offloader_of(family)
    try:
        yield
    finally:
        offloader.stop()
