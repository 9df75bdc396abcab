"""The road to a reward on real pictures: objectives and plans at equal work, to equal reward.

    python benchmarks/road_to_reward.py [--study dgpo] [--reward shapes_match] [--arms NAME ...] [--minutes 60]
    python benchmarks/road_to_reward.py --study grpo --arms "plain 12" --seeds 0 --lr 1e-4
    python benchmarks/road_to_reward.py --reward flipped_reward:FlippedStrict
    python benchmarks/road_to_reward.py --study grpo --table [--picture docs/images/road_to_reward_grpo.png]
    python benchmarks/road_to_reward.py --table --compare "dgpo, KL 0.01, 6 of 12 after 4" "dgpo, KL 0.01, plain 6"

The study `dgpo` has arms under DGPO with six ODE steps and two draws a picture, beside GRPO with ten SDE steps of which
nine are trained, as Flow-GRPO and DanceGRPO have it. All arms of the study `grpo` are GRPO with six SDE steps of which
five are trained. Each arm runs for the work of a fixed number of iterations of its study's reference, counted as
network calls and trained steps by the unit costs that the machine has for them (`TRAINED`), so that its length is fixed
before it begins. Learning rates fall to zero over that length. Runs in `--out` are kept, seed by seed, so that the same
command goes on; runs at another `--lr` are kept beside them. The table has a row for each rate. The reference, the
picture and `--compare` have the rate with the most seeds, of equals the one that ends highest, and `--compare` with
`--lr` that rate.

The table says what it took to gain 50, 75 and 100 % of what the reference gains in the end (mean over its seeds), in
seconds of one core: the mean over the seeds that gain it; where the reference has no runs, of the first arm that has.
Curves are smoothed over three evaluations.
`flipped_reward:FlippedStrict` is the strict verdict of which a fifth is wrong; its runs are measured by the right
verdict.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from charts import COLOURS, Figure, add_legend, drawn, save
from curves import Curve, reached_at, smoothed
from search import Changes, changed, config_of, run

from progrpo.config import Config, resolve_plan, trained_items
from progrpo.durable import write_text
from progrpo.rollout.plan import Plan, PrunePoint

TRAINED = 3.0  # network calls that a trained step takes: forward, and twice that backward
PICTURES, EVALUATIONS = 256, 8
PROMPTS, GROUP = 6, 24
MEASURES = {"flipped_reward:FlippedStrict": "shapes_strict"}
"""The reward that measures a run with this one; without an entry it is the same."""
AXES = {"shapes_strict": "strict accuracy"}
"""What a picture calls a field of the curves, if not by its name."""

PLAIN: Changes = {
    "model": {"weights": "full", "dtype": "auto"},
    "prompts": {"per_iteration": PROMPTS},
    "sampling": {"num_inference_steps": 10, "microbatch": 72},
    "plan": {"preset": "custom", "group_size": GROUP},
    "optim": {"lr": 1e-4, "decay": 1.0, "max_grad_norm": 0.1, "microbatch": 72, "ema_decay": 0.9},
    "eval": {"rewards": [{"name": "shapes_strict"}, {"name": "shapes_taste"}]},
}
DGPO = changed(
    PLAIN,
    {
        "objective": {"name": "dgpo", "dgpo": {"draws": 2, "kl_beta": 0.0}},
        "sampling": {"num_inference_steps": 6},
        "plan": {"group_size": 12},
    },
)
HALF: Changes = {"plan": {"group_size": GROUP, "final_keep": 12}}
LATE: Changes = {"plan": {"group_size": 12, "prune": [[4, 6]]}}
EARLY: Changes = {"plan": {"group_size": GROUP, "prune": [[2, 12]]}}
EARLY_SIX: Changes = {"plan": {"group_size": 12, "prune": [[2, 6]]}}
EARLY_QUARTER: Changes = {"plan": {"group_size": GROUP, "prune": [[2, 6]]}}
SIX: Changes = {"plan": {"group_size": 6}}
ONE_PROMPT: Changes = {"prompts": {"per_iteration": 1}}
AUTO: Changes = {"plan": {"preset": "auto", "group_size": GROUP}, "audit": {"every": 5}}
AS_AUTO = Plan(GROUP, (PrunePoint(3, 6),))
"""A plan of those that `auto` takes in six steps. Its work stands for that of `auto`, which is not known before."""
UNIFORM_LATE = changed(LATE, {"plan": {"selector": "uniform"}})
GROUP_STATISTICS: Changes = {"plan": {"selector": "furthest"}, "objective": {"baseline": "group"}}
HELD = changed(DGPO, {"objective": {"dgpo": {"kl_beta": 0.01}}, "optim": {"lr": 2e-4}})
DGPO_ARMS: dict[str, Changes] = {
    "dgpo, plain 12": DGPO,
    "dgpo, 12 of 24 after 2": changed(DGPO, EARLY),
    "dgpo, 6 of 12 after 4": changed(DGPO, LATE),
    "dgpo, plain 6": changed(DGPO, SIX),
    "dgpo, uniform 6 of 12 after 4": changed(DGPO, UNIFORM_LATE),
    "dgpo, KL 0.01, plain 12": HELD,
    "dgpo, KL 0.01, 12 of 24 after 2": changed(HELD, EARLY),
    "dgpo, KL 0.01, 6 of 24 after 2": changed(HELD, EARLY_QUARTER),
    "dgpo, KL 0.01, 6 of 12 after 2": changed(HELD, EARLY_SIX),
    "dgpo, KL 0.01, uniform 6 of 12 after 2": changed(HELD, changed(EARLY_SIX, {"plan": {"selector": "uniform"}})),
    "dgpo, KL 0.01, 6 of 12 after 4": changed(HELD, LATE),
    "dgpo, KL 0.01, uniform 6 of 12 after 4": changed(HELD, UNIFORM_LATE),
    "dgpo, KL 0.01, plain 6": changed(HELD, SIX),
    "dgpo, KL 0.01, plain 12, one prompt": changed(HELD, ONE_PROMPT),
    "dgpo, KL 0.01, auto": changed(HELD, AUTO),
    **{
        f"{name}, KL 0.01, {plan}": changed(
            changed(HELD, changes), {"objective": {"name": name, name: {"draws": 2, "kl_beta": 0.01}}}
        )
        for name in ("nft", "awm", "elbo")
        for plan, changes in (("6 of 12 after 4", LATE), ("plain 6", SIX))
    },
    "dgpo, furthest 12 of 24": changed(DGPO, changed(HALF, GROUP_STATISTICS)),
    "dgpo, posthoc 12 of 24": changed(DGPO, HALF),
    "dgpo, plain 24": changed(DGPO, {"plan": {"group_size": GROUP}}),
    "grpo, plain 24": PLAIN,
    "grpo, flash": changed(PLAIN, {"plan": {"preset": "flash", "group_size": GROUP}}),
    "grpo, plain 12": changed(PLAIN, {"plan": {"group_size": 12}}),
    "grpo, posthoc 12 of 24": changed(PLAIN, HALF),
}
SHORT = changed(PLAIN, {"sampling": {"num_inference_steps": 6}, "optim": {"lr": 5e-5}})
FIRST_3 = changed(SHORT, {"sampling": {"sde_window": "first", "sde_window_size": 3}})
FIRST_3_PRUNED = changed(FIRST_3, EARLY)
FIRST_3_HELD = changed(FIRST_3, {"objective": {"name": "grpo", "grpo": {"kl_beta": 0.04}}, "optim": {"lr": 1e-4}})
LORA: Changes = {"model": {"weights": "lora"}, "optim": {"lr": 3e-4}}
GRPO_ARMS: dict[str, Changes] = {
    "plain 24": SHORT,
    "plain 12": changed(SHORT, {"plan": {"group_size": 12}}),
    "posthoc 12 of 24": changed(SHORT, HALF),
    "12 of 24 after 3": changed(SHORT, {"plan": {"prune": [[3, 12]]}}),
    "plain 6": changed(SHORT, SIX),
    "6 of 12 after 4": changed(SHORT, LATE),
    "6 of 24 after 3": changed(SHORT, {"plan": {"prune": [[3, 6]]}}),
    "plain 24, KL 0.04": changed(SHORT, {"objective": {"name": "grpo", "grpo": {"kl_beta": 0.04}}}),
    "plain 24, CPS": changed(SHORT, {"sampling": {"sampler": "cps"}}),
    "flash, 24 -> 16 -> 12": changed(SHORT, {"plan": {"preset": "flash"}}),
    "first 3, plain 24": FIRST_3,
    "first 3, 12 of 24 after 2": FIRST_3_PRUNED,
    "first 3, uniform 12 of 24 after 2": changed(FIRST_3_PRUNED, {"plan": {"selector": "uniform"}}),
    "first 3, flash": changed(FIRST_3, {"plan": {"preset": "flash"}}),
    "first 3, standard": changed(FIRST_3, {"plan": {"preset": "standard"}}),
    "first 3, plain 12": changed(FIRST_3, {"plan": {"group_size": 12}}),
    "first 3, plain 16": changed(FIRST_3, {"plan": {"group_size": 16}}),
    "first 3, plain 6": changed(FIRST_3, SIX),
    "first 3, 6 of 12 after 4": changed(FIRST_3, LATE),
    "first 3, auto": changed(FIRST_3, AUTO),
    "first 3, uniform 6 of 12 after 4": changed(FIRST_3, UNIFORM_LATE),
    "first 3, posthoc 6 of 12": changed(FIRST_3, {"plan": {"group_size": 12, "final_keep": 6}}),
    "first 3, KL 0.04, plain 24": FIRST_3_HELD,
    "first 3, KL 0.04, 12 of 24 after 2": changed(FIRST_3_HELD, EARLY),
    "first 3, KL 0.04, plain 6": changed(FIRST_3_HELD, SIX),
    "first 3, KL 0.04, 6 of 12 after 4": changed(FIRST_3_HELD, LATE),
    "first 3, LoRA, plain 12": changed(FIRST_3, changed(LORA, {"plan": {"group_size": 12}})),
    "first 3, LoRA, 6 of 12 after 4": changed(FIRST_3, changed(LORA, LATE)),
}


@dataclass(frozen=True)
class Study:
    """The arms that are compared, the first of which is the reference; its iterations; and the cost of a preview.

    The latter is that of one decode and reward, in network calls.
    """

    arms: Mapping[str, Changes]
    length: int
    decode: float

    @property
    def reference(self) -> str:
        return next(iter(self.arms))


STUDIES = {"dgpo": Study(DGPO_ARMS, 75, 0.0), "grpo": Study(GRPO_ARMS, 100, 1.0)}


def work_of(config: Config, decode: float) -> float:
    """The network calls of an iteration, with those of training, and decodes with rewards that cost so many each."""
    plan = AS_AUTO if config.plan.preset == "auto" else resolve_plan(config)
    cost = plan.predict(config.sampling.num_inference_steps, trained_items(config), config.sampling.in_pairs)
    extra = 1 + config.objective.loss.extra_forwards / TRAINED
    calls = cost.nfe + decode * cost.decodes + TRAINED * extra * cost.trained_steps
    return config.prompts.per_iteration * calls


def of_task(
    results: Sequence[dict[str, Any]], model: str, reward: str, measure: str | None = None
) -> list[dict[str, Any]]:
    """The results of a model and a reward. What measures it is `reward` in each point of their curves.

    A `measure` is another field of these points, in place of the reward. `work` is the share of an arm's work, of which
    all arms have as much.
    """
    measure = measure or MEASURES.get(reward, "graded")
    return [
        {
            **entry,
            "curve": [
                {**point, "reward": point[measure], "work": point["iterations"] / entry["curve"][-1]["iterations"]}
                for point in entry["curve"]
            ],
        }
        for entry in results
        if (entry["model"], entry["reward"]) == (model, reward)
    ]


def curves_by_rate(results: Sequence[dict[str, Any]], arm: str) -> dict[float, dict[int, list[dict[str, Any]]]]:
    """The curves of an arm by learning rate, ascending, and by seed."""
    by_rate: dict[float, dict[int, list[dict[str, Any]]]] = {}
    for entry in results:
        if entry["arm"] == arm:
            by_rate.setdefault(entry["lr"], {})[entry["seed"]] = entry["curve"]
    return dict(sorted(by_rate.items()))


def curves_of(results: Sequence[dict[str, Any]], arm: str) -> dict[int, list[dict[str, Any]]]:
    """The curves of an arm by seed, at the rate that has the most of them, of equals the one that ends highest."""

    def standing(curves: dict[int, list[dict[str, Any]]]) -> tuple[int, float]:
        return len(curves), mean(curve[-1]["reward"] for curve in curves.values())

    return max(curves_by_rate(results, arm).values(), key=standing, default={})


def in_unit(curve: Iterable[Mapping[str, Any]], unit: str) -> Curve:
    """The reward of a curve over what was spent in this unit."""
    return [(point[unit], point["reward"]) for point in curve]


def mean_curve(curves: Sequence[Sequence[dict[str, Any]]], unit: str = "cpu_seconds") -> list[dict[str, float]]:
    """The mean over curves of the reward and of a unit of work, point by point."""
    return [{name: mean(p[name] for p in points) for name in ("reward", unit)} for points in zip(*curves, strict=False)]


def speed(ours: Sequence[Any], theirs: Sequence[Any], share: float, unit: str) -> float | None:
    """The units in which their mean curve gains a share of its final gain, over those in which ours does."""
    own, other = mean_curve(ours, unit), mean_curve(theirs, unit)
    level = _levels([other], [share])[0]
    times = [reached_at(in_unit(curve, unit), level) for curve in (other, own)]
    return None if times[0] is None or times[1] is None else times[0] / times[1]


def comparison(results: Sequence[dict[str, Any]], arm: str, other: str) -> str:
    """The difference of two arms' final rewards over the seeds that both have, and how much faster the first one is.

    Standard errors are over seeds: of the mean of paired differences, and by the jackknife for the speed.
    """
    first, second = curves_of(results, arm), curves_of(results, other)
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        return f"{arm} and {other}: {len(seeds)} seeds in common; a comparison takes two"
    differences = [first[seed][-1]["reward"] - second[seed][-1]["reward"] for seed in seeds]
    error = stdev(differences) / len(seeds) ** 0.5
    lines = [f"{arm} over {other}: {mean(differences):+.3f} ± {error:.3f} at equal work ({len(seeds)} seeds)"]
    pairs = [(first[seed], second[seed]) for seed in seeds]
    for share in (0.5, 0.75, 1.0):
        in_seconds, in_work = (_speed_and_error(pairs, share, unit) for unit in ("cpu_seconds", "work"))
        lines.append(
            f"to {share:.0%} of the latter's gain: {in_seconds} times as fast by core seconds, {in_work} by work"
        )
    return "\n".join(lines)


def _speed_and_error(pairs: Sequence[tuple[Any, Any]], share: float, unit: str) -> str:
    """The speed over all seeds' pairs of curves with its standard error; "-" where one seed less does not get there."""
    speeds = []
    for out in (None, *range(len(pairs))):
        kept = [pair for place, pair in enumerate(pairs) if place != out]
        speeds.append(speed([ours for ours, _ in kept], [theirs for _, theirs in kept], share, unit))
    of_all, *without_one = speeds
    known = [value for value in without_one if value is not None]
    if of_all is None or len(known) < len(pairs):
        return "-"
    return f"{of_all:.2f} ± {(len(known) - 1) * stdev(known) / len(known) ** 0.5:.2f}"


