"""The figures of a built-in model's recipe before and after training, for several seeds.

    python benchmarks/quickstart.py [--recipe quickstart] [--seeds 0 1 2] [--runs runs/RECIPE-seeds] \
        [--out docs/results/RECIPE.json]

A seed whose run is there and finished, with the recipe as it is now, is not run again. `--page` runs nothing: it writes
the table of docs/results/quickstart.md from `--out`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from progrpo.config import Config, to_dict
from progrpo.durable import write_text
from progrpo.recipes import load_recipe
from progrpo.tracking.records import iteration_of
from progrpo.tracking.run_folder import RunFolder
from progrpo.training.entry import train_run

FIGURES = ("accuracy", "judge", "reward", "diversity")
PAGE = Path("docs/results/quickstart.md")
BEGIN, END = "<!-- quickstart:begin -->\n", "<!-- quickstart:end -->"


def began(run: RunFolder, config: Config) -> bool:
    """Whether the folder holds this run. The dtype may differ, since its machine chose it."""
    if not (run.path / "config.json").exists():
        return False
    was = json.loads((run.path / "config.json").read_text())
    was["model"]["dtype"] = config.model.dtype
    return bool(was == json.loads(json.dumps(to_dict(config))))


def finished(run: RunFolder, config: Config) -> bool:
    """Whether the folder holds this run, finished."""
    return began(run, config) and run.summary.read().get("status") == "finished"


def result(run: RunFolder) -> dict[str, Any]:
    summary: Mapping[str, object] = run.summary.read()
    kept = ("seed", "iterations", "best_iterations", "wall_seconds", "nfe", "nfe_ratio_to_none", "device", "versions")
    curve = [
        {"iteration": iteration_of(r) + 1, **{name: r[f"eval/{name}"] for name in ("strict", "graded", "judge")}}
        for r in run.metrics.read()
        if "eval/strict" in r
    ]
    figures = {f"{name}_{when}": summary[f"{name}_{when}"] for name in FIGURES for when in ("before", "after")}
    kinds = {f"accuracy_by_kind_{when}": summary[f"accuracy_by_kind_{when}"] for when in ("before", "after")}
    dtype = json.loads((run.path / "config.json").read_text())["model"]["dtype"]
    return {**{k: summary[k] for k in kept}, "dtype": dtype, **figures, **kinds, "validation": curve}


def table(results: list[dict[str, Any]]) -> str:
    """The table of the page: a row per seed, and their mean."""
    lines = [
        "| seed | strict accuracy | change | second judge | diversity |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(_row(str(r["seed"]), r))
    keys = [f"{name}_{when}" for name in FIGURES for when in ("before", "after")]
    lines.append(_row("mean", {k: mean(r[k] for r in results) for k in keys}))
    return "\n".join(lines) + "\n"


def _row(name: str, r: dict[str, Any]) -> str:
    share = {k: f"{100 * r[k]:.1f}" for k in ("accuracy_before", "accuracy_after", "judge_before", "judge_after")}
    return (
        f"| {name} | {share['accuracy_before']} → **{share['accuracy_after']} %** |"
        f" {100 * (r['accuracy_after'] - r['accuracy_before']):+.1f} points |"
        f" {share['judge_before']} → {share['judge_after']} % |"
        f" {r['diversity_after'] / r['diversity_before']:.0%} of the base's |"
    )


def with_table(page: str, results: list[dict[str, Any]]) -> str:
    """The page with its table made from these results."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}{table(results)}{END}", page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=("quickstart", "shapes-diffusion"), default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", action="store_true", help="write the table of docs/results/quickstart.md from --out")
    arguments = parser.parse_args()
    runs = arguments.runs or Path(f"runs/{arguments.recipe}-seeds")
    out = arguments.out or Path(f"docs/results/{arguments.recipe}.json")
    if arguments.page:
        write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8"), json.loads(out.read_text())))
        return
    results = []
    for seed in arguments.seeds:
        config, run = replace(load_recipe(arguments.recipe), seed=seed), RunFolder(runs / f"seed{seed}")
        if not finished(run, config):
            train_run(config, run.path, overwrite=True)
        results.append(result(run))
    write_text(out, json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
