"""A sampling process that is one policy version behind, against two processes that share each iteration.

    python benchmarks/stale_sampling.py [--iterations 30] [--seeds 0 1 2] [--out docs/results/stale_sampling.json]
    python benchmarks/stale_sampling.py --page      # the table of the page beside --out; measures nothing

Both arms have two processes of one thread, over gloo, on the built-in `shapes-flow`.

`shared` is what progrpo does: both processes sample and learn half of each iteration, and add up their gradients.
`behind` has a process that only samples and one that only learns. While iteration i is learnt, i + 1 is sampled by the
weights before i, and sent with its pictures; the weights are sent back. `corrected` is the same, and GRPO's ratio is to
the sampler's log-probs, with its clip range; in `behind` it is to the learner's own, so that it is 1.

Seeds and objectives take turns, so that both arms see the same machine. Finished cells in `--out` are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.distributed as dist
from search import DECEMBER
from torch import Tensor

from progrpo.config import Config, ObjectiveSettings, from_dict
from progrpo.durable import write_text
from progrpo.objectives.base import Experience
from progrpo.objectives.grpo import GRPO
from progrpo.policies.base import Policy
from progrpo.policies.load import quiet
from progrpo.repro.page import table
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.tracking.records import Metrics, metric
from progrpo.tracking.run_folder import RunFolder
from progrpo.training.audit import GroupWatch
from progrpo.training.build import resolve_dtype
from progrpo.training.collector import Batch, Collector
from progrpo.training.distributed import Ranks
from progrpo.training.inputs import inputs_from
from progrpo.training.run import Run
from progrpo.training.trainer import Trainer
from progrpo.types import Rollout

ARMS = {"grpo": ("shared", "behind", "corrected"), "dgpo": ("shared", "behind")}
"""The arms of each objective. DGPO has no ratio to the sampler."""
SAMPLER, LEARNER = 0, 1
WARM = 3
"""The first iterations, whose seconds are not counted."""
LAST = 5
"""The iterations at the end whose rewards are compared."""
KEPT = ("seconds", "time/update", "reward/mean", "update/on_policy_deviation", "update/clip_fraction")


def config_of(objective: str, seed: int, iterations: int) -> Config:
    """The quickstart of 1 December 2026, by another objective and without audits and evaluations."""
    base = from_dict(DECEMBER)
    own = base.objective if objective == "dgpo" else ObjectiveSettings(name=objective)
    audit, evaluation = replace(base.audit, every=0), replace(base.eval, every=0, pictures=1)
    return replace(base, objective=own, audit=audit, eval=evaluation, iterations=iterations, seed=seed)


# --- the work of a process --------------------------------------------------------------------------------------------


def trainer_of(config: Config, ranks: Ranks) -> Trainer:
    """The trainer of a run in a temporary folder."""
    run = Run(inputs_from(config, ranks), RunFolder(Path(tempfile.mkdtemp())), ranks)
    run.encode_prompts()
    return run.trainer


def records_of(trainer: Trainer, iterations: int) -> list[Metrics]:
    """The metrics of so many iterations."""
    return [trainer.step().record for _ in range(iterations)]


def in_one(weights: Sequence[Tensor]) -> Tensor:
    """All weights in one vector."""
    return torch.cat([weight.detach().flatten() for weight in weights])


class ReceivingCollector(Collector):
    """Takes rollouts from the sampler's process, and sends it the weights that the last one led to."""

    def __init__(self, config: Config, trainer: Trainer) -> None:
        settings = trainer.learner.objective.settings
        super().__init__(config, trainer.policy, trainer.reward, settings, trainer.plan_monitor, trainer.ranks)
        self._weights = list(trainer.policy.trainable.values())

    def rollout(self, batch: Batch, meter: Meter, watch: GroupWatch | None = None) -> Rollout:
        with meter.stage("sample"):
            received: list[Any] = [None]
            dist.recv_object_list(received, src=SAMPLER)
            if batch.iteration:
                dist.send(in_one(self._weights), dst=SAMPLER)
        rolled: Rollout = received[0]
        return rolled


def sample_for_the_learner(trainer: Trainer, config: Config) -> None:
    """Sample each iteration by the weights that the one before the last led to."""
    weights = list(trainer.policy.trainable.values())
    newer = torch.empty_like(in_one(weights))
    count = config.prompts.per_iteration
    for i in range(config.iterations):
        prompts = trainer.order.prompts_for(i, count)
        batch = Batch(i, prompts, torch.arange(count), NoiseKey(config.seed, i))
        dist.send_object_list([trainer.collector.rollout(batch, Meter())], dst=LEARNER)
        if i:
            dist.recv(newer, src=LEARNER)
            with torch.no_grad():
                for weight, value in zip(weights, newer.split([w.numel() for w in weights]), strict=True):
                    weight.copy_(value.view_as(weight))


