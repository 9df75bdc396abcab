"""The cost of other work on the processors for a run, by how long OpenMP's threads spin at a barrier.

    python benchmarks/busy.py [--spins shipped default 0 1000 5000 20000] [--busy 2] [--iterations 4] [--rounds 2]
                              [--json]

Iterations of the quickstart run alone, and beside `--busy` processes that do nothing but count. The output has the
seconds per iteration, the median over iterations but the first and over rounds, and the ratio of beside to alone.
The scheduler takes a share away in any case: with two threads on two cores beside two others, half of each core, which
makes a ratio of 2.

shipped    the setting of progrpo (progrpo.threads)
default    OpenMP's own
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from progrpo.threads import SPINS

OWN_DEFAULT = (
    "300000"  # rounds, as libgomp's documentation has it where nothing is set and threads have cores of their own
)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run the block beside so many processes that count."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def seconds(spins: str, iterations: int) -> list[float]:
    """The seconds of each iteration but the first."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if spins != "shipped":
        environment["GOMP_SPINCOUNT"] = OWN_DEFAULT if spins == "default" else spins
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "progrpo", "train", "quickstart", "--out", f"{folder}/run"]
        command += [
            "--iterations",
            str(iterations),
            "--audit.every",
            "0",
            "--eval.every",
            "0",
            "--eval.pictures",
            "2",
            "--eval.no-keep-best",
        ]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        records = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in records][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", nargs="+", default=["shipped", "default", "0", "1000", "5000", "20000"])
    parser.add_argument("--busy", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    spent: dict[str, dict[str, list[float]]] = {spins: {"alone": [], "beside": []} for spins in options.spins}
    for _ in range(options.rounds):
        for spins, by_load in spent.items():
            by_load["alone"] += seconds(spins, options.iterations)
            with busy(options.busy):
                by_load["beside"] += seconds(spins, options.iterations)
    medians = {spins: {where: statistics.median(s) for where, s in by_load.items()} for spins, by_load in spent.items()}
    lost = 1 + options.busy / (os.cpu_count() or 1)
    if options.json:
        print(
            json.dumps({"torch": torch.__version__, "shipped": SPINS, "lost_share": lost, "seconds": spent}, indent=1)
        )
        return
    print(f"seconds of an iteration; beside {options.busy} others the lost share is {lost:.2g} x")
    for spins, median in medians.items():
        print(
            f"{spins:>8s}  alone {median['alone']:6.2f}  beside {median['beside']:6.2f}"
            f" ({median['beside'] / median['alone']:.2f} x)"
        )


if __name__ == "__main__":
    main()