def table(study: Study, results: Sequence[dict[str, Any]]) -> str:
    """A row for each learning rate of each arm; levels are those of the first arm that has runs."""
    reference = next(list(runs.values()) for arm in study.arms if (runs := curves_of(results, arm)))
    base, *levels = _levels(reference, (0.0, 0.5, 0.75, 1.0))
    lines = [
        "| arm | lr, 1e-5 | seeds | updates | reward | strict | judge | diversity | distance | gradient"
        " | s to 50/75/100 % |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        f"| the base | | | 0 | {base:.3f} | {_figures(reference, 0)} | | | |",
    ]
    for arm in study.arms:
        for lr, by_seed in curves_by_rate(results, arm).items():
            curves = list(by_seed.values())
            ends = [curve[-1]["reward"] for curve in curves]
            spread = f" ± {stdev(ends):.3f}" if len(ends) > 1 else ""
            lines.append(
                f"| {arm} | {lr * 1e5:g} | {len(curves)} | {curves[0][-1]['iterations']} | {mean(ends):.3f}{spread}"
                f" | {_figures(curves)} | {_path(curves)} | {_times(curves, levels)} |"
            )
    return "\n".join(lines)


def arrivals(results: Sequence[dict[str, Any]], arms: Iterable[str], reference: str) -> str:
    """What the mean curve of each arm spends to 25, 50, 75 and 100 % of the final gain of an arm of any study.

    The last column is the work by which the lengths of arms are made equal.
    """
    base, *levels = _levels([mean_curve(list(curves_of(results, reference).values()))], (0.0, 0.25, 0.5, 0.75, 1.0))
    lines = [
        f"| to 25 / 50 / 75 / 100 % of {levels[-1] - base:+.3f} | core seconds | 1,000 network calls"
        " | 1,000 trained items | work, 1,000 calls |",
        "|---|---|---|---|---|",
    ]
    for arm in arms:
        curves = list(curves_of(results, arm).values())
        study = next(study for study in STUDIES.values() if arm in study.arms)
        work = work_of(config_of(study.arms[arm], 0), study.decode)
        units = (("cpu_seconds", 1.0), ("nfe", 1000.0), ("trained_steps", 1000.0), ("iterations", 1000.0 / work))
        spent = (_times([mean_curve(curves, unit)], levels, unit, of) for unit, of in units)
        lines.append(f"| {arm} | {' | '.join(spent)} |")
    return "\n".join(lines)


