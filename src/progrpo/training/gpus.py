"""GPUs whose memory and speed `progrpo plan` knows. It is free of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A card: GB of memory, and TFLOPS of dense bfloat16 matrix products as its maker states them."""

    memory: float
    peak: float


GPUS: dict[str, GPU] = {
    "h200": GPU(141, 989),
    "h100": GPU(80, 989),
    "a100-80gb": GPU(80, 312),
    "a100-40gb": GPU(40, 312),
    "l40s": GPU(48, 362),
    "a6000": GPU(48, 155),
    "rtx5090": GPU(32, 210),
    "rtx5080": GPU(16, 113),
    "rtx4090": GPU(24, 165),
    "rtx3090": GPU(24, 71),
    "l4": GPU(24, 121),
}
