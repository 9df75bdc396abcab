"""The seconds that the studio's trials take, without the browser: a pair of pictures, films, and another plan.

python benchmarks/studio.py RUN [--repeats 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from progrpo.recipes import load_recipe
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.studio.trial import Studio, Weights, trusted_config
from progrpo.training.entry import train_run


def seconds(action: Callable[[int], object], repeats: int) -> float:
    """The median over seeds."""
    taken = []
    for seed in range(repeats):
        start = time.perf_counter()
        action(seed)
        taken.append(time.perf_counter() - start)
    return median(taken)


def measure(run: Path, repeats: int) -> dict[str, float]:
    studio = Studio(run, trusted_config(run, ()))
    text, weights = studio.examples[0], Weights(studio.model.names[0], 1.0)

    def pair(seed: int) -> None:
        for strength in (0.0, 1.0):
            settings = replace(studio.config.eval, seed=seed)
            studio.draw(text, replace(weights, strength=strength), settings)

    def film(size: int) -> Callable[[int], object]:
        return lambda seed: studio.outcome(text, weights, seed, Plan(size), "ovf")

    def another_plan(keep: int) -> object:
        """For the group that was sampled last."""
        return studio.outcome(text, weights, repeats - 1, Plan(24, (PrunePoint(2, keep + 6),)), "ovf")

    pair(repeats)  # the first call of a network takes longer
    return {
        "pair": seconds(pair, repeats),
        "film of 12": seconds(film(12), repeats),
        "film of 24": seconds(film(24), repeats),
        "another plan": seconds(another_plan, repeats),
    }


def short_run(folder: Path) -> Path:
    recipe = load_recipe("quickstart")
    evaluation = replace(recipe.eval, pictures=12, every=1)
    return train_run(replace(recipe, iterations=1, eval=evaluation), folder).path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        measured = measure(arguments.run or short_run(Path(folder) / "run"), arguments.repeats)
    print(json.dumps(measured) if arguments.json else "\n".join(f"{k:>14} {v:6.2f} s" for k, v in measured.items()))


if __name__ == "__main__":
    main()
