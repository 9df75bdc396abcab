"""What a recipe for a built-in model teaches: the quickstart, or another, for several seeds, with each figure before and after.

    python benchmarks/quickstart.py [--recipe quickstart] [--seeds 0 1 2] [--runs runs/RECIPE-seeds] [--out docs/results/RECIPE.json]

A seed whose run is there and finished, with the recipe as it is now, is not run again. `--readme` then writes README's table
of the quickstart anew from `--out`, and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from progrpo.config import Config, to_dict
from progrpo.durable import write_text
from progrpo.recipes import load_recipe
from progrpo.tracking.run_folder import RunFolder
from progrpo.training.entry import train_run

FIGURES = ("accuracy", "judge", "reward", "diversity")
README = Path("README.md")
BEGIN, END = "<!-- quickstart:begin -->\n", "<!-- quickstart:end -->"


def finished(run: RunFolder, config: Config) -> bool:
    """Whether the folder holds this run, whole; the dtype was chosen by its machine."""
    if not (run.path / "config.json").exists():
        return False
    was = json.loads((run.path / "config.json").read_text())
    was["model"]["dtype"] = config.model.dtype
    return bool(was == json.loads(json.dumps(to_dict(config))) and run.read_summary().get("status") == "finished")


def result(run: RunFolder) -> dict[str, Any]:
    summary = run.read_summary()
    kept = ("seed", "iterations", "best_iterations", "wall_seconds", "nfe", "nfe_ratio_to_none", "device", "versions")
    curve = [
        {"iteration": r["iteration"] + 1, **{name: r[f"eval/{name}"] for name in ("strict", "graded", "judge")}}
        for r in run.read_metrics()
        if "eval/strict" in r
    ]
    figures = {f"{name}_{when}": summary[f"{name}_{when}"] for name in FIGURES for when in ("before", "after")}
    kinds = {f"accuracy_by_kind_{when}": summary[f"accuracy_by_kind_{when}"] for when in ("before", "after")}
    dtype = json.loads((run.path / "config.json").read_text())["model"]["dtype"]
    return {**{k: summary[k] for k in kept}, "dtype": dtype, **figures, **kinds, "validation": curve}


def table(results: list[dict[str, Any]]) -> str:
    """README's: a row a seed, and their mean."""
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


def with_table(readme: str, results: list[dict[str, Any]]) -> str:
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}{table(results)}{END}", readme, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=("quickstart", "shapes-diffusion"), default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--readme", action="store_true", help="write README's table from what is there")
    wanted = parser.parse_args()
    runs = wanted.runs or Path(f"runs/{wanted.recipe}-seeds")
    out = wanted.out or Path(f"docs/results/{wanted.recipe}.json")
    if wanted.readme:
        write_text(README, with_table(README.read_text(encoding="utf-8"), json.loads(out.read_text())))
        return
    results = []
    for seed in wanted.seeds:
        config, run = replace(load_recipe(wanted.recipe), seed=seed), RunFolder(runs / f"seed{seed}")
        if not finished(run, config):
            train_run(config, run.path, overwrite=True)
        results.append(result(run))
    write_text(out, json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
