"""The figures of `words-flow` before and after its recipe, for several seeds.

    python benchmarks/words.py [--seeds 0 1 2] [--runs runs/words-seeds] [--out docs/results/words_flow.json]

A seed whose run is there and finished, with the recipe as it is now, is not run again; one that was stopped goes on.
`--page` runs nothing: it writes the tables of docs/results/words_flow.md from `--out`.
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

from quickstart import began, finished

from progrpo.durable import write_text
from progrpo.recipes import load_recipe
from progrpo.tracking.records import iteration_of
from progrpo.tracking.run_folder import RunFolder
from progrpo.training import checkpoints
from progrpo.training.entry import resume_run, train_run

PAGE = Path("docs/results/words_flow.md")
FIGURES = ("accuracy", "reward", "ocr", "diversity")


def result(run: RunFolder) -> dict[str, Any]:
    """The figures of a finished run."""
    summary = run.summary.read()
    kept = ("seed", "iterations", "best_iterations", "wall_seconds", "nfe", "device", "versions")
    by_name: Mapping[str, object] = summary
    figures = {name: by_name[name] for name in kept}
    for when, held_out in (("before", summary["held_out_before"]), ("after", summary["held_out_after"])):
        figures |= {f"{name}_{when}": by_name[f"{name}_{when}"] for name in ("accuracy", "reward", "diversity")}
        figures[f"ocr_{when}"] = held_out["ocr"]
        figures[f"by_kind_{when}"] = by_name[f"accuracy_by_kind_{when}"]
    figures["dtype"] = json.loads((run.path / "config.json").read_text())["model"]["dtype"]
    figures["validation"] = [
        {"iteration": iteration_of(r) + 1, "exact": r["eval/strict"], "reward": r["eval/graded"]}
        for r in run.metrics.read()
        if "eval/strict" in r
    ]
    return figures


def tables(results: list[dict[str, Any]]) -> dict[str, str]:
    """The tables of the page by name: a row per seed and their mean, the kinds, and the curves."""
    means = {k: mean(r[k] for r in results) for k in (f"{f}_{when}" for f in FIGURES for when in ("before", "after"))}
    rows = ["| seed | exact | change | reward `ocr_line` | reward `ocr` | diversity |", "|---|---|---|---|---|---|"]
    rows += [_row(str(r["seed"]), r) for r in results] + [_row("mean", means)]
    names = list(results[0]["by_kind_before"])
    kinds = [f"| exact | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for title, when in (("before", "before"), ("after, mean of seeds", "after")):
        shares = [mean(r[f"by_kind_{when}"][name] for r in results) for name in names]
        kinds.append(f"| {title} | {' | '.join(f'{share:.2f}' for share in shares)} |")
    at = [point["iteration"] for point in results[0]["validation"]]
    curves = [f"| iterations | {' | '.join(map(str, at))} |", "|---" * (len(at) + 1) + "|"]
    for r in results:
        shares = [f"{point['exact']:.3f}" for point in r["validation"]]
        curves.append(f"| seed {r['seed']} | {' | '.join(shares)} |")
    return {name: "\n".join(lines) + "\n" for name, lines in (("result", rows), ("kinds", kinds), ("curves", curves))}


def _row(name: str, r: dict[str, Any]) -> str:
    return (
        f"| {name} | {100 * r['accuracy_before']:.1f} → **{100 * r['accuracy_after']:.1f} %** |"
        f" {100 * (r['accuracy_after'] - r['accuracy_before']):+.1f} points |"
        f" {r['reward_before']:.3f} → {r['reward_after']:.3f} | {r['ocr_before']:.3f} → {r['ocr_after']:.3f} |"
        f" {r['diversity_after'] / r['diversity_before']:.0%} of the base's |"
    )


def with_tables(page: str, results: list[dict[str, Any]]) -> str:
    """The page with its tables made from these results."""
    for name, table in tables(results).items():
        page = _with_table(page, f"<!-- {name}:begin -->\n", table, f"<!-- {name}:end -->")
    return page


def _with_table(page: str, begin: str, table: str, end: str) -> str:
    return re.sub(f"{begin}.*?{end}", lambda _: begin + table + end, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/words-seeds"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/words_flow.json"))
    parser.add_argument("--page", action="store_true", help="write the tables of the page from --out, and run nothing")
    arguments = parser.parse_args()
    if arguments.page:
        write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), json.loads(arguments.out.read_text())))
        return
    results = []
    for seed in arguments.seeds:
        config, run = replace(load_recipe("words-flow"), seed=seed), RunFolder(arguments.runs / f"seed{seed}")
        if not finished(run, config):
            if began(run, config) and checkpoints.saved(run.path):
                resume_run(run.path)
            else:
                train_run(config, run.path, overwrite=True)
        results.append(result(run))
        write_text(arguments.out, json.dumps(results, indent=1) + "\n")
    print("\n".join(tables(results).values()))


if __name__ == "__main__":
    main()
