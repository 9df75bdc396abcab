"""The gain of `reward.waves` with a reward that is slow elsewhere.

    python benchmarks/waves.py [--delay-ms 10 20 40] [--waves 1 2 3] [--model, --plans, --iterations, --json]

The built-in flow model and verifier stand behind a delay per picture, like a server that scores one picture after
another, whoever sends it. GRPO has 6 prompts per iteration. Runs with each number of waves take turns, an iteration
each; seconds are medians over iterations after one. The bound is the iteration with one wave less the smaller of
sampling and scoring: what is left if one hides the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from progrpo.config import (
    AuditSettings,
    Config,
    ModelSettings,
    PlanSettings,
    PromptSettings,
    RewardSettings,
    SamplingSettings,
)
from progrpo.policies.load import quiet
from progrpo.rewards.base import Reward, Score
from progrpo.rewards.load import load_reward
from progrpo.rewards.mixture import RewardMixture, component_from
from progrpo.rewards.settings import RewardTerm
from progrpo.training.build import policy_context, policy_from, resolve_dtype, train_order
from progrpo.training.distributed import Ranks
from progrpo.training.trainer import Trainer
from progrpo.types import Prompt


class Slow(Reward):
    def __init__(self, reward: Reward, delay: float) -> None:
        self._reward, self._delay, self._busy = reward, delay, threading.Lock()

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        with self._busy:
            time.sleep(self._delay * len(prompts))
        return self._reward.score(pictures_NHWC, prompts)


def measure(model: str, plan: str, delay: float, waves: Sequence[int], iterations: int) -> dict[int, dict[str, float]]:
    ranks = Ranks()
    base = Config(
        model=ModelSettings(path=model, dtype="auto"),
        prompts=PromptSettings(per_iteration=6),
        sampling=SamplingSettings(microbatch=48),
        plan=PlanSettings(preset=plan),
        audit=AuditSettings(every=0),
    )
    base = resolve_dtype(replace(base, optim=replace(base.optim, microbatch=48)), ranks)
    trainers = {}
    for count in waves:
        config = replace(base, reward=RewardSettings(waves=count))
        term = RewardTerm("shapes")
        reward = RewardMixture([component_from(term, Slow(load_reward(term), delay), frames=1)])
        order = train_order(config.prompts, 0)
        trainers[count] = Trainer(
            config, policy_from(config.model, policy_context(config, ranks)), reward, order, ranks
        )
    records: dict[int, list[dict[str, Any]]] = {count: [] for count in waves}
    for _ in range(iterations + 1):
        for count, trainer in trainers.items():
            records[count].append(trainer.step().record)
    names = ("seconds", "time/sample", "time/preview", "time/reward", "time/update", "time/overlapped")
    medians = {
        count: {name: statistics.median(r[name] for r in rows[1:]) for name in names} for count, rows in records.items()
    }
    one = medians[waves[0]]
    scoring = one["time/preview"] + one["time/reward"]
    bound = one["seconds"] - min(scoring, one["time/sample"])
    return {
        count: {**row, "gain": one["seconds"] / row["seconds"], "bound": one["seconds"] / bound}
        for count, row in medians.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-flow")
    parser.add_argument("--plans", nargs="+", default=["none", "standard"])
    parser.add_argument("--delay-ms", type=float, nargs="+", default=[10, 20, 40])
    parser.add_argument("--waves", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quiet()
    results: dict[str, dict[float, Any]] = {}
    for plan in options.plans:
        for ms in options.delay_ms:
            by_waves = measure(options.model, plan, ms / 1000, options.waves, options.iterations)
            results.setdefault(plan, {})[ms] = by_waves
            if not options.json:
                by_count = "  ".join(f"{n}: {r['seconds']:.2f} s ({r['gain']:.2f})" for n, r in by_waves.items())
                most = by_waves[options.waves[0]]["bound"]
                print(f"{plan:9s} {ms:3g} ms a picture, waves {by_count}; at most {most:.2f}", flush=True)
    if options.json:
        print(json.dumps({**vars(options), "results": results}, indent=1))


if __name__ == "__main__":
    main()
