"""From pairs to an aligned model with a hidden taste: how many pairs, how many flipped labels, and by which road.

    python benchmarks/preferences.py [--arms NAME ...] [--sizes N ...] [--flips SHARE ...] [--seeds N ...] [--minutes N]
    python benchmarks/preferences.py --page                 # the tables of the page from --out; trains nothing

The taste (`shapes_taste`: large, centred, warm) labels pairs of pictures that the base model drew for one prompt, and a
share of the labels is flipped. No arm but `true reward` sees the taste again. It judges held-out pictures before, on
the way and after. Every arm has the same number of pictures trained on, in updates of the same size and number; arms
that learn from recorded pairs sample nothing. Finished runs in `--out` are kept, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image
from search import Changes, changed, config_of, run

from progrpo.durable import write_text
from progrpo.preferences.pairs import Pair, read_pairs, write_pairs
from progrpo.training.sample import sample_pictures
from progrpo.training.trained_model import ModelChoice
from progrpo.types import Prompt
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.taste import taste

SIZES, FLIPS = (50, 200, 1000, 5000), (0.0, 0.1, 0.2, 0.4)
LENGTH, EVALUATIONS, PICTURES = 60, 3, 128
POOL = 5000
PENALTY = 1.0
"""The weight of the ensemble's variance in the penalised reward, whose training scores have a std of 1."""

ONLINE: Changes = {
    "iterations": LENGTH,
    "model": {"weights": "full", "dtype": "float32"},
    "prompts": {"per_iteration": 1},
    "sampling": {"num_inference_steps": 6, "microbatch": 24},
    "plan": {"preset": "custom", "group_size": 12},
    "objective": {"name": "dgpo", "dgpo": {"draws": 2, "kl_beta": 0.01}},
    "optim": {"lr": 2e-4, "decay": 1.0, "max_grad_norm": 0.1, "microbatch": 48, "ema_decay": 0.9},
    "eval": {"num_inference_steps": 6, "rewards": [{"name": "shapes_taste"}, {"name": "shapes_strict"}]},
}
# at the rate of the other arms DPO has hardly moved after as many updates
TWICE: Changes = {"optim": {"lr": 4e-4}}
OFFLINE = changed(changed(ONLINE, TWICE), {"prompts": {"per_iteration": 6}})
TRUE, TRUE_TWICE = "true reward", "true reward, twice the rate"


@dataclass(frozen=True)
class Case:
    """A set of pairs: their number, the share of flipped labels, and the seed of both and of training."""

    size: int
    flips: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.size}-{self.flips:g}-{self.seed}"


def pool(folder: Path) -> Path:
    """The pairs file of the pool: two pictures of the base model for each of `POOL` prompts, without flips."""
    file = folder / "pool.jsonl"
    if file.exists():
        return file
    texts = world.sample_prompts("train", POOL, seed=0)
    pairs = []
    for first in range(0, POOL, 500):
        prompts = texts[first : first + 500]
        part = folder / f"pictures-{first:04d}"
        steps = {"num_inference_steps": 6, "seed": first}
        files = sorted(part.glob("*.png")) or sample_pictures(ModelChoice("shapes-flow"), prompts, part, 2, steps)
        tastes = taste(np.stack([np.asarray(Image.open(path)) for path in files]))
        for prompt, a, b, x, y in zip(prompts, files[::2], files[1::2], tastes[::2], tastes[1::2], strict=True):
            pairs.append(Pair(Prompt(prompt.text), a, b, float(x > y) if x != y else 0.5))
    write_pairs(file, pairs)
    return file


def pairs_of(folder: Path, case: Case) -> Path:
    """The pairs file of a case: some pairs of the pool, with flipped labels."""
    file = folder / f"pairs-{case.name}.jsonl"
    if not file.exists():
        rng = np.random.default_rng([case.seed, 1])
        whole = read_pairs(pool(folder))
        order = rng.permutation(len(whole))[: case.size]
        flipped = np.random.default_rng([case.seed, 2]).random(len(whole)) < case.flips
        chosen = [whole[i] for i in order]
        write_pairs(
            file,
            [
                Pair(pair.prompt, pair.image_a, pair.image_b, 1 - pair.preference if flipped[i] else pair.preference)
                for i, pair in zip(order, chosen, strict=True)
            ],
        )
    return file


