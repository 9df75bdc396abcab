"""The gain that a reward's shape leaves to a selector on the base model: the variance of the kept half and quarter.

    python benchmarks/reward_shape.py [--rewards shapes_match shapes_taste shapes_mixed] [--prompts 48]
        [--group-size 24] [--ode-steps 8] [--sde-steps 10] [--seed 0] [--json [FILE]]

Groups of the base `shapes-flow` run unpruned on training prompts, all kinds in turn: by the ODE, and by Flow-GRPO's SDE
with noise at every step. V is the variance of the final rewards of the members that OVF keeps, over that of the whole
group. A plan's signal is k V (progrpo.rollout.plan_value). A normal reward has V = 1.86 at half of a large group, one
with two values at most 1 / (4 p (1 - p)) for the share p of the higher one, so 1 where both are equally frequent.

finals    V where OVF chooses by final rewards: the most that any preview can reach
previews  V where it chooses by the x0 preview after each step, and Spearman's correlation of that preview with the end

Figures are means over groups. Groups whose final rewards are all equal are left out and counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from progrpo.config import Config, ModelSettings, ObjectiveSettings, SamplingSettings
from progrpo.policies.load import quiet
from progrpo.rewards.base import Reward
from progrpo.rewards.load import load_reward
from progrpo.rewards.mixture import load_mixture
from progrpo.rewards.settings import RewardTerm
from progrpo.rollout.denoise import denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.preview import decoded, projected
from progrpo.rollout.prune import ovf
from progrpo.rollout.sampler import Sampler
from progrpo.tracking.statistics import spearman
from progrpo.training.build import objective_from, policy_context, policy_from, resolve_dtype, sampling_from
from progrpo.training.distributed import Ranks
from progrpo.types import Prompt, Trajectories
from progrpo.zoo.shapes import world

KEPT = {"half": 2, "quarter": 4}


def sampler_of(objective: str, steps: int, group_size: int) -> Sampler:
    """The sampling of an objective on the base model: `dgpo` takes the ODE, `grpo` noise at every step."""
    config, ranks = Config(), Ranks()
    config = replace(
        config,
        model=ModelSettings(dtype="auto"),
        sampling=SamplingSettings(num_inference_steps=steps, microbatch=group_size),
        objective=ObjectiveSettings(name=objective),
    )
    config = resolve_dtype(config, ranks)
    policy = policy_from(config.model, policy_context(config, ranks))
    sampling = sampling_from(config, policy, objective_from(config, policy).settings.stores, 0)
    sampling = replace(sampling, record=replace(sampling.record, steps=frozenset()))
    return Sampler(policy, load_mixture((RewardTerm("shapes"),), frames=1), sampling)


def pictures_of(sampler: Sampler, prompt: Prompt, slot: int, group_size: int, seed: int) -> np.ndarray:
    """The group's x0 previews after every step and its final pictures: uint8 (T + 1, G, H, W, 3)."""
    condition, latents = sampler.policy.encode([prompt]), []
    denoiser = sampler.denoiser(condition)

    def watch(step: int, batch: Trajectories) -> Trajectories:
        latents.append(projected(denoiser, batch, step, 1, Meter()))
        return batch

    batch = expand(sampler.policy, torch.tensor([slot]), group_size, sampler.sampling, NoiseKey(seed, 0))
    latents.append(denoise(denoiser, batch, NoiseKey(seed, 0), Meter(), watch).x_NCHW)
    return np.stack([decoded(sampler.policy, x0, group_size).images_NHWC.numpy() for x0 in latents])