def _levels(curves: Sequence[Sequence[dict[str, Any]]], shares: Iterable[float]) -> list[float]:
    """The rewards at which curves have gained so much of what they gain in the end, by the means over them."""
    base = mean(curve[0]["reward"] for curve in curves)
    final = mean(smoothed(list(enumerate(point["reward"] for point in curve)))[-1][1] for curve in curves)
    return [base + share * (final - base) for share in shares]


def _times(
    curves: Sequence[Sequence[dict[str, Any]]], levels: Sequence[float], unit: str = "cpu_seconds", of: float = 1.0
) -> str:
    """The units to each level: the mean over the curves that reach it, and their number where it is not all."""
    times, counts = [], []
    for level in levels:
        reached = [reached_at(in_unit(curve, unit), level) for curve in curves]
        there = [value / of for value in reached if value is not None]
        digits = 1 if there and mean(there) < 4.95 else 0
        times.append(f"{mean(there):.{digits}f}" if there else "-")
        counts.append(len(there))
    if len(set(counts)) == 1:
        return "/".join(times) + (f" ({counts[0]} each)" if 0 < counts[0] < len(curves) else "")
    of_all = (f" ({count})" if 0 < count < len(curves) else "" for count in counts)
    return "/".join(map("".join, zip(times, of_all, strict=True)))


