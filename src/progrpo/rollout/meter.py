"""The meter of costs: network rows, decoded pictures, reward calls, and seconds by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from progrpo.types import Cost


@dataclass
class Meter:
    """The costs so far, and the seconds of each stage."""

    cost: Cost = field(default_factory=Cost)
    seconds: dict[str, float] = field(default_factory=dict)

    def count(self, **spent: int) -> None:
        self.cost = self.cost + Cost(**spent)

    def add(self, other: Meter) -> None:
        """Add the costs and seconds of another meter."""
        self.cost = self.cost + other.cost
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's wall time to a stage; blocks do not nest. On a GPU the queue is drained first and last."""
        _drain()
        start = time.perf_counter()
        yield
        _drain()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
