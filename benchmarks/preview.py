"""How well a preview ranks a group, by step: Spearman's correlation within a group with the final rewards.

    python benchmarks/preview.py [--groups 48] [--group-size 24] [--seeds 0 1 2] [--noise-level 0.7] [--json]

Groups run unpruned on validation prompts, all kinds in turn; groups without variance are left out. Per seed the mean over
groups, then mean and spread (std, ddof 1) over seeds.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from progrpo.config import ModelConfig
from progrpo.rewards.load import load_reward
from progrpo.rollout.denoise import Sampling
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan
from progrpo.rollout.prune import SELECTORS
from progrpo.training.audit import audit
from progrpo.training.build import policy_from
from progrpo.training.distributed import Ranks
from progrpo.zoo.shapes import world


def agreement(policy, seed: int, groups: int, group_size: int, noise_level: float, steps: int) -> list[float]:
    """Mean Spearman over groups, by step."""
    sampling = Sampling(policy.sigmas(steps), (noise_level,) * steps)
    reward, key = load_reward("shapes"), NoiseKey(seed, 0)
    found: list[list[float | None]] = []
    for slot, prompt in enumerate(world.sample_prompts("validation", groups, seed)):
        seen = audit(policy, reward, prompt, slot, Plan(group_size), sampling, SELECTORS["ovf"], key, Meter())
        found.append(seen.agreement())
    return [float(np.mean([v for v in step if v is not None])) for step in zip(*found, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-flow")
    parser.add_argument("--groups", type=int, default=48)
    parser.add_argument("--group-size", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--noise-level", type=float, default=0.7)
    parser.add_argument("--num-inference-steps", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    policy = policy_from(ModelConfig(path=wanted.model), 0, Ranks())
    by_seed = np.array(
        [
            agreement(policy, s, wanted.groups, wanted.group_size, wanted.noise_level, wanted.num_inference_steps)
            for s in wanted.seeds
        ]
    )
    spread = by_seed.std(axis=0, ddof=1) if len(by_seed) > 1 else np.zeros(by_seed.shape[1])
    result = {
        **vars(wanted),
        "mean": by_seed.mean(axis=0).round(3).tolist(),
        "std_over_seeds": spread.round(3).tolist(),
    }
    if wanted.json:
        print(json.dumps(result, indent=1))
        return
    for step, (mean, std) in enumerate(zip(result["mean"], result["std_over_seeds"], strict=True)):
        print(f"step {step}: {mean:.2f} +- {std:.2f}")


if __name__ == "__main__":
    main()
