"""Where an iteration's time goes: the share outside the network, the decoder and the reward, per plan.

    python benchmarks/iteration.py [--plans standard flash posthoc none] [--iterations 3] [--prompts 4] [--json]

The network is its forward passes (sampling and training) and the backward passes. All else of an iteration is "outside": noise,
steps, selection, packing, log-probs and losses, gradient clipping, the optimizer, bookkeeping. Medians over iterations,
after one that is not counted. Counts are compared with what the plan predicts, and must be equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from progrpo.config import Config, PlanConfig
from progrpo.rewards.base import Reward, Score
from progrpo.rewards.load import load_reward
from progrpo.training.build import policy_from, train_order
from progrpo.training.distributed import Ranks
from progrpo.training.trainer import Trainer
from progrpo.types import Prompt


class Clock:
    """Seconds spent inside wrapped calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = call(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return out

        return timed


class TimedReward:
    def __init__(self, reward: Reward, clock: Clock) -> None:
        self.score: Callable[[np.ndarray, Sequence[Prompt]], list[Score]] = clock.wrap("reward", reward.score)


@contextmanager
def timed_backward(clock: Clock):
    plain = torch.Tensor.backward
    torch.Tensor.backward = clock.wrap("network", plain)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.backward = plain  # type: ignore[method-assign]


def measure(config: Config, iterations: int) -> dict[str, Any]:
    ranks, clock = Ranks(), Clock()
    policy = policy_from(config.model, config.seed, ranks)
    policy.predict = clock.wrap("network", policy.predict)  # type: ignore[method-assign]
    policy.decode = clock.wrap("decode", policy.decode)  # type: ignore[method-assign]
    order = train_order(config.prompts, config.seed)
    trainer = Trainer(config, policy, TimedReward(load_reward(config.reward.name), clock), order, ranks)
    policy.encode([p.text for p in order.prompts_for(0, config.prompts.per_iteration * (iterations + 1))])
    rows = []
    with timed_backward(clock):
        for i in range(iterations + 1):
            clock.seconds.clear()
            record = trainer.step().record
            if i:
                inside = sum(clock.seconds.values())
                stages = {k: v for k, v in record.items() if k.startswith("time/")}
                rows.append(
                    {"seconds": record["seconds"], "outside": 1 - inside / record["seconds"], **clock.seconds, **stages}
                )
    predicted, counted = trainer.predicted(iterations + 1), trainer.totals.counted
    same = ("nfe", "decodes", "reward_calls")
    return {
        **{key: statistics.median(row[key] for row in rows) for key in rows[0]},
        "predicted": asdict(predicted),
        "counted": asdict(counted),
        "counts_agree": all(getattr(predicted, n) == getattr(counted, n) for n in same),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", default=["standard", "flash", "posthoc", "none"])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    base = Config()
    result = {}
    for plan in wanted.plans:
        config = replace(
            base,
            plan=PlanConfig(preset=plan),
            prompts=replace(base.prompts, per_iteration=wanted.prompts),
            audit=replace(base.audit, every=0),
        )
        result[plan] = measure(config, wanted.iterations)
    if wanted.json:
        print(json.dumps(result, indent=1))
        return
    for plan, row in result.items():
        agree = "counts agree" if row["counts_agree"] else "COUNTS DIFFER"
        stages = "  ".join(f"{name} {row[name]:.2f}" for name in ("network", "decode", "reward"))
        print(f"{plan:9s} {row['seconds']:.2f} s/iteration  {stages}  outside {row['outside']:.1%}  {agree}")


if __name__ == "__main__":
    main()
