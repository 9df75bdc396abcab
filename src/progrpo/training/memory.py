"""The CPU's freed memory is kept for the next tensors; where memory runs out, half the microbatch is tried."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from typing import TypeVar

import torch

from progrpo.training.errors import SelfCheckError

_Result = TypeVar("_Result")
_KEPT = 2**31 - 1  # bytes: the most that mallopt takes
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Have the C library keep the memory that tensors free. Do nothing without glibc, or where the user has set its
    limits.

    Without this, glibc returns memory to the system at every layer and asks for it again, and the system clears each
    page. On the built-in models that takes over a third of a network call's time (benchmarks/cpu.py).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and not any(name in os.environ for name in _USERS_OWN):
        for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(threshold, _KEPT)


class Microbatch:
    """The rows of a call, as many as fit into memory: halved where memory runs out, for that call and all later ones.

    `field` is the setting that the size comes from.
    """

    def __init__(self, size: int, field: str) -> None:
        self.size = size
        self._field = field

    def run(self, call: Callable[[int], _Result], refusal: str | None = None) -> _Result:
        """Return `call(size)`, made again with half the size as often as memory runs out.

        SelfCheckError where one row is too much, and with the sentence `refusal` where a second call cannot be made.
        """
        while True:
            try:
                return call(self.size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if refusal is not None:
                    raise SelfCheckError(refusal) from error
            self.size = halved(self.size, self._field)


def result_unless_out_of_memory(call: Callable[[], _Result]) -> _Result | None:
    """Return what `call` returns, or None where memory runs out."""
    try:
        return call()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory ran out, or that of the CPU's allocator, which has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def halved(microbatch: int, field: str) -> int:
    """Half the microbatch, once unused memory is given back. SelfCheckError where one row is too much."""
    if microbatch == 1:
        raise SelfCheckError(
            f"out of memory at {field} 1; use a smaller model or picture, a LoRA, model.activation_checkpointing,"
            " model.dtype bfloat16 or a larger device"
        )
    gc.collect()  # an error's traceback holds frames, and these hold tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return microbatch // 2