def _figures(curves: Sequence[Sequence[dict[str, Any]]], at: int = -1) -> str:
    names = ("shapes_strict", "judge", "diversity")
    return " | ".join(f"{mean(curve[at][name] for curve in curves):.2f}" for name in names)


def _path(curves: Sequence[Sequence[dict[str, Any]]]) -> str:
    """The distance to the base at the end and the mean length of gradients, for the runs that measured them."""
    ends = [curve[-1]["kl"] for curve in curves if "kl" in curve[-1]]
    lengths = [point["grad_norm"] for curve in curves for point in curve[1:] if "grad_norm" in point]
    if not ends:
        return "- | -"
    distance, length = mean(ends), mean(lengths)
    return f"{distance:.{1 if distance > 1 else 2}f} | {length:.{2 if length >= 0.1 else 3}f}"


def picture(arms: Mapping[str, str], results: Sequence[dict[str, Any]], measure: str = "reward") -> Figure:
    """A measure over seconds of one core: a line per arm for the mean of its seeds, thin ones for each seed.

    Each arm has a label.
    """
    figure, [[field]] = drawn(8.4, 3.6)
    curves = {arm: list(curves_of(results, arm).values()) for arm in arms}
    shown = [(arm, runs) for arm, runs in curves.items() if runs]
    for (arm, runs), colour in zip(shown, cycle(COLOURS), strict=False):
        for curve in runs:
            field.plot(*zip(*in_unit(curve, "cpu_seconds"), strict=True), color=colour, linewidth=0.6, alpha=0.5)
        middle = in_unit(mean_curve(runs), "cpu_seconds")
        field.plot(*zip(*middle, strict=True), color=colour, linewidth=2.2, label=arms[arm])
    field.set_xlim(left=0)
    field.set_xlabel("seconds of one core in training (thick: mean of seeds)")
    field.set_ylabel(f"{AXES.get(measure, measure)}, validation prompts")
    add_legend(figure)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="dgpo")
    parser.add_argument("--reward", default="shapes_match")
    parser.add_argument("--model", choices=("shapes-flow", "shapes-diffusion"), default="shapes-flow")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="the study's arms to run; default: all")
    parser.add_argument(
        "--lr", type=float, help="another learning rate than the study's; for --compare: that of both arms"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=60, help="no run begins after so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/road_to_reward.json"))
    parser.add_argument("--table", action="store_true", help="print what is there and run nothing")
    parser.add_argument("--compare", nargs=2, metavar="NAME", help="with --table: also two arms, seed by seed")
    parser.add_argument(
        "--arrivals", metavar="NAME", help="with --table: also what the --arms spend to this arm's gain"
    )
    parser.add_argument("--measure", help="with --table: another field of the curves than the reward")
    parser.add_argument("--picture", type=Path, help="with --table: also draw it, or the --arms alone")
    parser.add_argument("--labels", nargs="+", metavar="TEXT", help="with --picture: a text for each of the --arms")
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    if arguments.labels and len(arguments.labels) != len(arguments.arms or ()):
        parser.error("--labels takes a text for each of the --arms")
    known = [arm for one in (STUDIES.values() if arguments.table else [study]) for arm in one.arms]
    for arm in {*(arguments.arms or ()), *(arguments.compare or ()), arguments.arrivals} - {None, *known}:
        parser.error(f"{arm!r} is no arm of the study {arguments.study}, which has {', '.join(study.arms)}")
    torch.set_num_threads(arguments.threads)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    if arguments.table:
        results = of_task(results, arguments.model, arguments.reward, arguments.measure)
        if not any(entry["arm"] in study.arms for entry in results):
            at = f"the study {arguments.study} with {arguments.reward} on {arguments.model}"
            parser.error(f"{arguments.out} has no run of {at}; without --table this command runs them")
        print(table(study, results))
        if arguments.arrivals:
            print(f"\n{arrivals(results, arguments.arms or study.arms, arguments.arrivals)}")
        if arguments.compare:
            at_rate = [entry for entry in results if arguments.lr in (None, entry["lr"])]
            print(f"\n{comparison(at_rate, *arguments.compare)}")
        if arguments.picture:
            arms = arguments.arms or list(study.arms)
            labels = dict(zip(arms, arguments.labels or arms, strict=True))
            save(picture(labels, results, arguments.measure or "reward"), arguments.picture)
        return
    until = time.monotonic() + 60 * arguments.minutes
    task: Changes = {"reward": {"terms": [{"name": arguments.reward}]}, "model": {"path": arguments.model}}
    if arguments.lr is not None:
        task = {**task, "optim": {"lr": arguments.lr}}
    for seed in arguments.seeds:
        whole = study.length * work_of(config_of(changed(study.arms[study.reference], task), seed), study.decode)
        for arm in arguments.arms or study.arms:
            config = config_of(changed(study.arms[arm], task), seed)
            key = {"model": arguments.model, "reward": arguments.reward, "arm": arm, "seed": seed}
            key["lr"] = config.optim.lr
            results = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
            if any(key.items() <= r.items() for r in results) or time.monotonic() > until:
                continue
            iterations = round(whole / work_of(config, study.decode))
            config = config_of(changed(study.arms[arm], {**task, "iterations": iterations}), seed)
            print(f"{arm}, seed {seed}: {iterations} iterations", flush=True)
            curve = run(config, float("inf"), max(1, round(iterations / EVALUATIONS)), PICTURES, by="iterations")
            results = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
            versions = {"threads": arguments.threads, "torch": torch.__version__}
            results.append({**key, **versions, "iterations": iterations, "curve": curve})
            write_text(arguments.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
