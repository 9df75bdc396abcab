"""When memory runs out: half the microbatch, and again."""

from __future__ import annotations

import gc

import torch

from progrpo.training.errors import SelfCheckError


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
