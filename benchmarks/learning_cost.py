"""The cost of learning a pipeline from its own call at load: network calls, rows, decoded pictures and seconds.

`python benchmarks/learning_cost.py` prints them for the tiny pipelines of the tests. The counts are the same for models
of any size.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from progrpo.policies.load import policy_from_pipeline, quiet
from progrpo.policies.settings import ModelSettings


def main() -> None:
    sys.path.append(str(Path(__file__).parents[1]))  # the pipelines are those of the tests
    from tests.support.recorded_pipelines import RECORDED_PIPELINES, build

    quiet()
    torch.set_num_threads(1)
    print("pipeline        calls  rows  decoded  encoded  seconds")
    for name, case in RECORDED_PIPELINES.items():
        pipeline = build(name)
        counts = {"calls": 0, "rows": 0, "decoded": 0, "encoded": 0}
        watch(pipeline, counts)
        size = {"resolution": case.resolution, "frames": case.frames, "max_sequence_length": case.tokens}
        start = time.perf_counter()
        policy_from_pipeline(pipeline, ModelSettings(name, lora_rank=2, **size))  # type: ignore[arg-type]
        took = time.perf_counter() - start
        print(f"{name:14}  {counts['calls']:5}  {counts['rows']:4}  {counts['decoded']:7}", end="")
        print(f"  {counts['encoded']:7}  {took:7.2f}")


def watch(pipeline: Any, counts: dict[str, int]) -> None:
    """Count the calls of the pipeline's networks."""

    def called(module: Any, args: Any, kwargs: Any) -> None:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, list | torch.Tensor))
        counts["calls"] += 1
        counts["rows"] += len(first)

    pipeline.transformer.register_forward_pre_hook(called, with_kwargs=True)
    decode = pipeline.vae.decode

    def decoding(z: Any, *args: Any, **kwargs: Any) -> Any:
        counts["decoded"] += len(z)
        return decode(z, *args, **kwargs)

    pipeline.vae.decode = decoding
    pipeline.text_encoder.register_forward_pre_hook(lambda *_: counts.update(encoded=counts["encoded"] + 1))


if __name__ == "__main__":
    main()
