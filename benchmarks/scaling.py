"""An iteration's time by the number of processes, computed from the seconds of its parts and the bytes of its messages.

    python benchmarks/scaling.py [--recipes sd35m-pickscore flux-pickscore] [--plans none posthoc standard flash]
                                 [--gpu h100 --share-of-peak 0.35 --least-ms 20] [--processes 1 2 4 ... 1024]
                                 [--per-node 8 --inside-gbs 450 --between-gbs 50 --latency-us 20] [--json]
    python benchmarks/scaling.py --recipes quickstart --measure [--check]

This is strong scaling: the iteration stays the same, prompts and all. Of each number of processes the fullest one
counts. Prompts are dealt whole, or members of groups where that is shorter (`prompts.split_groups`, for objectives that
allow it). Rows of a network call are filled up and items are cut in equal parts as the engine does it. Seconds of a
call are the model's own FLOPs at a share of the card's peak, which is an assumption, and at least `--least-ms`, the
time to launch its kernels. With `--measure` they are measured here, for each number of rows.

The messages are the sum of gradients of each update in float32 (a ring in a machine and one between machines, so twice
the bytes over each, and a latency for each doubling), and gathers of objects, which reach every process: scores at
prune points, survivors that move, rewards, metrics. Their number and size are counted on one iteration of the built-in
model, by the trainer's own calls. Audits, evaluations, checkpoints, waiting for a slower machine, and overlap of any of
it with computing are left out.

`--check` runs the same iterations in one and in two processes of one thread each, and compares with the prediction.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from iteration import Bare
from iteration import seconds as timed

from progrpo.config import Config, PlanSettings, resolve_plan, trained_items, trained_steps
from progrpo.packing import balanced_size
from progrpo.policies.load import quiet
from progrpo.recipes import load_recipe
from progrpo.rewards.mixture import load_mixture
from progrpo.rollout.plan import Plan
from progrpo.training.build import policy_context, policy_from, resolve_dtype, train_order
from progrpo.training.distributed import Ranks
from progrpo.training.estimate import flops_by_stage, sizes_for
from progrpo.training.gpus import GPUS
from progrpo.training.trainer import Trainer

PROCESSES = [2**i for i in range(11)]
_ITERATIONS = 4


@dataclass(frozen=True)
class Model:
    """A model as one process has it.

    `call` and `train` are the seconds of a network call and of a forward and backward pass by rows, `picture` those to
    decode and score a picture. `trained` is the number of trained parameters, `latent` that of values in a latent.
    """

    call: Callable[[int], float]
    train: Callable[[int], float]
    picture: float
    trained: int
    latent: int


@dataclass(frozen=True)
class Messages:
    """The messages of one process in an iteration.

    They are collectives of numbers and gathers of objects. The bytes of the latter are `fixed + rows * per_row`, where
    rows are those that the process finishes. `unpickling` has the seconds to unpickle one process' objects.
    """

    sums: int
    gathers: int
    fixed: float
    per_row: float
    unpickling: float


@dataclass(frozen=True)
class Network:
    """The GB per second of a process, within a machine and between machines; seconds until a message arrives."""

    per_node: int
    inside: float
    between: float
    latency: float

    def sum(self, size: float, processes: int) -> float:
        """The seconds of a sum: a ring within each machine and one between machines."""
        if processes == 1:
            return 0.0
        inside = 2 * size / (self.inside * 1e9)
        between = 2 * size / (self.between * 1e9) if processes > self.per_node else 0.0
        return inside + between + self._hops(processes)

    def gather(self, size: float, processes: int) -> float:
        """The seconds to gather so many bytes of each process in all; their lengths go before."""
        if processes == 1:
            return 0.0
        slowest = self.between if processes > self.per_node else self.inside
        return size * processes / (slowest * 1e9) + 2 * self._hops(processes)

    def _hops(self, processes: int) -> float:
        return 2 * math.ceil(math.log2(processes)) * self.latency


def seconds(
    config: Config, processes: int, split: bool, model: Model, messages: Messages, net: Network
) -> dict[str, float]:
    """The seconds of an iteration by part, on the process that has most to do."""
    plan, prompts, world = resolve_plan(config), config.prompts.per_iteration, processes

    def own(members: int) -> int:
        return -(-prompts * members // world) if split else -(-prompts // world) * members

    called, learnt, updates = (
        config.sampling.rows_per_call,
        config.optim.items_per_pass,
        config.optim.updates_per_rollout,
    )
    pair = 2 if config.sampling.in_pairs else 1
    steps = config.sampling.num_inference_steps
    sample = sum(called_evenly(own(plan.living_at(step)), called, pair, model.call) for step in range(steps))
    pictures = sum(own(plan.living_at(point.step)) for point in plan.active_points()) + own(plan.finalists)
    items = -(-own(plan.survivors) * trained_items(config) // updates)
    parts = -(-items // learnt)
    update = updates * parts * model.train(-(-items // parts))
    moving = moved(config, plan, world, model.latent, net) if split and world > 1 else 0.0
    sums = 2 if config.optim.measures_noise_scale and prompts > 1 else 1  # of gradients: of each half of the prompts
    collectives = updates * sums * net.sum(4 * model.trained, world) + messages.sums * net.sum(8, world)
    rows = own(plan.finalists)
    objects = net.gather(messages.fixed + rows * messages.per_row, world)
    objects += (messages.gathers - 1) * net.gather(0, world)
    unpickling = messages.unpickling * world if world > 1 else 0.0
    by_part = {"sample": sample, "pictures": pictures * model.picture, "update": update, "gradients": collectives}
    return by_part | {"objects": objects + unpickling, "survivors that move": moving}


def called_evenly(rows: int, size: int, pair: int, call: Callable[[int], float]) -> float:
    """The seconds of rows shared out evenly among as few calls as there can be, as the engine does."""
    return -(-rows // size) * call(balanced_size(rows, size) * pair)


def moved(config: Config, plan: Plan, world: int, latent: int, net: Network) -> float:
    """The seconds of `rollout.sharding.rebalanced`, where survivors are as if drawn by lot.

    Every process hears of every parcel.
    """
    draw, total = torch.Generator().manual_seed(0), 0.0
    bytes_each = torch.finfo(getattr(torch, config.sampling.latent_dtype)).bits // 8
    for point in plan.active_points():
        before = config.prompts.per_iteration * plan.living_at(point.step)
        after = config.prompts.per_iteration * point.keep
        owner = torch.arange(before)[torch.randperm(before, generator=draw)[:after]] % world
        counts = torch.bincount(owner, minlength=world)
        most = int((counts - after // world).clamp(min=0).max())
        path = sum(step < point.step + 1 for step in trained_steps(config, 0)) + 1
        total += net.gather(most * path * latent * bytes_each, world)
    return total


# --- where the numbers come from ------------------------------------------------------------------------------------


def on_paper(config: Config, gpu: str, share: float, least: float) -> Model:
    """The model, calculated from its own code."""
    model_sizes, rate = sizes_for(config), GPUS[gpu].peak * 1e12 * share
    plan = resolve_plan(config)
    per_item = flops_by_stage(config, plan, model_sizes)["update"] / (
        config.prompts.per_iteration * plan.survivors * trained_items(config)
    )
    return Model(
        call=lambda rows: max(least, rows * model_sizes.call_flops / rate),
        train=lambda rows: max(3 * least, rows * per_item / rate),
        picture=model_sizes.decode_flops / rate,
        trained=model_sizes.trained,
        latent=model_sizes.latent,
    )


def measured_here(config: Config) -> Model:
    """The model, timed on this device for 1, 2, 4 ... rows and interpolated between them."""
    ranks = Ranks()
    policy = policy_from(config.model, policy_context(config, ranks))
    order, reward = train_order(config.prompts, config.seed), load_mixture(config.reward.terms, config.reward.frames)
    bare = Bare(policy, reward, config, Trainer(config, policy, reward, order, ranks).step().rollout)
    pair = 2 if config.sampling.in_pairs else 1
    unit = bare.measure()
    call = by_rows(bare._sample, config.sampling.rows_per_call)
    train = by_rows(bare._train, config.optim.items_per_pass)
    return Model(
        call=lambda rows: call(rows / pair),
        train=train,
        picture=unit["decode"] + unit["reward"],
        trained=sum(p.numel() for p in policy.trainable.values()),
        latent=math.prod(policy.latent_shape),
    )


def by_rows(work: Callable[[int], object], most: int) -> Callable[[float], float]:
    """The seconds by rows."""
    sizes = sorted({*(2**i for i in range(most.bit_length())), most})
    times = [timed(lambda size=size: work(size)) for size in sizes]  # type: ignore[misc]

    def at(rows: float) -> float:
        i = min(max(bisect_left(sizes, rows), 1), len(sizes) - 1) if len(sizes) > 1 else 0
        if not i:
            return times[0]
        low, high = sizes[i - 1], sizes[i]
        return times[i - 1] + (times[i] - times[i - 1]) * (rows - low) / (high - low)

    return at


class Counted(Ranks):
    """One process that notes its messages to the others."""

    def __init__(self) -> None:
        super().__init__()
        self.sums, self.parcels = 0, list[bytes]()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.sums += 1
        return super().sum(values)

    def gather(self, items: list[Any]) -> list[Any]:
        self.parcels.append(pickle.dumps(items))
        return super().gather(items)


def counted(config: Config, split: bool) -> Messages:
    """The messages on the built-in model, by the same plan and objective, with one prompt and with two."""
    small = replace(
        config,
        model=load_recipe("smoke").model,
        reward=load_recipe("smoke").reward,
        sampling=replace(config.sampling, guidance_scale=1.0, embedded_guidance=False, microbatch=48),
        audit=replace(config.audit, every=0),
        optim=replace(config.optim, microbatch=48),
    )
    counters: list[Counted] = []
    for prompts in (1, 2):
        ranks = Counted()
        prompt_settings = replace(small.prompts, source="shapes", per_iteration=prompts, split_groups=split)
        its = replace(small, prompts=prompt_settings)
        order, reward = train_order(prompt_settings, 0), load_mixture(its.reward.terms, its.reward.frames)
        trainer = Trainer(its, policy_from(its.model, policy_context(its, ranks)), reward, order, ranks)
        trainer.step()
        ranks.sums, ranks.parcels = 0, []  # the first iteration has checks of its own
        trainer.step()
        counters.append(ranks)
    one, two = (sum(map(len, ranks.parcels)) for ranks in counters)
    rows = resolve_plan(small).finalists
    per_row = max(0, two - one) / rows

    def unpickle() -> None:
        for parcel in counters[0].parcels:
            pickle.loads(parcel)

    return Messages(counters[0].sums, len(counters[0].parcels), one - rows * per_row, per_row, timed(unpickle))


# --- the command ----------------------------------------------------------------------------------------------------


def table(config: Config, options: argparse.Namespace, processes: list[int]) -> dict[int, dict[str, Any]]:
    if options.measure:
        model = measured_here(config)
    else:
        model = on_paper(config, options.gpu, options.share_of_peak, options.least_ms / 1000)
    net = Network(options.per_node, options.inside_gbs, options.between_gbs, options.latency_us / 1e6)
    may_split = config.objective.name == "grpo"
    messages = {split: counted(config, split) for split in ({False, may_split} if max(processes) > 1 else {False})}
    results: dict[int, dict[str, Any]] = {}
    for world in processes:
        ways = {
            split: seconds(config, world, split, model, messages[split], net)
            for split in messages
            if split or world <= config.prompts.per_iteration
        }
        if not ways:
            break
        split = min(ways, key=lambda way: sum(ways[way].values()))
        parts, total = ways[split], sum(ways[split].values())
        results[world] = {"seconds": total, "groups split": split, **parts}
        results[world]["efficiency"] = results[processes[0]]["seconds"] * processes[0] / (total * world)
    return results


def check(config: Config, options: argparse.Namespace) -> dict[str, float]:
    """The iterations per second of two processes over those of one, each of one thread, beside the prediction."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    promised = table(config, options, [1, 2])
    rounds = []
    for _ in range(3):
        one, two = (run(options.recipes[0], config, count) for count in (1, 2))
        rounds.append(one / two)
    return {
        "promised": promised[1]["seconds"] / promised[2]["seconds"],
        "measured": statistics.median(rounds),
        "least": min(rounds),
        "most": max(rounds),
    }


