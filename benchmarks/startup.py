"""The time that a run's start takes where microbatches are left open, and the gain of the choice.

    python benchmarks/startup.py [--model shapes-flow] [--repeats 3] [--busy 2] [--json]

measuring  seconds, and seconds of processors, until microbatches are chosen for the quickstart's plan and objective: by
           measuring, by measuring beside as many counting processes as `--busy` says, and from the cache
choice     seconds per iteration with each of the choices, and with the quickstart's own 72, alone and in turn; the
           median of three
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from busy import busy

from progrpo.config import Config
from progrpo.policies.base import Policy
from progrpo.policies.load import quiet
from progrpo.recipes import load_recipe
from progrpo.rewards.mixture import load_mixture
from progrpo.tracking.records import metric
from progrpo.training.build import policy_context, policy_from, resolve_dtype, train_order
from progrpo.training.distributed import Ranks
from progrpo.training.measure import with_measured_microbatches
from progrpo.training.trainer import Trainer

Sizes = tuple[int | None, int | None]


def with_sizes(config: Config, sizes: Sizes) -> Config:
    sampling, optim = sizes
    return replace(
        config,
        sampling=replace(config.sampling, microbatch=sampling),
        optim=replace(config.optim, microbatch=optim),
    )


def choose(config: Config, policy: Policy, ranks: Ranks) -> dict[str, Any]:
    """The chosen sizes, and the cost of finding them."""
    prompt = train_order(config.prompts, config.seed).prompts_for(0, 1)[0]
    start, start_of_processors = time.perf_counter(), time.process_time()
    chosen = with_measured_microbatches(with_sizes(config, (None, None)), policy, prompt, ranks)
    return {
        "seconds": time.perf_counter() - start,
        "processors": time.process_time() - start_of_processors,
        "sizes": [chosen.sampling.microbatch, chosen.optim.microbatch],
    }


def iteration_seconds(config: Config, policy: Policy, ranks: Ranks) -> float:
    order = train_order(config.prompts, config.seed)
    trainer = Trainer(config, policy, load_mixture(config.reward.terms, config.reward.frames), order, ranks)
    seconds = metric(trainer.step().record, "seconds")
    assert seconds is not None
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-flow")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--busy", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quiet()
    ranks, recipe = Ranks(), load_recipe("quickstart")
    recipe = replace(recipe, model=replace(recipe.model, path=options.model), audit=replace(recipe.audit, every=0))
    config = resolve_dtype(recipe, ranks)
    policy = policy_from(config.model, policy_context(config, ranks))
    choosing: dict[str, list[dict[str, Any]]] = {"measured": [], "measured beside others": [], "from the cache": []}
    for _ in range(options.repeats):
        for name in choosing:
            with tempfile.TemporaryDirectory() as cache, busy(options.busy if "beside" in name else 0):
                os.environ["XDG_CACHE_HOME"] = cache
                if "cache" in name:
                    choose(config, policy, ranks)
                choosing[name].append(choose(config, policy, ranks))
    choices: dict[str, Sizes] = {"72 72": (72, 72)}
    choices |= {" ".join(map(str, c["sizes"])): tuple(c["sizes"]) for runs in choosing.values() for c in runs}
    spent: dict[str, list[float]] = {name: [] for name in choices}
    for _ in range(3):
        for name, sizes in choices.items():
            spent[name].append(iteration_seconds(with_sizes(config, sizes), policy, ranks))
    seconds = {name: statistics.median(s) for name, s in spent.items()}
    if options.json:
        print(
            json.dumps(
                {**vars(options), "torch": torch.__version__, "choosing": choosing, "iteration": seconds}, indent=1
            )
        )
        return
    for name, runs in choosing.items():
        for c in runs:
            label = " ".join(map(str, c["sizes"]))
            print(f"{name:23s} {c['seconds']:5.2f} s, {c['processors']:5.2f} s of processors: {label}")
    for label, s in seconds.items():
        print(f"an iteration in {label:8s} {s:6.2f} s")


if __name__ == "__main__":
    main()