def held(chosen_by_G: np.ndarray, final_G: np.ndarray, keep: int) -> float:
    """V: the variance of the final rewards of the members that OVF keeps, over that of all."""
    scores_PG = torch.tensor(chosen_by_G)[None]
    kept = ovf(scores_PG, keep, torch.ones_like(scores_PG, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    return float(final_G[kept.indices_PK[0].numpy()].var() / final_G.var())


def shape_of(scores: list[np.ndarray]) -> dict[str, Any]:
    """The figures of one reward from the scores (T + 1, G) of each group, the last row being the final rewards."""
    telling = [group for group in scores if np.ptp(group[-1]) > 0]
    finals = np.stack([group[-1] for group in scores])
    shape: dict[str, Any] = {
        "mean": float(finals.mean()),
        "std_within_groups": float(np.sqrt(finals.var(axis=1).mean())),
        "std_between_groups": float(finals.mean(axis=1).std()),
        "groups_without_variance": len(scores) - len(telling),
        "spearman": over_groups([[spearman(seen, group[-1]) or 0.0 for seen in group[:-1]] for group in telling]),
    }
    for name, part in KEPT.items():
        by_step = [[held(seen, group[-1], len(group[-1]) // part) for seen in group] for group in telling]
        *shape[f"V_{name}_previews"], shape[f"V_{name}_finals"] = over_groups(by_step)
    return shape


def over_groups(by_group: list[list[float]]) -> list[float]:
    means: list[float] = np.mean(by_group, axis=0).round(3).tolist()
    return means


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rewards = {name: load_reward(RewardTerm(name)) for name in arguments.rewards}
    samplers: dict[str, Any] = {}
    for name, objective, steps in (("ode", "dgpo", arguments.ode_steps), ("sde", "grpo", arguments.sde_steps)):
        sampler = sampler_of(objective, steps, arguments.group_size)
        scores: dict[str, list[np.ndarray]] = {reward_name: [] for reward_name in rewards}
        seconds = dict.fromkeys(rewards, 0.0)
        for slot, prompt in enumerate(world.sample_prompts("train", arguments.prompts, arguments.seed)):
            pictures_TGHWC = pictures_of(sampler, prompt, slot, arguments.group_size, arguments.seed)
            for reward_name, reward in rewards.items():
                start = time.process_time()
                scores[reward_name].append(np.stack([values(reward, pictures, prompt) for pictures in pictures_TGHWC]))
                seconds[reward_name] += time.process_time() - start
        pictures = arguments.prompts * arguments.group_size * (steps + 1)
        samplers[name] = {
            reward_name: {**shape_of(groups), "ms_a_picture": 1000 * seconds[reward_name] / pictures}
            for reward_name, groups in scores.items()
        }
        print(f"{name}: done", file=sys.stderr, flush=True)
    return samplers


def values(reward: Reward, pictures_GHWC: np.ndarray, prompt: Prompt) -> np.ndarray:
    return np.array([score.number() for score in reward.score(pictures_GHWC, [prompt] * len(pictures_GHWC))])


def table(samplers: dict[str, Any]) -> str:
    lines = []
    for name, rewards in samplers.items():
        lines += [f"{name}: V by finals, then V (Spearman) by the preview after each step", ""]
        steps = len(next(iter(rewards.values()))["spearman"])
        heads = ["Reward", "mean", "std", "kept", "finals", *map(str, range(steps))]
        lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for reward_name, shape in rewards.items():
            for kept in KEPT:
                pairs = zip(shape[f"V_{kept}_previews"], shape["spearman"], strict=True)
                cells = [reward_name, f"{shape['mean']:.2f}", f"{shape['std_within_groups']:.2f}", kept]
                cells += [f"{shape[f'V_{kept}_finals']:.2f}", *(f"{v:.2f} ({rho:.2f})" for v, rho in pairs)]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", default=["shapes_match", "shapes_taste", "shapes_mixed"])
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--group-size", type=int, default=24)
    parser.add_argument("--ode-steps", type=int, default=8)
    parser.add_argument("--sde-steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", nargs="?", const="-", help="print JSON, or write it to a file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    samplers = measure(arguments)
    options = {name: value for name, value in vars(arguments).items() if name != "json"}
    content = json.dumps({**options, "torch": torch.__version__, "samplers": samplers}, indent=1) + "\n"
    if arguments.json not in (None, "-"):
        Path(arguments.json).write_text(content)
    print(content if arguments.json == "-" else table(samplers))


if __name__ == "__main__":
    main()
