"""The time of selecting survivors on one CPU thread: `python benchmarks/selection.py [--repeats N] [--json]`.

The goals: 12 of 48 for 1,000 prompts within 20 ms for every selector, and half of 10^6 scores in one group within twice
the time of sorting them. Figures are medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from progrpo.rollout.prune import ovf
from progrpo.rollout.settings import SELECTORS, PlanSettings


def median_ms(work: Callable[[], object], repeats: int) -> float:
    work()  # the first call pays for allocations
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def measure(repeats: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    scores_PG = torch.randn(1000, 48, generator=generator, dtype=torch.float64)
    present_PG, seeds_P = torch.ones_like(scores_PG, dtype=torch.bool), torch.arange(1000)
    result = {
        f"{name}_12_of_48_1000_prompts_ms": median_ms(
            partial(PlanSettings(selector=name).load_selector(), scores_PG, 12, present_PG, seeds_P), repeats
        )
        for name in SELECTORS
    }
    for dtype in (torch.float32, torch.float64):
        row = torch.randn(1, 1_000_000, generator=generator, dtype=dtype)
        name = f"million_{dtype}".replace("torch.", "")
        result[f"{name}_sort_ms"] = median_ms(partial(torch.sort, row), repeats)
        present, seed = torch.ones_like(row, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
        result[f"{name}_subset_ms"] = median_ms(partial(ovf, row, 500_000, present, seed), repeats)
        result[f"{name}_ratio"] = result[f"{name}_subset_ms"] / result[f"{name}_sort_ms"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.repeats)
    lines = (f"{name:40s} {value:10.2f}" for name, value in result.items())
    print(json.dumps(result) if options.json else "\n".join(lines))


if __name__ == "__main__":
    main()
