"""This process among the processes of a run, over accelerate. With one process every operation is the identity."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, patch_environment
from torch import Tensor
from torch.distributed import DistError
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from progrpo.training import zero
from progrpo.training.errors import LostProcessError

_Result = TypeVar("_Result")
_SHARD = "share a model that is too large for one device by --model.shard"
_IGNORED = {
    "ACCELERATE_USE_FSDP": ("FSDP", _SHARD),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron", _SHARD),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism config", _SHARD),
    "ACCELERATE_MIXED_PRECISION": ("mixed precision", "give --model.dtype"),
    "ACCELERATE_DYNAMO_BACKEND": ("torch dynamo", "give --model.compile"),
}
"""Requests of accelerate's launcher that have no effect here, each with what to do instead."""
_WITHOUT_DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "false",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}
"""The values for accelerate itself where DeepSpeed is requested: plain data parallelism. `zero` reads the request."""
_OFF = ("", "0", "no", "n", "false", "f", "off")


class Ranks:
    """This process and the others.

    ValueError where accelerate was launched with a request that would have no effect.
    """

    def __init__(self) -> None:
        self.zero = zero.requested()
        """The request for DeepSpeed; None without one."""
        for variable, (what, instead) in _IGNORED.items():
            if self.zero is not None and variable in _WITHOUT_DEEPSPEED:
                continue
            if os.environ.get(variable, "").lower() not in _OFF:
                raise ValueError(
                    f"accelerate launch asks for {what} ({variable}), which would have no effect: launch without it,"
                    f" and {instead}"
                )
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        with patch_environment(**_WITHOUT_DEEPSPEED):
            self._accelerator = Accelerator(cpu=not accelerated)
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process
        if self.world > 1:
            # while Python runs: gloo's threads hold its tensors, and abort the process if they free them later
            atexit.register(self._accelerator.end_training)
        self.before_waiting: Callable[[], None] | None = None
        """The call of this process before it waits for the others: a policy's `drain_peer_calls`."""

    def deal(self, count: int, to_main: int = 0) -> Tensor:
        """This process' share of the places 0..count-1, ascending int64: every world-th. Any count will do.

        The main process gets the place `to_main`.
        """
        places = torch.arange(count)
        return places[(places - to_main) % self.world == self.rank]  # also of fewer places than processes

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over processes."""
        if self.world == 1:  # also on a device without float64, such as Apple's
            return values
        self.drain_peer_calls()
        return self._accelerator.reduce(values.to(self.device), "sum")

    def sum_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Replace each gradient by its sum over processes, in one transfer. A gradient that is missing here counts as
        zero.

        A gradient that is missing everywhere stays missing, as in one process: an optimizer would decay a weight whose
        gradient is zero. Gradients of weights that are shared out are such sums already.
        """
        parameters = [p for p in parameters if not isinstance(p, DTensor)]
        self.drain_peer_calls()
        if self.world == 1 or not parameters:
            return
        own = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
        is_there = own[0].new_tensor([p.grad is not None for p in parameters])
        total = self.sum(torch.cat([*own, is_there]))
        *summed, counts = total.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, gradient, count in zip(parameters, summed, counts.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter) if count else None

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all processes, one after another."""
        self.drain_peer_calls()
        return gather_object(items) if self.world > 1 else items

    def from_main(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work` in the main process, in all processes. A ValueError of it is raised in all as well."""
        result: _Result | None = None
        refusal: ValueError | None = None
        if self.is_main:
            try:
                result = work()
            except ValueError as error:
                refusal = error
        shared_result, message = self.gather([(result, refusal and str(refusal))])[0]
        if message is not None:
            raise refusal or ValueError(message)
        return cast(_Result, shared_result)

    def require_same(self, values: Mapping[str, str], advice: str) -> None:
        """ValueError in all processes, with both values and the `advice`, where a value differs."""
        mains, *others = self.gather([values])
        for rank, own in enumerate(others, 1):
            for name in {**mains, **own}:
                if mains.get(name) != own.get(name):
                    raise ValueError(
                        f"{name} must be the same in all processes, and is {mains.get(name)} in process 0 and"
                        f" {own.get(name)} in process {rank}; {advice}"
                    )

    def wait_for_all(self) -> None:
        """Wait for all at the end of a run: a launcher that sees one end badly kills those that still write."""
        self.drain_peer_calls()
        # several times: a sharded network keeps gloo's threads to the very end, and none may still hold a tensor of
        # Python's
        for _ in range(8):
            self._accelerator.wait_for_everyone()

    def drain_peer_calls(self) -> None:
        """Take part in the others' network calls, where they are made together, until none has one to make."""
        if self.before_waiting is not None:
            self.before_waiting()


def is_lost(error: BaseException) -> bool:
    """Whether a process that this one waited for is gone; gloo says it by a plain RuntimeError."""
    if isinstance(error, LostProcessError):  # explained already
        return False
    signs = ("Connection closed by peer", "Connection reset by peer", "gloo")
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


@contextmanager
def explain_lost_process(advice: Callable[[], str]) -> Iterator[None]:
    """Run the block. LostProcessError, one sentence that ends in the `advice`, where another process is gone."""
    try:
        yield
    except BaseException as error:
        if not is_lost(error):
            raise
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise LostProcessError(f"another process of this run was lost ({reason}); {advice()}") from error


@dataclass
class Tally:
    """Metrics as means (sum, count), totals and maxima, so that microbatches and processes add up without bias."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float, count: float) -> None:
        """Add `count` values that sum to `total` to a mean."""
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.counts[name] = self.counts.get(name, 0.0) + float(count)

    def add_finite(self, name: str, values: Tensor) -> None:
        """Add the values that are finite to a mean; others are missing."""
        finite = values[values.isfinite()]
        self.add(name, finite.double().sum().item(), len(finite))

    def count(self, name: str, number: float) -> None:
        """Add to a total."""
        self.totals[name] = self.totals.get(name, 0) + number

    def raise_to(self, name: str, value: float) -> None:
        """Raise a maximum to this value, if it is lower."""
        self.maxima[name] = max(self.maxima.get(name, -torch.inf), float(value))

    def merge(self, other: Tally) -> None:
        """Add all of another tally."""
        for name, total in other.sums.items():
            self.add(name, total, other.counts[name])
        for name, number in other.totals.items():
            self.count(name, number)
        for name, value in other.maxima.items():
            self.raise_to(name, value)

    def over(self, ranks: Ranks) -> Mapping[str, float]:
        """Means, totals and maxima over all processes. A mean of nothing is left out."""
        whole = Tally()
        for own in ranks.gather([self]):
            whole.merge(own)
        means = {name: total / whole.counts[name] for name, total in whole.sums.items() if whole.counts[name]}
        return means | whole.totals | whole.maxima
