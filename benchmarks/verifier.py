"""The time of the verifier on one CPU thread, and its verdict on drawn truth.

    python benchmarks/verifier.py [--json]

The goals: at most 1 ms per picture, since every preview pays it, and strict on at least 0.97 of drawn pictures. Figures
are medians over the repeats, in processor time, which other jobs on the machine disturb less.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when numpy is imported

import argparse
import json
import statistics
import time

import numpy as np

from progrpo.zoo.shapes.verifier import verify
from progrpo.zoo.shapes.world import examples


def ms_a_picture(batch: int, repeats: int) -> float:
    prompts, pictures = examples("test", batch, seed=0)
    verify(pictures, prompts)  # the first call pays for allocations
    times = []
    for _ in range(repeats):
        start = time.process_time()
        verify(pictures, prompts)
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times) / batch


def measure(repeats: int) -> dict[str, float]:
    result = {f"batch_{batch}_ms_a_picture": ms_a_picture(batch, repeats) for batch in (64, 1024)}
    prompts, pictures = examples("test", 1024, seed=1)
    verdicts = verify(pictures, prompts)
    result["drawn_truth_strict"] = float(np.mean([v.strict for v in verdicts]))
    result["drawn_truth_graded"] = float(np.mean([v.graded for v in verdicts]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    result = measure(options.repeats)
    lines = (f"{name:26s} {value:8.3f}" for name, value in result.items())
    print(json.dumps(result) if options.json else "\n".join(lines))


if __name__ == "__main__":
    main()