def model_of(folder: Path, case: Case) -> Path:
    """The reward model of a case."""
    out = folder / f"model-{case.name}"
    if not out.exists():
        train_reward_model(pairs_of(folder, case), out, case.seed)
    return out


def train_reward_model(pairs: Path, out: Path, seed: int) -> None:
    from progrpo.cli.preference_commands import RewardModelTrain

    RewardModelTrain(pairs=pairs, out=out, backbone="shapes", held_out="0", seed=seed).run()


def _term(name: str, weight: float = 1.0, model: Path | None = None) -> dict[str, Any]:
    return {"name": name, "weight": weight, **({} if model is None else {"model": str(model)})}


def changes_of(arm: str, folder: Path, case: Case) -> Changes:
    """The settings of an arm."""
    if arm in (TRUE, TRUE_TWICE):
        true = changed(ONLINE, {"reward": {"terms": [_term("shapes_taste")]}})
        return changed(true, TWICE) if arm == TRUE_TWICE else true
    if arm.endswith("offline"):
        return changed(OFFLINE, {**OBJECTIVES[arm], "prompts": {"pairs": str(pairs_of(folder, case))}})
    model = model_of(folder, case)
    scores, variance = _term("reward_model", 1.0, model), _term("reward_model_variance", -PENALTY, model)
    rewarded = changed(ONLINE, {"reward": {"terms": [scores]}})
    if arm == "reward model, twice the rate":
        return changed(rewarded, TWICE)
    if arm == "penalised":
        return changed(rewarded, {"reward": {"terms": [scores, variance]}})
    if arm == "noise-aware":
        silent = {"reward": {"terms": [scores, {**variance, "weight": 0.0}], "noise": variance["name"]}}
        return changed(rewarded, {**silent, "plan": {"group_size": 24, "final_keep": 12}})
    if arm == "half of 24":
        return changed(rewarded, {"plan": {"group_size": 24, "final_keep": 12}})
    if arm == "dpo online":
        # as many sampled as one group of the others, a third of them trained on
        few = {"prompts": {"per_iteration": 2}, "plan": {"group_size": 6, "final_keep": 2}}
        return changed(changed(rewarded, TWICE), {**OBJECTIVES[arm], **few})
    return rewarded


# the default beta of 1000 holds this small model at its base
DPO: Changes = {"objective": {"name": "dpo", "dpo": {"draws": 2, "beta": 20.0}}}
OBJECTIVES: dict[str, Changes] = {
    "dpo offline": DPO,
    "sft offline": {"objective": {"name": "sft", "sft": {"draws": 2}}},
    "dgpo offline": {"objective": {"name": "dgpo"}},
    "dpo online": DPO,
}
REWARDED = ("reward model", "penalised", "half of 24", "noise-aware")
ARMS = (TRUE, TRUE_TWICE, *REWARDED, *OBJECTIVES, "reward model, twice the rate")


def queue(arms: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, Case]]:
    """The runs of these arms: the cells that all arms have, the other cells of the reward model, and then of all."""
    grid = list(itertools.product(SIZES, FLIPS))
    first = ((200, 0.0), (200, 0.2), (1000, 0.0), (1000, 0.2))
    parts = (
        [(arm, 0, 0.0) for arm in ARMS[:2]],
        [(arm, *cell) for cell in first[:2] for arm in ARMS[2:]],
        [("reward model", *cell) for cell in grid],
        [(arm, *cell) for cell in first for arm in ARMS[2:]],
        [(arm, *cell) for cell in grid for arm in ARMS[2:]],
    )
    runs = dict.fromkeys(
        (arm, Case(size, flips, seed)) for part in parts for arm, size, flips in part for seed in seeds
    )
    yield from (run for run in runs if run[0] in arms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--sizes", nargs="*", type=int, default=[0, *SIZES], help="numbers of pairs")
    parser.add_argument("--flips", nargs="*", type=float, default=list(FLIPS), help="shares of flipped labels")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--folder", type=Path, default=Path("runs/preferences-study"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/preferences.json"))
    parser.add_argument("--page", action="store_true", help="write the tables of the page beside --out")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else []
    if args.page:
        write_page(args.out.with_suffix(".md"), table(results))
        return
    torch.set_num_threads(1)
    started = time.monotonic()
    done = {(r["arm"], r["size"], r["flips"], r["seed"]) for r in results}
    for arm, case in queue(args.arms, args.seeds):
        if case.size not in args.sizes or case.flips not in args.flips:
            continue
        if (arm, case.size, case.flips, case.seed) in done or time.monotonic() - started > 60 * args.minutes:
            continue
        config = config_of(changes_of(arm, args.folder, case), case.seed)
        curve = run(config, 1e9, LENGTH / EVALUATIONS, PICTURES, by="iterations")
        results.append({"arm": arm, "size": case.size, "flips": case.flips, "seed": case.seed, "curve": curve})
        write_text(args.out, json.dumps(results) + "\n")
        print(f"{arm}, {case.name}: taste {_taste(curve[0]):.3f} -> {_taste(curve[-1]):.3f}", flush=True)


