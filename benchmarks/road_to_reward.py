"""The road to a reward on real pictures: plain GRPO, the paper's plans, and their rivals, to equal reward.

    python benchmarks/road_to_reward.py [--reward shapes_match] [--arms NAME ...] [--seeds 0 1 2] [--minutes 60]
    python benchmarks/road_to_reward.py --table

Arms differ from plain GRPO (groups of 24, ten SDE steps of which nine are trained, as Flow-GRPO and DanceGRPO have it)
by the fields in ARMS. Each runs for the work of `LENGTH` iterations of plain GRPO, counted as network calls and trained
steps by the unit costs that the machine has for them (`TRAINED`), so that its length is fixed before it begins. Runs in
`--out` are kept, seed by seed, so that the same command goes on.

The table says what it took to gain 25, 50, 75 and 100 % of what plain GRPO gains in the end (mean over its seeds):
seconds of one core, network calls, trained steps. A curve is smoothed over three evaluations.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from search import Changes, changed, config_of, run

from progrpo.config import Config, resolve_plan, trained_items
from progrpo.durable import write_text

TRAINED = 3.0  # network calls that a trained step takes: forward, and twice that backward
LENGTH = 60  # iterations of plain GRPO
PICTURES, EVALUATIONS = 128, 15
PROMPTS, GROUP = 6, 24

PLAIN: Changes = {
    "iterations": 1000,
    "model": {"weights": "full", "dtype": "auto"},
    "prompts": {"per_iteration": PROMPTS},
    "sampling": {"num_inference_steps": 10, "microbatch": 72},
    "plan": {"preset": "custom", "group_size": GROUP},
    "optim": {"lr": 2e-4, "decay": 0.0, "max_grad_norm": 1.0, "microbatch": 72},
    "eval": {"rewards": [{"name": "shapes_strict"}, {"name": "shapes_taste"}]},
}
HALF: Changes = {"plan": {"group_size": 24, "final_keep": 12}}
ARMS: dict[str, Changes] = {
    "plain 24": PLAIN,
    "plain 12": changed(PLAIN, {"plan": {"group_size": 12}}),
    "plain 16": changed(PLAIN, {"plan": {"group_size": 16}}),
    "flash": changed(PLAIN, {"plan": {"preset": "flash", "group_size": 24}}),
    "standard": changed(PLAIN, {"plan": {"preset": "standard", "group_size": 24}}),
    "posthoc 12": changed(PLAIN, HALF),
    "uniform 12": changed(PLAIN, changed(HALF, {"plan": {"selector": "uniform"}})),
    "furthest 12, group": changed(
        PLAIN, changed(HALF, {"plan": {"selector": "furthest"}, "objective": {"baseline": "group"}})
    ),
    "window 3": changed(PLAIN, {"sampling": {"sde_window": "first"}}),
    "window 3, 12 after 3": changed(PLAIN, {"sampling": {"sde_window": "first"}, "plan": {"prune": [[3, 12]]}}),
    "dgpo 12": changed(
        PLAIN,
        {
            "objective": {"name": "dgpo", "dgpo": {"draws": 2, "kl_beta": 0.0}},
            "sampling": {"num_inference_steps": 8},
            "plan": {"group_size": 12},
            "optim": {"lr": 1e-4},
        },
    ),
    "nft 12": changed(
        PLAIN,
        {
            "objective": {"name": "nft", "nft": {"draws": 2}},
            "sampling": {"num_inference_steps": 8},
            "plan": {"group_size": 12},
            "optim": {"lr": 1e-4},
        },
    ),
}


def work_of(config: Config) -> float:
    """The network calls of an iteration, with those of training."""
    plan = resolve_plan(config)
    cost = plan.predict(config.sampling.num_inference_steps, trained_items(config), config.sampling.in_pairs)
    extra = 1 + config.objective.loss.extra_forwards / TRAINED
    return config.prompts.per_iteration * (cost.nfe + TRAINED * extra * cost.trained_steps)


def length_of(config: Config, plain: Config) -> int:
    """The iterations that are as much work as `LENGTH` of plain GRPO."""
    return round(LENGTH * work_of(plain) / work_of(config))


def smoothed(values: Sequence[float]) -> list[float]:
    return [mean(values[max(0, i - 1) : i + 2]) for i in range(len(values))]


def arrival(curve: Sequence[dict[str, Any]], level: float, unit: str) -> float | None:
    """The amount of `unit` at which the smoothed curve reaches a level, interpolated; None where it does not."""
    values = smoothed([point["graded"] for point in curve])
    for (a, low), (b, high) in pairwise(zip(curve, values, strict=True)):
        if high >= level:
            share = (level - low) / (high - low) if high > low else 1.0
            return float(a[unit] + max(0.0, share) * (b[unit] - a[unit]))
    return None


def table(results: Sequence[dict[str, Any]]) -> str:
    """A row per arm, over the work of plain GRPO to the same level."""
    plain = [r["curve"] for r in results if r["arm"] == "plain 24"]
    base = mean(curve[0]["graded"] for curve in plain)
    final = mean(mean(point["graded"] for point in curve[-3:]) for curve in plain)
    lines = [
        f"Plain GRPO: {base:.3f} -> {final:.3f}, {len(plain)} seeds.",
        "",
        "| arm | seeds | final reward | strict | judge | core seconds to 25 / 50 / 75 / 100 % |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        curves = [r["curve"] for r in results if r["arm"] == arm]
        if not curves:
            continue
        ends = [mean(point["graded"] for point in curve[-3:]) for curve in curves]
        spread = f" ± {stdev(ends):.3f}" if len(ends) > 1 else ""
        times = []
        for share in (0.25, 0.5, 0.75, 1.0):
            found = [arrival(curve, base + share * (final - base), "cpu_seconds") for curve in curves]
            there = [value for value in found if value is not None]
            times.append(
                f"{mean(there):.0f}" + ("" if len(there) == len(found) else f" ({len(there)})") if there else "-"
            )
        strict, judge = (mean(c[-1][name] for c in curves) for name in ("shapes_strict", "judge"))
        lines.append(
            f"| {arm} | {len(curves)} | {mean(ends):.3f}{spread} | {strict:.3f} | {judge:.3f} | {' / '.join(times)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", default="shapes_match")
    parser.add_argument("--model", choices=("shapes-flow", "shapes-diffusion"), default="shapes-flow")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=60, help="no run begins after so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/road_to_reward.json"))
    parser.add_argument("--table", action="store_true", help="print what is there and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    if arguments.table:
        print(table(results))
        return
    until = time.monotonic() + 60 * arguments.minutes
    task: Changes = {"reward": {"terms": [{"name": arguments.reward}]}, "model": {"path": arguments.model}}
    for seed in arguments.seeds:
        plain = config_of(changed(PLAIN, task), seed)
        for arm in arguments.arms:
            key = {"model": arguments.model, "reward": arguments.reward, "arm": arm, "seed": seed}
            if any(key.items() <= r.items() for r in results) or time.monotonic() > until:
                continue
            config = config_of(changed(ARMS[arm], task), seed)
            iterations = length_of(config, plain)
            config = config_of(changed(ARMS[arm], {**task, "iterations": iterations}), seed)
            print(f"{arm}, seed {seed}: {iterations} iterations", flush=True)
            curve = run(config, float("inf"), max(1, round(iterations / EVALUATIONS)), PICTURES, by="iterations")
            results = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
            versions = {"threads": arguments.threads, "torch": torch.__version__}
            results.append({**key, **versions, "iterations": iterations, "curve": curve})
            write_text(arguments.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
