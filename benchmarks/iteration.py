"""Where an iteration's time goes, against the bare network on the same inputs in the same process, per plan.

    python benchmarks/iteration.py [--models shapes-flow shapes-diffusion] [--plans none posthoc standard flash window]
                                   [--objective grpo] [--iterations 5] [--prompts 4] [--compile] [--reuse-rollout] [--json]

`window` is an early window: noise on the first 3 of 10 steps alone, 24 members, of which 12 go on right after it. Before and
after every iteration the unit costs are measured bare: a call of the network, with and without gradient, a decoded picture, by
the full and by the tiny decoder, and a reward. From these:

sampling   rows a second of the sampling stage over those of the bare network at the same microbatch
update     the same of trained items, forward and backward, and the further forward passes that the objective compares with
model      seconds of the iteration over what its counts cost at these units (the cost model)
previews   their seconds over those of sampling: by the full decoder as it ran, by the tiny one and the probe at their unit costs

Medians over iterations after one that is not counted. NFE, decodes and reward calls must be those that the plan predicts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import psutil
import torch

from progrpo.config import Config, ModelConfig, PlanConfig, PreviewConfig, SamplingConfig, microbatch
from progrpo.policies.base import Policy
from progrpo.rewards.base import Reward
from progrpo.rollout.plan import UnitCosts
from progrpo.rollout.probe import Probe
from progrpo.training.build import policy_from, scorer_from, settled, tiny_decoder, train_order
from progrpo.training.distributed import Ranks
from progrpo.training.measure import measured
from progrpo.training.trainer import Trainer
from progrpo.types import Cost, Prompt

WINDOW = (
    PlanConfig(preset="custom", group_size=24, prune=((3, 12),)),
    SamplingConfig(sde_window="first", sde_window_size=3),
)
FURTHER_PASSES = {"grpo": 0, "dgpo": 2, "nft": 2, "awm": 2}
"""Forward passes of an item without gradient, which an objective compares with: of the reference and an average of the weights."""
_REPEATS = 3
_DECODED = 32  # as the rollout decodes


def config_for(model: str, plan: str, wanted: argparse.Namespace) -> Config:
    dtype = "float32" if wanted.compile and wanted.objective == "grpo" else "auto"  # see config: ratios must be exact
    base = Config(model=ModelConfig(path=model, dtype=dtype, compile=wanted.compile))
    chosen, sampling = WINDOW if plan == "window" else (PlanConfig(preset=plan), base.sampling)
    return replace(
        base,
        plan=chosen,
        sampling=sampling,
        preview=PreviewConfig(decoder="tiny"),  # so that the policy has it; what runs is set below
        objective=replace(base.objective, name=wanted.objective),
        optim=replace(base.optim, reuse_rollout=wanted.reuse_rollout),
        prompts=replace(base.prompts, per_iteration=wanted.prompts),
        audit=replace(base.audit, every=0),
    )


class Bare:
    """The parts of an iteration on their own, on inputs of its shapes: seconds of each row."""

    def __init__(self, policy: Policy, reward: Reward, config: Config, prompts: list[Prompt]) -> None:
        self.policy, self.reward, self.config = policy, reward, config
        self.prompts = prompts
        self.condition = policy.encode(prompts)
        self.timestep = policy.levels(10).timestep[5]
        self.passes = FURTHER_PASSES[config.objective.name]

    def _call(self, size: int) -> torch.Tensor:
        rows = torch.arange(size) % len(self.prompts)
        x = torch.randn(size, *self.policy.latent_shape, generator=torch.Generator().manual_seed(0))
        x = x.to(self.policy.device)
        return self.policy.predict(x, self.timestep.to(x), self.condition.take(rows.to(self.policy.device)))

    def _train(self, size: int) -> None:
        for _ in range(self.passes):
            self._sample(size)
        self._call(size).square().mean().backward()
        for parameter in self.policy.trainable.values():
            parameter.grad = None

    def _sample(self, size: int) -> None:
        with torch.no_grad():
            self._call(size)

    def measure(self) -> dict[str, float]:
        calls, items = microbatch(self.config.sampling), microbatch(self.config.optim)
        latents = torch.randn(_DECODED, *self.policy.latent_shape).to(self.policy.device)
        pictures = self.policy.decode(latents).numpy()
        asked = [self.prompts[i % len(self.prompts)] for i in range(_DECODED)]
        probe = Probe(1)
        with self.policy.observed() as seen:
            self._sample(calls)
        features = torch.cat(seen, dim=1)[-calls:].cpu()
        probe.learn([features], torch.randn(calls), torch.zeros(calls, dtype=torch.int64))
        works: dict[str, tuple[Callable[[], object], int]] = {
            "call": (lambda: self._sample(calls), calls),
            "train": (lambda: self._train(items), items),
            "decode": (lambda: self.policy.decode(latents), _DECODED),
            "tiny": (lambda: self.policy.preview(latents), _DECODED),
            "reward": (lambda: self.reward.score(pictures, asked), _DECODED),
            "probe": (lambda: probe.score(0, features), calls),
        }
        return {name: seconds(work) / rows for name, (work, rows) in works.items()}


def seconds(work: Callable[[], object]) -> float:
    """Median of some calls, after one."""
    work()
    found = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """GiB: of the GPU's allocator, or resident in the process, looked at fifty times a second."""
    done, seen, process = threading.Event(), [0], psutil.Process()

    def look() -> None:
        while not done.wait(0.02):
            seen[0] = max(seen[0], process.memory_info().rss)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() / 2**30
        return
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: seen[0] / 2**30
    finally:
        done.set()
        thread.join()


