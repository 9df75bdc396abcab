"""The accuracy of a reward model on a hidden taste, by the number of pairs and the share of flipped labels.

    OMP_NUM_THREADS=1 python benchmarks/reward_model.py [--pairs 50 200 1000 5000] [--flips 0 0.1 0.2 0.4]
        [--seeds 0 1 2] [--prompts 1250 250] [--json docs/results/reward_model.json] [--pictures FOLDER]
    python benchmarks/reward_model.py --table docs/results/reward_model.json

The base `shapes-flow` draws 8 pictures for each of 1,250 training prompts and 16 for each of 250 test prompts, in 6
steps of the ODE, as the quickstart samples. A pair is two pictures of a prompt; no picture is in two pairs. The label
is which of them the hidden reward puts higher, flipped with the given probability. Heads are those of `progrpo
reward-model train`: 8 members on the built-in backbone. `--pictures` keeps what was drawn, for another run.

accuracy  the share of 2,000 pairs of test prompts, with clean labels, whose order the score gives
plain     the same with --label-noise 0: flipped labels are not modelled
spearman  the rank correlation with the hidden reward among the 16 pictures of a test prompt, mean over prompts
ece       the expected calibration error on the test pairs, labels flipped at the rate of the training pairs
seconds   of fitting, without the features, which take some 2 ms a picture

`shapes_taste` is one taste for all prompts. `shapes_match` depends on the prompt, object by object; it has 1,000 pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from reward_shape import sampler_of

from progrpo.durable import write_text
from progrpo.policies.load import quiet
from progrpo.preferences.bradley_terry import accuracy, calibration, label_probability
from progrpo.preferences.reward_model.backbone import Features
from progrpo.preferences.reward_model.fitting import FitSettings, fit_ensemble
from progrpo.preferences.reward_model.head import Comparisons
from progrpo.preferences.reward_model.shapes import ShapesBackbone
from progrpo.rewards.load import load_reward
from progrpo.rewards.settings import RewardTerm
from progrpo.rollout.denoise import denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.preview import decoded
from progrpo.tracking.statistics import spearman
from progrpo.zoo.shapes import world

SPLITS = {"train": (8, 2), "test": (16, 1)}
"""Pictures of each prompt, and the seed."""
COMMAND = "OMP_NUM_THREADS=1 python benchmarks/reward_model.py --json docs/results/reward_model.json"
STEPS, AT_ONCE, TEST_PAIRS = 6, 64, 2000


@dataclass(frozen=True)
class Drawn:
    """The pictures of a split, prompt by prompt, as features and hidden rewards."""

    group: int
    features: Features
    rewards: dict[str, torch.Tensor]

    @property
    def prompts(self) -> int:
        return len(self.features.blocks[0]) // self.group


def sampled(split: str, count: int) -> np.ndarray:
    """The pictures of `count` prompts of a split: uint8 (N, 64, 64, 3), prompt-major."""
    group, seed = SPLITS[split]
    sampler, prompts = sampler_of("dgpo", STEPS, AT_ONCE), world.sample_prompts(split, count, seed)
    parts = []
    for start in range(0, count, AT_ONCE // group):
        some = prompts[start : start + AT_ONCE // group]
        slots = torch.arange(start, start + len(some))
        batch = expand(sampler.policy, slots, group, sampler.sampling, NoiseKey(seed, 0))
        denoiser = sampler.denoiser(sampler.policy.encode(some))
        final = denoise(denoiser, batch, NoiseKey(seed, 0), Meter())
        parts.append(decoded(sampler.policy, final.x_NCHW, AT_ONCE).images_NHWC.numpy())
    return np.concatenate(parts)


def drawn(split: str, count: int, folder: Path) -> Drawn:
    group, seed = SPLITS[split]
    file = folder / f"{split}-{count}.npy"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(file, sampled(split, count))
    pictures = np.load(file)
    prompts = [prompt for prompt in world.sample_prompts(split, count, seed) for _ in range(group)]
    rewards = {
        name: torch.tensor([s.number() for s in load_reward(RewardTerm(name)).score(pictures, prompts)])
        for name in ("shapes_taste", "shapes_match")
    }
    return Drawn(group, ShapesBackbone().features(list(pictures), prompts), rewards)


def compared(drawn: Drawn, reward: str, count: int, flip: float, seed: int) -> Comparisons:
    """`count` pairs of pictures of one prompt, spread over the prompts, no picture twice."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(drawn.prompts)
    halves = np.stack([rng.permutation(drawn.group).reshape(-1, 2) for _ in range(drawn.prompts)])
    rows = (halves[order] + (order * drawn.group)[:, None, None]).transpose(1, 0, 2).reshape(-1, 2)[:count]
    assert len(rows) == count
    first, second = torch.tensor(rows[:, 0]), torch.tensor(rows[:, 1])
    preference = (drawn.rewards[reward][first] > drawn.rewards[reward][second]).double()
    flipped = torch.tensor(rng.random(count) < flip)
    preference = torch.where(flipped, 1 - preference, preference)
    return Comparisons(first, second, preference, torch.ones_like(preference), first // drawn.group)


def cell(data: dict[str, Drawn], reward: str, count: int, flip: float, seed: int) -> dict[str, Any]:
    train, test = data["train"], data["test"]
    pairs = compared(train, reward, count, flip, seed)
    started = time.perf_counter()
    fit = fit_ensemble(train.features, pairs, FitSettings(seed=seed))
    seconds = time.perf_counter() - started
    plain = fit_ensemble(train.features, pairs, FitSettings(flip_rate=0.0, seed=seed)).ensemble
    score_N, plain_N = (ensemble.scores(test.features).mean(0) for ensemble in (fit.ensemble, plain))
    test_pairs = min(TEST_PAIRS, test.prompts * test.group // 2)
    clean, flipped = (compared(test, reward, test_pairs, rate, 0) for rate in (0.0, flip))
    truth_N, group = test.rewards[reward], test.group
    slices = [slice(i, i + group) for i in range(0, len(truth_N), group)]
    orders = [spearman(score_N[rows].numpy(), truth_N[rows].numpy()) for rows in slices]
    chance_M = label_probability(clean.margins(score_N) / fit.ensemble.temperature, fit.ensemble.flip_rate)
    return {
        "reward": reward,
        "pairs": count,
        "flips": flip,
        "seed": seed,
        "accuracy": accuracy(clean.margins(score_N), clean.preference_M).value,
        "plain": accuracy(clean.margins(plain_N), clean.preference_M).value,
        "spearman": mean(order for order in orders if order is not None),
        "ece": calibration(chance_M, flipped.preference_M).error,
        "label_noise": fit.ensemble.flip_rate,
        "cross_validated": accuracy(fit.margin_M, fit.judged.preference_M).value,
        "seconds": seconds,
    }


def table(results: list[dict[str, Any]]) -> str:
    """A row per number of pairs and share of flipped labels: means over seeds, of the accuracy with its spread."""
    lines = [
        "| hidden reward | pairs | flipped | accuracy | plain | Spearman | ECE | estimated noise | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((r["reward"], r["pairs"], r["flips"]) for r in results):
        rows = [r for r in results if (r["reward"], r["pairs"], r["flips"]) == key]

        def of(name: str, rows: list[dict[str, Any]] = rows) -> float:
            return mean(r[name] for r in rows)

        spread = stdev(r["accuracy"] for r in rows) if len(rows) > 1 else 0.0
        lines.append(
            f"| {key[0]} | {key[1]:,} | {key[2]:.0%} | {of('accuracy'):.1%} ± {spread:.1%} | {of('plain'):.1%} |"
            f" {of('spearman'):.2f} | {of('ece'):.3f} | {of('label_noise'):.0%} | {of('seconds'):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[50, 200, 1000, 5000])
    parser.add_argument("--flips", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, nargs=2, default=[1250, 250], help="of training and of the test")
    parser.add_argument("--pictures", type=Path, help="a folder that keeps what was drawn")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="write the figures, or print them")
    parser.add_argument("--table", type=Path, help="print the table of such a file, and measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["results"]))
        return
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.pictures or Path(scratch)
        data = {split: drawn(split, count, folder) for split, count in zip(SPLITS, options.prompts, strict=True)}
    cells = [("shapes_taste", count, flip) for count in options.pairs for flip in options.flips]
    cells += [("shapes_match", 1000, flip) for flip in options.flips if 1000 in options.pairs and flip <= 0.2]
    results = []
    for reward, count, flip in cells:
        for seed in options.seeds:
            results.append(cell(data, reward, count, flip, seed))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
            content = {"command": COMMAND, "results": results}
            if options.json:
                write_text(Path(options.json), json.dumps(content, indent=1) + "\n")
    print(json.dumps(content) if options.json == "" else table(results))


if __name__ == "__main__":
    main()
