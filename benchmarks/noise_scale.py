"""The gradient noise scale of objectives and rewards on a built-in model: the prompts an update needs.

    python benchmarks/noise_scale.py [--rewards shapes_match shapes_taste] [--trials NAME ...] [--batches 12]
        [--out docs/results/noise_scale.json]
    python benchmarks/noise_scale.py --table

The noise scale is the number of prompts at which the mean gradient of an update is as long as its noise
(arXiv 1812.06162): the trace of one prompt's covariance over the squared length of the true gradient. Plain groups of
24 of the base `shapes-flow` are sampled, and their gradient is taken without a step, batch after batch of `PROMPTS`
prompts. Inner products of different batches estimate the signal, so that their noise does not add to it. Lengths are
AdamW's: a weight counts by its gradient over the root of its root mean square, as in benchmarks/plan_value.py.

Where the signal is within two standard errors of zero, the noise scale is only known to be above the number that the
upper end leaves. Finished trials in `--out` are kept and not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch
from road_to_reward import PLAIN, PROMPTS
from search import Changes, changed, config_of, rewarded
from torch import Tensor
from when_pruning_pays import batch_gradients

from progrpo.config import Config
from progrpo.durable import write_text
from progrpo.policies.load import quiet
from progrpo.rewards.mixture import load_mixture
from progrpo.training.build import policy_context, policy_from, resolve_dtype, train_order
from progrpo.training.distributed import Ranks
from progrpo.training.trainer import Trainer

CHUNK = 72  # items of a backward pass
ODE: Changes = {"sampling": {"num_inference_steps": 8}}
TRIALS: dict[str, Changes] = {
    "grpo": PLAIN,
    "grpo, steps by noise": changed(PLAIN, {"objective": {"grpo": {"step_weights": "noise"}}}),
    "grpo, first 3 steps": changed(PLAIN, {"sampling": {"sde_window": "first"}}),
    **{
        name: changed(PLAIN, {**ODE, "objective": {"name": name, name: {"draws": 2}}})
        for name in ("dgpo", "awm", "elbo", "nft")
    },
}


class Scale(TypedDict):
    """The moments of a trial's gradients, and the noise scale in prompts; `least` is its lower 97.5 % bound."""

    reward: str
    trial: str
    prompts: int
    signal: float
    error: float
    noise: float
    scale: float | None
    least: float
    cpu_seconds: float
    """Of a prompt."""


def gradients(config: Config, batches: int) -> Tensor:
    """The mean gradient of each batch of prompts by all trained weights (B, weights)."""
    ranks = Ranks()
    config = resolve_dtype(config, ranks)
    policy = policy_from(config.model, policy_context(config, ranks))
    reward = load_mixture(config.reward.terms, config.reward.frames)
    order = train_order(config.prompts, config.seed)
    trainer = Trainer(config, policy, reward, order, ranks)
    prompts = [order.prompts_for(number, PROMPTS) for number in range(batches)]
    return batch_gradients(trainer, prompts, config.seed, CHUNK)


def scale_of(rows_BD: Tensor) -> tuple[float, float, float]:
    """The signal, its standard error over batches by the jackknife, and the noise of one prompt."""
    scaled_BD = rows_BD * rows_BD.square().mean(0).clamp_min(1e-24).pow(-0.25)
    products_BB = (scaled_BD @ scaled_BD.T).double()
    signal = _between(products_BB)
    rest = [_between(_without(products_BB, batch)) for batch in range(len(products_BB))]
    spread = torch.tensor(rest).var(correction=0)
    error = float(((len(rest) - 1) * spread).sqrt())
    noise = PROMPTS * (float(products_BB.diagonal().mean()) - signal)
    return signal, error, noise


def _between(products_BB: Tensor) -> float:
    count = len(products_BB)
    return float(products_BB.sum() - products_BB.diagonal().sum()) / (count * (count - 1))


def _without(products_BB: Tensor, batch: int) -> Tensor:
    others = torch.arange(len(products_BB)) != batch
    return products_BB[others][:, others]


def measure(reward: str, trial: str, batches: int) -> Scale:
    config = config_of(changed(TRIALS[trial], rewarded(reward)), 0)
    began = time.process_time()
    signal, error, noise = scale_of(gradients(config, batches))
    prompts = PROMPTS * batches
    return {
        "reward": reward,
        "trial": trial,
        "prompts": prompts,
        "signal": signal,
        "error": error,
        "noise": noise,
        "scale": noise / signal if signal > 2 * error else None,
        "least": noise / max(signal + 2 * error, 1e-30),
        "cpu_seconds": round((time.process_time() - began) / prompts, 3),
    }


def table(scales: Sequence[Scale]) -> str:
    """A row for each trial, those of one reward together."""
    lines = ["| reward | objective | noise scale, prompts | core seconds a prompt |", "|---|---|---|---|"]
    for s in sorted(scales, key=lambda scale: scale["reward"]):
        number = f"above {s['least']:.0f}" if s["scale"] is None else f"{s['scale']:.0f} (above {s['least']:.0f})"
        lines.append(f"| `{s['reward']}` | {s['trial']} | {number} | {s['cpu_seconds']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", default=["shapes_match", "shapes_taste"])
    parser.add_argument("--trials", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("docs/results/noise_scale.json"))
    parser.add_argument("--table", action="store_true", help="print what is there and run nothing")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    scales: list[Scale] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for reward in arguments.rewards if not arguments.table else ():
        for trial in arguments.trials:
            if any((s["reward"], s["trial"]) == (reward, trial) for s in scales):
                continue
            scales.append(measure(reward, trial, arguments.batches))
            print(scales[-1], flush=True)
            write_text(arguments.out, json.dumps(scales, indent=1) + "\n")
    print(table(scales))


if __name__ == "__main__":
    main()