def measure(config: Config, iterations: int) -> dict[str, Any]:
    ranks = Ranks()
    config = settled(config, ranks)
    policy = policy_from(config.model, config.seed, ranks, tiny_decoder=tiny_decoder(config.preview))
    order, reward = train_order(config.prompts, config.seed), scorer_from(config.reward.terms, config.reward.frames)
    prompts = order.prompts_for(0, config.prompts.per_iteration)
    config = replace(config, preview=PreviewConfig())
    config = measured(config, policy, prompts[0], ranks)
    trainer = Trainer(config, policy, reward, order, ranks)
    policy.encode(order.prompts_for(0, config.prompts.per_iteration * (iterations + 1)))
    bare, rows = Bare(policy, reward, config, prompts), []
    with peak_memory() as peak:
        before = bare.measure()
        for i in range(iterations + 1):
            record = trainer.step().record
            after = bare.measure()
            units = {name: (before[name] + after[name]) / 2 for name in after}
            before = after
            if i:
                rows.append(row(record, units))
        memory = peak()
    same = ("nfe", "decodes", "reward_calls")
    predicted, counted = trainer.predicted(iterations + 1), trainer.totals.counted
    return {
        **{key: statistics.median(r[key] for r in rows) for key in rows[0]},
        "model by iteration": [round(r["model"], 3) for r in rows],
        "peak GiB": memory,
        "microbatch": [config.sampling.microbatch, config.optim.microbatch],
        "dtype": config.model.dtype,
        "predicted": asdict(predicted),
        "counted": asdict(counted),
        "counts_agree": all(getattr(predicted, n) == getattr(counted, n) for n in same),
    }


def row(record: dict[str, Any], units: dict[str, float]) -> dict[str, float]:
    stages = {name: record[f"time/{name}"] for name in ("sample", "preview", "reward", "update", "other")}
    cost = Cost(**{name: record[f"rollout/{name}"] for name in asdict(Cost())})
    picture = units["decode"] + units["reward"]
    promised = UnitCosts(units["call"], picture, picture, units["train"]).seconds(cost)
    return {
        "seconds": record["seconds"],
        **stages,
        "nfe a second": cost.nfe / stages["sample"],
        "bare nfe a second": 1 / units["call"],
        "sampling": cost.nfe * units["call"] / stages["sample"],
        "update rate": cost.trained_steps * units["train"] / stages["update"],
        "model": record["seconds"] / promised,
        "previews, full": stages["preview"] / stages["sample"],
        "previews, tiny": cost.previews * (units["tiny"] + units["reward"]) / stages["sample"],
        "previews, probe": cost.previews * units["probe"] / stages["sample"],
        **{f"unit {name} ms": 1000 * value for name, value in units.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["shapes-flow", "shapes-diffusion"])
    parser.add_argument("--plans", nargs="+", default=["none", "posthoc", "standard", "flash", "window"])
    parser.add_argument("--objective", default="grpo")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--reuse-rollout", action="store_true")
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for model in wanted.models:
        for plan in wanted.plans:
            result = measure(config_for(model, plan, wanted), wanted.iterations)
            found.setdefault(model, {})[plan] = result
            if not wanted.json:
                print(line(model, plan, result), flush=True)
    if wanted.json:
        print(json.dumps({**vars(wanted), "torch": torch.__version__, "plans": found}, indent=1))


def line(model: str, plan: str, r: dict[str, Any]) -> str:
    stages = "  ".join(f"{name} {r[name]:.2f}" for name in ("sample", "preview", "reward", "update", "other"))
    previews = " ".join(f"{r[f'previews, {kind}']:.1%}" for kind in ("full", "tiny", "probe"))
    counts = "" if r["counts_agree"] else "  COUNTS DIFFER"
    return (
        f"{model:17s} {plan:9s} {r['seconds']:.2f} s: {stages};  of the bare network: sampling {r['sampling']:.1%},"
        f" update {r['update rate']:.1%};  model x {r['model']:.3f};  previews {previews};  {r['peak GiB']:.1f} GiB{counts}"
    )


if __name__ == "__main__":
    main()
