"""How well a preview ranks a group, by step: Spearman's correlation within a group with the final rewards.

    python benchmarks/preview.py [--models shapes-flow shapes-diffusion] [--groups 24] [--group-size 24] [--seeds 0 1 2] [--json]

Every step is stochastic, by the model's own sampler at its published noise level. Groups run unpruned on validation
prompts, all kinds in turn; groups without variance are left out. Per seed the mean over groups, then mean and spread
(std, ddof 1) over seeds.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from progrpo.config import Config, ModelConfig, SamplingConfig
from progrpo.policies.base import Policy
from progrpo.rewards.load import load_reward
from progrpo.rollout.denoise import Sampling
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan
from progrpo.rollout.prune import SELECTORS
from progrpo.training.audit import audit
from progrpo.training.build import policy_from, sampling_from
from progrpo.training.distributed import Ranks
from progrpo.zoo.shapes import world


def agreement(policy: Policy, sampling: Sampling, seed: int, groups: int, group_size: int) -> list[float]:
    """Mean Spearman over groups, by step."""
    reward, key = load_reward("shapes"), NoiseKey(seed, 0)
    found: list[list[float | None]] = []
    for slot, prompt in enumerate(world.sample_prompts("validation", groups, seed)):
        seen = audit(policy, reward, prompt, slot, Plan(group_size), sampling, SELECTORS["ovf"], key, Meter())
        found.append(seen.agreement())
    return [float(np.mean([v for v in step if v is not None])) for step in zip(*found, strict=True)]


def measured(model: str, wanted: argparse.Namespace) -> dict[str, Any]:
    policy = policy_from(ModelConfig(path=model), 0, Ranks())
    config = Config(sampling=SamplingConfig(num_inference_steps=wanted.num_inference_steps))
    sampling = sampling_from(config, policy, "transitions", 0)
    by_seed = np.array([agreement(policy, sampling, s, wanted.groups, wanted.group_size) for s in wanted.seeds])
    spread = by_seed.std(axis=0, ddof=1) if len(by_seed) > 1 else np.zeros(by_seed.shape[1])
    return {
        "sampler": sampling.process.sampler,
        "noise_level": sampling.process.noise_levels[0],
        "noise_share": [round(s, 4) for s in noise_share(sampling)],
        "by_seed": by_seed.round(3).tolist(),
        "mean": by_seed.mean(axis=0).round(3).tolist(),
        "std_over_seeds": spread.round(3).tolist(),
    }


def noise_share(sampling: Sampling) -> list[float]:
    """sigma / (alpha + sigma) before each step: what makes steps of the two families comparable."""
    levels = sampling.process.levels_T1
    share: list[float] = (levels.sigma / (levels.alpha + levels.sigma))[:-1].tolist()
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["shapes-flow", "shapes-diffusion"])
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--group-size", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-inference-steps", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    found = {model: measured(model, wanted) for model in wanted.models}
    if wanted.json:
        print(json.dumps({**vars(wanted), "models": found}, indent=1))
        return
    for model, result in found.items():
        print(f"{model}, {result['sampler']} {result['noise_level']:g}")
        for step, (mean, std) in enumerate(zip(result["mean"], result["std_over_seeds"], strict=True)):
            print(f"  step {step}: {mean:.2f} +- {std:.2f}")


if __name__ == "__main__":
    main()
