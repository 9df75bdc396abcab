"""The scale of a loss whose gradients pass through float16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from torch.nn import Parameter

_FIRST = 2.0**16
_CLEAN = 50  # updates: a run has hundreds, where torch's 2,000 belong to pretraining


class LossScaleState(TypedDict, total=False):
    """The scale, and the number of updates since the last overflow; empty for a dtype that needs no scale."""

    value: float
    clean: int


class LossScale:
    """A power of two by which losses are multiplied and gradients divided, as by `torch.amp.GradScaler`.

    The mean of a loss over thousands of items and latent dims has gradients below float16's smallest number (arXiv
    1710.03740). The scale is halved where a gradient overflows and doubled after 50 updates without an overflow. It is
    1 unless `enabled`.
    """

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self.value = _FIRST if enabled else 1.0
        self._clean = 0

    def unscale(self, parameters: Iterable[Parameter]) -> None:
        """Divide the gradients that are there, in place."""
        if not self.enabled:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1 / self.value)

    def lower(self) -> bool:
        """Halve the scale after an overflow. False where it is 1, so that the overflow has another cause."""
        if self.value <= 1:
            return False
        self.value = self.value / 2
        self._clean = 0
        return True

    def count(self) -> None:
        """Note an update without an overflow."""
        if not self.enabled:
            return
        self._clean += 1
        if self._clean >= _CLEAN:
            self.value = self.value * 2
            self._clean = 0

    def state_dict(self) -> LossScaleState:
        return {"value": self.value, "clean": self._clean} if self.enabled else {}

    def load_state_dict(self, state: LossScaleState) -> None:
        """Go on with a saved scale. A run in another dtype has none, nor has one from before losses were scaled."""
        if self.enabled and state:
            self.value = state["value"]
            self._clean = state["clean"]
