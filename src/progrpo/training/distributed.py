"""This process among the others, over accelerate. With one process every operation is the identity."""

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

_Found = TypeVar("_Found")
_SHARED = "share a model that is too large for one device by --model.shard"
_IGNORED = {
    "ACCELERATE_USE_FSDP": ("FSDP", _SHARED),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron", _SHARED),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism config", _SHARED),
    "ACCELERATE_MIXED_PRECISION": ("mixed precision", "give --model.dtype"),
    "ACCELERATE_DYNAMO_BACKEND": ("torch dynamo", "give --model.compile"),
}
"""What accelerate's launcher tells its processes to use, and what to do instead. Gradient accumulation it tells with DeepSpeed alone."""
_OF_DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "false",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}
"""What accelerate itself is told of it: processes are those of plain data parallelism, and what DeepSpeed does is `zero`'s."""
_NOTHING = ("", "0", "no", "n", "false", "f", "off")


class Ranks:
    """ValueError where accelerate was launched with something that would be ignored here."""

    def __init__(self) -> None:
        self.zero = zero.asked()
        """What of DeepSpeed is asked for."""
        for variable, (what, instead) in _IGNORED.items():
            if self.zero is not None and variable in _OF_DEEPSPEED:
                continue
            if os.environ.get(variable, "").lower() not in _NOTHING:
                raise ValueError(
                    f"accelerate launch asks for {what} ({variable}), which would have no effect: launch without it, and {instead}"
                )
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        with patch_environment(**_OF_DEEPSPEED):
            self._accelerator = Accelerator(cpu=not accelerated)
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process
        if self.world > 1:
            # while Python is there: gloo's threads hold tensors of its, and abort the process if they let go later
            atexit.register(self._accelerator.end_training)
        self.drain_peer_calls: Callable[[], None] | None = None
        """The call of this process before it waits for the others: a policy's `drain_peer_calls`."""

    def deal(self, count: int) -> Tensor:
        """This process' share of the places 0..count-1, ascending int64: every world-th, no divisibility asked."""
        return torch.arange(self.rank, count, self.world)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over processes."""
        if self.world == 1:  # also where the device has no float64, as Apple's
            return values
        self.join()
        return self._accelerator.reduce(values.to(self.device), "sum")

    def sum_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Replace each gradient by its sum over processes, in one transfer; one that is missing here counts as zero.

        One that is missing everywhere stays so, as it does in one process: an optimizer would decay a weight whose gradient is zero.
        Those of weights that are shared out are such sums already.
        """
        parameters = [p for p in parameters if not isinstance(p, DTensor)]
        self.join()
        if self.world == 1 or not parameters:
            return
        own = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
        there = own[0].new_tensor([p.grad is not None for p in parameters])
        *summed, found = self.sum(torch.cat([*own, there])).split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, gradient, count in zip(parameters, summed, found.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter) if count else None

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all processes, one after another."""
        self.join()
        return gather_object(items) if self.world > 1 else items

    def from_main(self, work: Callable[[], _Found]) -> _Found:
        """What `work` gives in the main process, in all. So is its ValueError: none waits for what does not come."""
        found: _Found | None = None
        refused: ValueError | None = None
        if self.is_main:
            try:
                found = work()
            except ValueError as error:
                refused = error
        told, words = self.gather([(found, refused and str(refused))])[0]
        if words is not None:
            raise refused or ValueError(words)
        return cast(_Found, told)

    def require_same(self, given: Mapping[str, str], mend: str) -> None:
        """ValueError in all processes, with the name and both values, where `given` is not the same in each; `mend` ends the sentence."""
        mains, *others = self.gather([given])
        for rank, own in enumerate(others, 1):
            if differing := [name for name in {**mains, **own} if mains.get(name) != own.get(name)]:
                name = differing[0]
                raise ValueError(
                    f"{name} must be the same in all processes, and is {mains.get(name)} in process 0 and {own.get(name)} in"
                    f" process {rank}; {mend}"
                )

    def leave(self) -> None:
        """At the end of a run, until all are here: a launcher that sees one end badly kills those that still write."""
        self.join()
        # several, since a sharded network keeps gloo's threads to the very end, and none shall still hold a tensor of Python's
        for _ in range(8):
            self._accelerator.wait_for_everyone()

    def join(self) -> None:
        """Take part in the others' network calls, where they are made together, until none has one to make."""
        if self.drain_peer_calls is not None:
            self.drain_peer_calls()


def is_lost(error: BaseException) -> bool:
    """Whether a process that this one waited for is gone; gloo says it by a plain RuntimeError."""
    if isinstance(error, LostProcessError):  # said already
        return False
    words = "Connection closed by peer", "Connection reset by peer", "gloo"
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


@contextmanager
def lost_in_words(on: Callable[[], str]) -> Iterator[None]:
    """Run the block; LostProcessError, in one sentence that ends in what `on` says, where another process is found to be gone."""
    try:
        yield
    except BaseException as error:
        if not is_lost(error):
            raise
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise LostProcessError(f"another process of this run was lost ({reason}); {on()}") from error


@dataclass
class Tally:
    """Metrics as (sum, count) of means, as totals and as maxima, so that microbatches and processes add up without bias."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float, count: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.counts[name] = self.counts.get(name, 0.0) + float(count)

    def add_finite(self, name: str, values: Tensor) -> None:
        """The values that are there; NaN is missing."""
        there = values[values.isfinite()]
        self.add(name, there.double().sum().item(), len(there))

    def count(self, name: str, number: float) -> None:
        self.totals[name] = self.totals.get(name, 0) + number

    def raise_to(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, -torch.inf), float(value))

    def merge(self, other: Tally) -> None:
        for name, total in other.sums.items():
            self.add(name, total, other.counts[name])
        for name, number in other.totals.items():
            self.count(name, number)
        for name, value in other.maxima.items():
            self.raise_to(name, value)

    def over(self, ranks: Ranks) -> Mapping[str, float]:
        """Means, totals and maxima over all processes; a mean of nothing is left out."""
        whole = Tally()
        for part in ranks.gather([self]):
            whole.merge(part)
        means = {name: total / whole.counts[name] for name, total in whole.sums.items() if whole.counts[name]}
        return means | whole.totals | whole.maxima
