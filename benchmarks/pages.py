"""The pages of many runs: the seconds until the board lists them, and until runs are compared.

    python benchmarks/pages.py [--runs 200] [--iterations 300] [--compared 12] [--out FOLDER] [--json]

It writes run folders as training does, with metrics of the usual size, evaluations and pictures, and removes them
unless `--out` keeps them. The board is a process of its own: its first answer includes the start of Python.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

from progrpo.config import to_dict
from progrpo.pages.compare import compare, comparison_page
from progrpo.recipes import load_recipe
from progrpo.tracking.run_folder import RunFolder

RATES = (3e-4, 1e-3, 3e-3)
EVERY, PICTURES = 10, 12


def write_run(folder: Path, rate: float, seed: int, iterations: int) -> None:
    """A finished run whose reward rises the faster the higher its learning rate is."""
    rng = np.random.default_rng([seed, round(1e6 * rate)])
    run = RunFolder.create(folder)
    config = replace(load_recipe("quickstart"), seed=seed, iterations=iterations)
    run.log_config(to_dict(replace(config, optim=replace(config.optim, lr=rate))))
    gained = 0.3 * (1 - np.exp(-np.arange(1, iterations + 1) * rate * 20))
    lines = []
    for i in range(iterations):
        reward = 0.5 + gained[i] + rng.normal(0, 0.02)
        record: dict[str, Any] = {"iteration": i, "seconds": 2 + rng.random(), "rollout/nfe": 432}
        record |= {"reward/mean": reward, "reward/strict": reward - 0.2, "rollout/diversity": 0.25 - gained[i] / 4}
        record |= {f"filling/{n}": float(rng.random()) for n in range(30)}  # a record of training has some 40 metrics
        if (i + 1) % EVERY == 0:
            noise = rng.normal(0, 0.01)
            record |= {"eval/graded": 0.5 + gained[i] + noise, "eval/strict": 0.3 + gained[i] + noise}
            record |= {"eval/judge": 0.35 + gained[i], "eval/kl": gained[i] ** 2 * (1 + 100 * rate)}
        lines.append(json.dumps(record))
    run.write_text("metrics.jsonl", "\n".join(lines) + "\n")
    for when, level in (("before", 0.5), ("after", 0.5 + gained[-1])):
        write_evaluation(run, when, level, rng)
    figures: Any = {"recipe": "quickstart", "seed": seed, "iterations": iterations, "status": "finished"}
    figures |= {"wall_seconds": 2.6 * iterations, "nfe": 432 * iterations, "device": "cpu, 2 threads", "processes": 1}
    run.summary.write(figures | {"reward_before": 0.5, "reward_after": 0.5 + gained[-1], "accuracy_after": 0.6})


def write_evaluation(run: RunFolder, when: str, level: float, rng: np.random.Generator) -> None:
    graded = np.clip(level + rng.normal(0, 0.15, 128), 0, 1)
    records: Any = [
        {"prompt": f"{i} red squares", "kind": "two", "graded": g, "strict": bool(g > 0.6), "judge": bool(g > 0.5)}
        | {"held_out": {}, "diversity": None}
        for i, g in enumerate(graded)
    ]
    colours = (255 * graded[:PICTURES, None, None, None] * [1.0, 0.6, 0.3]).astype(np.uint8)
    run.write_evaluation(when, records, np.broadcast_to(colours, (PICTURES, 64, 64, 3)).copy())


def write_runs(folder: Path, count: int, iterations: int) -> None:
    """So many runs, of three seeds for each rate; further seeds are copies of these, since pictures take long."""
    for i in range(count):
        rate, seed = RATES[i % len(RATES)], i // len(RATES)
        path, model = (folder / f"rate-{rate:g}-seed-{n}" for n in (seed, seed % 3))
        if seed < 3:
            write_run(path, rate, seed, iterations)
        else:
            shutil.copytree(model, path)
            run = RunFolder(path)
            run.config.write({**run.config.read(), "seed": seed})


def measure(folder: Path, compared: int) -> dict[str, float]:
    """The seconds of the board's answers, from the start of its process, and of a comparison."""
    command = [sys.executable, "-m", "progrpo", "board", str(folder), "--port", "0"]
    start = time.perf_counter()
    board = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert board.stdout is not None
        url = next(word for word in board.stdout.readline().split() if word.startswith("http"))
        seconds = {"board_started": time.perf_counter() - start}
        for name in ("first_list", "second_list"):
            asked = time.perf_counter()
            with urlopen(f"{url}runs.json") as answer:
                listed = json.load(answer)["runs"]
            seconds[name] = time.perf_counter() - asked
        seconds["list_from_start_of_process"] = seconds["board_started"] + seconds["first_list"]
    finally:
        board.terminate()
        board.wait()
    names = [folder / run["name"] for run in listed[:compared]]
    start = time.perf_counter()
    page = comparison_page(compare(names))
    seconds["comparison"] = time.perf_counter() - start
    return {"runs": len(listed), "compared": len(names), "comparison_megabytes": len(page) / 1e6, **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--compared", type=int, default=12)
    parser.add_argument("--out", type=Path, help="an empty folder in which the runs stay")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        write_runs(folder, arguments.runs, arguments.iterations)
        figures = measure(folder, arguments.compared)
    print(
        json.dumps(figures)
        if arguments.json
        else "\n".join(f"{name:>28}  {value:.3f}" for name, value in figures.items())
    )


if __name__ == "__main__":
    main()