def write_page(page: Path, tables: str) -> None:
    """Write the tables between the page's two marks."""
    before, begin, rest = page.read_text(encoding="utf-8").partition("<!-- tables:begin -->\n")
    _, end, after = rest.partition("<!-- tables:end -->")
    write_text(page, f"{before}{begin}{tables}\n{end}{after}")
    print(page)


def _taste(point: dict[str, Any]) -> float:
    value: float = point["shapes_taste"]
    return value


def table(results: Sequence[dict[str, Any]]) -> str:
    """The gain in the hidden taste as a share of the gain by the true reward at the same rate; figures of each arm."""
    true = {arm: mean(_gain(r) for r in _of(results, arm)) for arm in ARMS[:2] if _of(results, arm)}

    def share(arm: str, size: int, flips: float) -> str:
        own = [r for r in _of(results, arm) if (r["size"], r["flips"]) == (size, flips)]
        gains = [_gain(r) / true[TRUE_TWICE if _is_twice(arm) else TRUE] for r in own]
        spread = f" ± {stdev(gains):.2f}" if len(gains) > 1 else ""
        few = f" ({len(gains)} of 3)" if 0 < len(gains) < 3 else ""
        return f"{mean(gains):.2f}{spread}{few}" if gains else ""

    lines = []
    for size in SIZES:
        lines += [f"{size:,} pairs:", "", *_head("arm", [f"{100 * flips:g} % flipped" for flips in FLIPS])]
        arms = [arm for arm in ARMS[2:] if any(r["size"] == size for r in _of(results, arm))]
        lines += [*(_row(arm, [share(arm, size, flips) for flips in FLIPS]) for arm in arms), ""]
    lines += ["The ends of the runs with 200 clean pairs, and of the true reward:", ""]
    lines += _head("arm", ["taste", "strict", "second judge", "diversity", "core seconds"])
    base = [r["curve"][0] for r in _of(results, TRUE)]
    lines.append(_row("the base", [*_ends(base), ""]))
    for arm in ARMS:
        ends = [r["curve"][-1] for r in _of(results, arm) if (r["size"], r["flips"]) in ((0, 0.0), (200, 0.0))]
        if ends:
            lines.append(_row(arm, [*_ends(ends), f"{mean(end['cpu_seconds'] for end in ends):.0f}"]))
    return "\n".join(lines)


def _head(first: str, others: Sequence[str]) -> list[str]:
    return [_row(first, others), "|---" * (1 + len(others)) + "|"]


def _row(first: str, others: Sequence[str]) -> str:
    return f"| {' | '.join([first, *others])} |"


def _is_twice(arm: str) -> bool:
    """Whether an arm is trained at twice the rate."""
    return arm in OBJECTIVES or arm.endswith("twice the rate")


def _ends(points: Sequence[dict[str, Any]]) -> list[str]:
    names = ("shapes_taste", "shapes_strict", "judge", "diversity")
    return [f"{mean(point[name] for point in points):.3f}" for name in names]


def _of(results: Sequence[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    return [r for r in results if r["arm"] == arm]


def _gain(result: dict[str, Any]) -> float:
    return _taste(result["curve"][-1]) - _taste(result["curve"][0])


if __name__ == "__main__":
    main()
