"""The agreement of previews with final rewards: Spearman's correlation within a group, by step and by kind of preview.

    python benchmarks/preview.py [--models shapes-flow shapes-diffusion] [--objective grpo] [--groups 24]
        [--group-size 24] [--seeds 0 1 2] [--probe-groups 50 100 200 300] [--window W] [--json]

Kinds: the one-step projection by the full decoder (`x0`) and by the tiny one (`tiny`); two and three steps of the ODE
(`ode 2`, `ode 3`: one and two network calls more); and a probe after each number of `--probe-groups` other groups, of
training prompts. `--objective grpo` samples with noise at every step, by the model's own sampler at its published noise
level; `dgpo` and others sample without noise; with `--window` only the first so many steps have noise. Groups run
unpruned on validation prompts, all kinds in turn; groups without variance are left out. Figures are the mean over
groups for each seed, then mean and std (ddof 1) over seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from progrpo.config import Config, ModelSettings, ObjectiveSettings, PreviewSettings, SamplingSettings
from progrpo.policies.base import Policy
from progrpo.rewards.base import Scorer
from progrpo.rewards.mixture import load_mixture
from progrpo.rewards.settings import RewardTerm
from progrpo.rollout.denoise import denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.preview import preview, score
from progrpo.rollout.probe import Probe, probe_examples, text_features
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import Sampling, sampler_name
from progrpo.tracking.statistics import hit_rate, spearman
from progrpo.training.build import objective_from, policy_context, policy_from, resolve_dtype, sampling_from
from progrpo.training.distributed import Ranks
from progrpo.types import Prompt, Trajectories
from progrpo.zoo.shapes import world

WAYS = {
    "x0": PreviewSettings(),
    "tiny": PreviewSettings(decoder="tiny"),
    "ode 2": PreviewSettings(ode_steps=2),
    "ode 3": PreviewSettings(ode_steps=3),
}


class Bench:
    def __init__(self, policy: Policy, reward: Scorer, sampling: Sampling, group_size: int) -> None:
        self.policy, self.sampling, self.group_size = policy, sampling, group_size
        self.sampler = Sampler(policy, reward, sampling)

    def group(
        self, prompt: Prompt, slot: int, seed: int, ways: dict[str, PreviewSettings]
    ) -> tuple[dict[str, list[np.ndarray]], torch.Tensor, Trajectories]:
        """The scores of each kind by step, final rewards, and the finished group."""
        seen: dict[str, list[np.ndarray]] = {name: [] for name in ways}
        condition, key = self.policy.encode([prompt]), NoiseKey(seed, 0)

        def watch(step: int, batch: Trajectories) -> Trajectories:
            for name, way in ways.items():
                sampler = replace(self.sampler, preview_settings=way)
                seen[name].append(preview(sampler, [prompt], condition, batch, step, Meter())[1].numpy())
            return batch

        batch = expand(self.policy, torch.tensor([slot]), self.group_size, self.sampling, key)
        batch = denoise(self.sampler.denoiser(condition), batch, key, Meter(), watch)
        final = score(self.sampler, [prompt], batch.group_N, batch.x_NCHW, Meter())[1].ranking_N
        return seen, final, batch

    def probes(self, counts: list[int], seed: int) -> dict[str, Probe]:
        """The probe after each of these counts of groups of training prompts, one after another, as from audits."""
        probe, found = Probe(self.sampling.num_inference_steps, seed), {}
        for i, prompt in enumerate(world.sample_prompts("train", max(counts), seed)):
            seen, final, batch = self.group(prompt, 10_000 + i, seed, {"x0": WAYS["x0"]})
            previews_TN = torch.tensor(np.stack(seen["x0"]))
            probe.learn(list(probe_examples(batch, self.policy.encode([prompt]), final, previews_TN).values()))
            if i + 1 in counts:
                found[f"probe {i + 1}"] = copy.deepcopy(probe)
        return found

    def measure(self, groups: int, seed: int, probes: dict[str, Probe]) -> dict[str, dict[str, list[float]]]:
        """The rank correlation and hit rate of half the group by kind: the mean over groups at each step."""
        found: dict[str, list[tuple[list[float | None], list[float | None]]]] = {}
        for slot, prompt in enumerate(world.sample_prompts("validation", groups, seed)):
            seen, final, batch = self.group(prompt, slot, seed, WAYS)
            told = text_features(self.policy.encode([prompt]))
            for name, probe in probes.items():
                seen[name] = [
                    probe.score(t, g, told, batch.group_N).numpy() for t, g in enumerate(batch.latent_features)
                ]
            truth, keep = final.numpy(), self.group_size // 2
            for name, steps in seen.items():
                ranked = [spearman(s, truth) for s in steps], [hit_rate(s, truth, keep) for s in steps]
                found.setdefault(name, []).append(ranked)
        return {
            name: {kind: means([g[i] for g in by_group]) for i, kind in enumerate(("spearman", "hit_rate"))}
            for name, by_group in found.items()
        }


def means(by_group: list[list[float | None]]) -> list[float]:
    """The means by step, over the groups that have a value."""
    return [float(np.mean([v for v in step if v is not None])) for step in zip(*by_group, strict=True)]


def measured(model: str, wanted: argparse.Namespace) -> dict[str, Any]:
    ranks, asked = Ranks(), PreviewSettings(decoder="tiny", probe=True)
    config = Config(
        model=ModelSettings(path=model, dtype="auto"),
        sampling=SamplingSettings(
            num_inference_steps=wanted.num_inference_steps,
            microbatch=wanted.group_size,
            sde_window="first" if wanted.window else "auto",
            sde_window_size=wanted.window or 1,
        ),
        objective=ObjectiveSettings(name=wanted.objective),
        preview=asked,
    )
    config = resolve_dtype(config, ranks)
    policy = policy_from(config.model, policy_context(config, ranks))
    sampling = sampling_from(config, policy, objective_from(config, policy).settings.stores, 0)
    sampling = replace(sampling, record=replace(sampling.record, steps=frozenset()))
    bench = Bench(policy, load_mixture([RewardTerm("shapes")], frames=1), sampling, wanted.group_size)
    by_seed = []
    for seed in wanted.seeds:
        by_seed.append(bench.measure(wanted.groups, seed, bench.probes(wanted.probe_groups, seed)))
        print(f"{model}, seed {seed}: done", file=sys.stderr, flush=True)
    return {
        "sampler": sampler_name(config.sampling, policy),
        "noise_level": sampling.process.noise_levels[0],
        "dtype": config.model.dtype,
        "noise_share": [round(s, 4) for s in noise_share(sampling)],
        "ways": {
            name: {kind: over_seeds([seed[name][kind] for seed in by_seed]) for kind in by_seed[0][name]}
            for name in by_seed[0]
        },
    }


def over_seeds(by_seed: list[list[float]]) -> dict[str, Any]:
    values = np.array(by_seed)
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
    return {
        "by_seed": values.round(3).tolist(),
        "mean": values.mean(axis=0).round(3).tolist(),
        "std_over_seeds": spread.round(3).tolist(),
    }


def noise_share(sampling: Sampling) -> list[float]:
    """The share sigma / (alpha + sigma) before each step, which makes steps of the two families comparable."""
    levels = sampling.process.levels_T1
    share: list[float] = (levels.sigma / (levels.alpha + levels.sigma))[:-1].tolist()
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["shapes-flow", "shapes-diffusion"])
    parser.add_argument("--objective", default="grpo")
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--group-size", type=int, default=24)
    parser.add_argument("--probe-groups", type=int, nargs="+", default=[50, 100, 200, 300])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-inference-steps", type=int, default=10)
    parser.add_argument("--window", type=int)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    found = {model: measured(model, wanted) for model in wanted.models}
    if wanted.json:
        print(json.dumps({**vars(wanted), "models": found}, indent=1))
        return
    for model, result in found.items():
        print(f"{model}, {result['sampler']} {result['noise_level']:g}")
        for name, way in result["ways"].items():
            pairs = zip(way["spearman"]["mean"], way["spearman"]["std_over_seeds"], strict=True)
            print(f"  {name:9s}", "  ".join(f"{mean:5.2f}+-{std:.2f}" for mean, std in pairs))


if __name__ == "__main__":
    main()