def run(recipe: str, config: Config, processes: int) -> float:
    """The median seconds of an iteration of a real run, the first left out."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            "-m",
            "progrpo",
        ]
        short = {
            "iterations": _ITERATIONS + 1,
            "audit.every": 0,
            "eval.pictures": 12,
            "model.dtype": config.model.dtype,
        }
        options = [f"--{name}={value}" for name, value in short.items()]
        subprocess.run(
            [*launch, "train", recipe, *options, "--out", folder, "--overwrite"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
        records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return statistics.median(r["seconds"] for r in records if r.get("iteration", 0) > 0 and "seconds" in r)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["sd35m-pickscore", "flux-pickscore"])
    parser.add_argument("--plans", nargs="+", default=["none", "posthoc", "standard", "flash"])
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES)
    parser.add_argument("--gpu", default="h100", choices=list(GPUS))
    parser.add_argument("--share-of-peak", type=float, default=0.35)
    parser.add_argument("--least-ms", type=float, default=20.0)
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--inside-gbs", type=float, default=450.0)
    parser.add_argument("--between-gbs", type=float, default=50.0)
    parser.add_argument("--latency-us", type=float, default=20.0)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quiet()
    results: dict[str, dict[str, Any]] = {}
    for recipe in options.recipes:
        config = resolve_dtype(load_recipe(recipe), Ranks())
        if options.check:
            results[recipe] = check(config, options)
            continue
        for plan in options.plans:
            chosen = config if plan == "recipe" else replace(config, plan=PlanSettings(preset=plan))
            results.setdefault(recipe, {})[plan] = table(chosen, options, options.processes)
    if options.json:
        print(json.dumps({**vars(options), "results": results}, indent=1))
        return
    for recipe, result in results.items():
        if options.check:
            print(
                f"{recipe}: two processes {result['measured']:.2f} times as fast"
                f" ({result['least']:.2f} to {result['most']:.2f}), promised {result['promised']:.2f}"
            )
            continue
        for plan, by_world in result.items():
            for world, r in by_world.items():
                messages = r["gradients"] + r["objects"] + r["survivors that move"]
                split = ", groups split" if r["groups split"] else ""
                print(
                    f"{recipe} {plan} {world:5d}: {r['seconds']:9.2f} s, efficiency {r['efficiency']:.0%},"
                    f" messages {messages / r['seconds']:.1%}{split}"
                )


if __name__ == "__main__":
    main()
