"""Memory of the CPU's that is kept, and when memory runs out: half the microbatch, and again."""

from __future__ import annotations

import ctypes
import gc
import os

import torch

from progrpo.training.errors import SelfCheckError

_KEPT = 2**31 - 1  # bytes: the most that mallopt can be told
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Have the C library keep what tensors free for the next ones. Where it is not glibc, or the user has told it what to do, nothing.

    It would give memory back to the system at every layer, to ask for it again, and the system clears each page that it gives:
    over a third of a network call's time on the built-in models (benchmarks/cpu.py), until after some large tensors glibc keeps more.
    """
    tell = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if tell is not None and not any(name in os.environ for name in _USERS_OWN):
        for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            tell(threshold, _KEPT)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU, or of the CPU's allocator, which has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def halved(microbatch: int, field: str) -> int:
    """What to try next, with memory that nobody holds any more given back; SelfCheckError where one row is too much."""
    if microbatch == 1:
        raise SelfCheckError(
            f"out of memory at {field} 1; use a smaller model or picture, a LoRA, model.activation_checkpointing, model.dtype bfloat16"
            " or a larger device"
        )
    gc.collect()  # the error's traceback holds frames, and these hold tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return microbatch // 2