class AgainstTheSampler(GRPO):
    """GRPO whose ratio is to the sampler's log-probs, also for a single update."""

    def prepare(self, policy: Policy, experience: Experience, microbatch: int, updates: int) -> Experience:
        path = experience.trajectories.path
        return experience.with_prepared(torch.stack([step.log_prob_N for step in path], dim=1))


def work(arm: str, config: Config, rank: int, port: int) -> list[Metrics]:
    """The records of one process of a cell; the sampler's process has none."""
    ranks = Ranks()
    trainer = trainer_of(resolve_dtype(config, ranks), ranks)
    if arm == "shared":
        return records_of(trainer, config.iterations)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    if arm == "corrected":
        learner = trainer.learner
        assert isinstance(learner.objective, GRPO)
        learner.objective = AgainstTheSampler(learner.objective.settings)
        learner.updater.objective = learner.objective
    if rank == SAMPLER:
        sample_for_the_learner(trainer, config)
        records = []
    else:
        trainer.collector = ReceivingCollector(config, trainer)
        records = records_of(trainer, config.iterations)
    dist.barrier()
    dist.destroy_process_group()
    return records


# --- cells ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One run of two processes."""

    arm: str
    objective: str
    seed: int
    iterations: int

    def run(self) -> dict[str, Any]:
        """Its records, and the seconds of a processor that both processes took."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own = [self.arm, self.objective, str(self.seed), str(self.iterations), str(port)]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        processes = []
        for rank in ("0", "1"):
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            env |= {**shared, "RANK": rank, "LOCAL_RANK": rank} if self.arm == "shared" else {}
            command = [sys.executable, __file__, "--work", *own, rank]
            processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        said = [process.communicate()[0] for process in reversed(processes)][::-1]
        if any(process.returncode for process in processes):
            raise SystemExit(f"{self} failed")
        results = [json.loads(text.splitlines()[-1]) for text in said]
        records = results[0]["records"] if self.arm == "shared" else results[1]["records"]
        kept = [{name: record[name] for name in KEPT if name in record} for record in records]
        return {**vars(self), "records": kept, "cpu_seconds": [result["cpu_seconds"] for result in results]}


def measure(iterations: int, seeds: Sequence[int], out: Path) -> None:
    cells = json.loads(out.read_text()) if out.exists() else []
    done = {(cell["arm"], cell["objective"], cell["seed"]) for cell in cells}
    for seed in seeds:
        for objective, arms in ARMS.items():
            for arm in arms:
                if (arm, objective, seed) not in done:
                    cells.append(Cell(arm, objective, seed, iterations).run())
                    write_text(out, json.dumps(cells, separators=(",", ":")) + "\n")
                    print(arm, objective, seed, f"{seconds(cells[-1]):.2f} s an iteration", flush=True)


# --- the page ---------------------------------------------------------------------------------------------------------


def seconds(cell: dict[str, Any]) -> float:
    """The mean seconds of an iteration, without the first ones."""
    return mean(record["seconds"] for record in cell["records"][WARM:])


def values(cells: Sequence[dict[str, Any]], name: str, records: slice) -> list[float]:
    """The mean of a metric over some iterations, by cell."""
    own = [[metric(record, name) for record in cell["records"][records]] for cell in cells]
    return [mean(v for v in record if v is not None) for record in own if any(v is not None for v in record)]


def shown(figures: Sequence[float], digits: int = 3) -> str:
    if not figures:
        return ""
    return f"{mean(figures):.{digits}f}" + (f" ± {stdev(figures):.{digits}f}" if len(figures) > 1 else "")


def page_table(cells: Sequence[dict[str, Any]]) -> str:
    rows = []
    for objective, arms in ARMS.items():
        by_arm = {arm: [c for c in cells if (c["arm"], c["objective"]) == (arm, objective)] for arm in arms}
        shared = {cell["seed"]: seconds(cell) for cell in by_arm["shared"]}
        for arm, own in by_arm.items():
            against = [seconds(cell) / shared[cell["seed"]] for cell in own if cell["seed"] in shared]
            rows.append(
                [
                    f"{objective}, {arm}",
                    str(len(own)),
                    shown([seconds(cell) for cell in own], 2),
                    shown(against, 2),
                    shown(values(own, "update/on_policy_deviation", slice(WARM, None))),
                    shown(values(own, "update/clip_fraction", slice(WARM, None))),
                    shown(values(own, "reward/mean", slice(-LAST, None))),
                ]
            )
    head = ["arm", "seeds", "seconds an iteration", "over shared", "largest abs(ratio - 1)", "clipped", "last rewards"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("docs/results/stale_sampling.json"))
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--work", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        arm, objective, *numbers = args.work
        seed, iterations, port, rank = map(int, numbers)
        quiet()
        torch.set_num_threads(1)
        start = time.process_time()
        records = work(arm, config_of(objective, seed, iterations), rank, port)
        print(json.dumps({"records": records, "cpu_seconds": time.process_time() - start}))
    elif args.page:
        print(page_table(json.loads(args.out.read_text())))
    else:
        measure(args.iterations, args.seeds, args.out)


if __name__ == "__main__":
    main()
