"""Whether two versions of the code compute the same runs: metrics, weights and checkpoints, bit for bit.

    git worktree add build/other COMMIT
    python benchmarks/same_runs.py train build/other/src runs/other
    python benchmarks/same_runs.py train src runs/own
    python benchmarks/same_runs.py compare runs/other runs/own

`train` runs the recipe `smoke` in the variants below, and stops and resumes each. `compare` ends with status 1 where a
number differs. What depends on the clock is left out, and so are names that are only in one of both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

RENAMED = {"plan/pays": "plan/value", "pays": "value"}
"""Names of metrics and of a checkpoint's entries that are others now: the older name, the newer."""

NOT_COMPARED = (
    *("seconds", "time/", "wall_seconds", "units", "recorded"),  # depends on the clock,
    *("plan", "value"),  # and so does the plan that an adaptive run chooses;
    *("versions", "command", "config"),  # how a file is written
)

VARIANTS: dict[str, str] = {
    "grpo": "",
    "grpo_guard": "--sampling.sampler cps --objective.grpo.ratio guard --objective.grpo.kl-beta 0.1"
    " --objective.grpo.step-weights noise --optim.updates-per-rollout 2",
    "grpo_kl_forms": "--objective.grpo.kl-beta 0.1 --objective.grpo.kl-form flow_grpo --sampling.sampler dance"
    " --optim.decay 0.5 --optim.warmup 1",
    "nft": "--objective.name nft --preview.decoder tiny --preview.ode-steps 2",
    "awm": "--objective.name awm --objective.awm.weighting ghuber --model.weights full --optim.updates-per-rollout 2",
    "dgpo": "--objective.name dgpo --model.path shapes-diffusion --sampling.num-inference-steps 6",
    "precise": "--sampling.sampler precise --sampling.noise-level 1.2",
    "elbo": "--objective.name elbo --optim.updates-per-rollout 2",
    "diffusion": "--model.path shapes-diffusion --model.step-ends next --sampling.guidance-scale 2",
    "averages": "--optim.ema-decay 0.9 --eval.every 1 --eval.keep-best --eval.rewards shapes_strict",
    "two_rewards": "--reward.terms shapes 0.5*jpeg_compressibility --objective.advantage gdpo --reward.waves 2",
    "gated": '--reward.terms shapes {"name":"shapes_strict","needs":"shapes","at_least":0.4}'
    " --objective.advantage batch --plan.selector top_bottom",
    "posthoc": "--plan.prune --plan.final-keep 4 --objective.baseline group --plan.selector uniform",
    "adaptive": "--plan.adaptive --audit.every 1 --preview.probe --preview.probe-threshold -1",
    "reused": "--optim.reuse-rollout --plan.selector none",
    "window": "--sampling.sde-window sliding --sampling.sde-window-size 2 --sampling.same-latent"
    " --sampling.latent-dtype bfloat16 --sampling.sde-window-interval 1 --plan.prune 4 4",
    "bfloat16": "--model.dtype bfloat16 --prompts.order signal",
    "narrow": "--model.dtype float16 --sampling.microbatch 5 --optim.microbatch 7",
}
ITERATIONS = 3


def train(source: Path, out: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(source.resolve())}
    for name, options in VARIANTS.items():
        if (out / name / "summary.json").is_file():
            continue
        command = [sys.executable, "-m", "progrpo", "train"]
        words = ["smoke", "--out", str(out / name), "--overwrite", "--iterations", "1", "--eval.pictures", "6"]
        steps = [
            [*command, *words, *options.split()],
            [*command, "--resume", str(out / name), "--iterations", str(ITERATIONS)],
        ]
        for step in steps:
            done = subprocess.run(step, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: {' '.join(step)}\n{done.stdout}{done.stderr}")
        print(f"{name}: trained", flush=True)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each number or text of nested JSON data by its path, under its present name."""
    if isinstance(value, dict):
        for key, part in value.items():
            name = RENAMED.get(key) or key
            if not name.startswith(NOT_COMPARED):
                yield from leaves(part, f"{path}/{name}")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from leaves(part, f"{path}[{i}]")
    else:
        yield path, value


def numbers(run: Path) -> dict[str, Any]:
    """The numbers of a run by file and name, with tensors as they are."""
    values: dict[str, Any] = {}
    for i, line in enumerate((run / "metrics.jsonl").read_text().splitlines()):
        values |= {f"metrics[{i}]{name}": value for name, value in leaves(json.loads(line))}
    for file in (*run.glob("evaluation/*.json"), *run.glob("audit/*.json"), *run.glob("checkpoints/*/state.json")):
        values |= {f"{file.relative_to(run)}{name}": value for name, value in leaves(json.loads(file.read_text()))}
    for file in run.rglob("*.safetensors"):
        values |= {f"{file.relative_to(run)}/{name}": tensor for name, tensor in load_file(file).items()}
    return values


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and bool(one.view(torch.uint8).eq(other.view(torch.uint8)).all())
            if one.ndim
            else bool(one.eq(other))
        )
    return one == other or (one != one and other != other)


def compare(one: Path, other: Path) -> bool:
    same = True
    for name in VARIANTS:
        left, right = numbers(one / name), numbers(other / name)
        both = left.keys() & right.keys()
        different = sorted(key for key in both if not equal(left[key], right[key]))
        tensors = sum(isinstance(left[key], torch.Tensor) for key in both)
        alone = sorted(left.keys() ^ right.keys())
        print(
            f"{name}: {len(both) - tensors} values and {tensors} tensors are in both, {len(different)} of them differ;"
            f" {len(alone)} are in one alone{': ' + ', '.join(alone[:4]) if alone else ''}"
        )
        for key in different[:5]:
            print(f"  differs: {key}")
        same = same and not different and bool(both)
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "compare"))
    parser.add_argument("first", type=Path, help="the sources to train with, or a folder of runs")
    parser.add_argument("second", type=Path, help="where the runs go, or the other folder of runs")
    given = parser.parse_args()
    if given.what == "train":
        train(given.first, given.second)
    elif not compare(given.first, given.second):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
