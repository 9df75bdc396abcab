"""Figure 1 of the paper: the rewards of groups of 24, and of the halves that a uniform draw and OVF keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from progrpo.config import Config, ModelSettings, RewardTerm, SamplingSettings
from progrpo.repro.arms import MATCH, Scale
from progrpo.rewards.mixture import load_mixture
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan
from progrpo.rollout.prune import ovf, survivors, uniform
from progrpo.rollout.rollout import rollout
from progrpo.rollout.sampler import Sampler
from progrpo.training.build import eval_prompts, policy_context, policy_from, resolve_dtype, sampling_from
from progrpo.training.distributed import Ranks

GROUP, KEPT, PROMPTS = 24, 12, 24
_NEAR = 0.5
"""A reward is clustered where it is within so many of its group's standard deviations of the group's mean."""
_BARS = 24
_RANGE = 3.0


@torch.no_grad()
def measure(scale: Scale, seeds: Sequence[int]) -> dict[str, Any]:
    """The final rewards of `PROMPTS` groups for each seed, sampled by Flow-GRPO's SDE, ready for JSON."""
    ranks = Ranks()
    config = resolve_dtype(_config(scale), ranks)
    policy = policy_from(config.model, policy_context(config, ranks))
    reward = load_mixture(config.reward.terms, config.reward.frames)
    sampler = Sampler(policy, reward, sampling_from(config, policy, "latents", 0), Plan(GROUP))
    runs = []
    for seed in seeds:
        rewards = []
        prompts = eval_prompts(config.prompts.source, "train", PROMPTS * (seed + 1))[-PROMPTS:]
        for slot, prompt in enumerate(prompts):
            rolled = rollout(sampler, [prompt], torch.tensor([slot]), NoiseKey(seed, 0), Meter())
            rewards.append([round(value, 5) for value in rolled.finalists.value_N.tolist()])
        runs.append({"seed": seed, "rewards": rewards})
    reward.close()
    return {"experiment": "fig1", "scale": scale, "model": config.model.path, "runs": runs}


def _config(scale: Scale) -> Config:
    if scale == "paper":
        from progrpo.recipes import sd35m_pickscore

        return sd35m_pickscore()
    base = Config()
    sampling = SamplingSettings(num_inference_steps=10, microbatch=GROUP)
    reward = replace(base.reward, terms=(RewardTerm(MATCH.name),))
    return replace(base, model=ModelSettings(dtype="float32"), sampling=sampling, reward=reward)


def kept(rewards_PG: Tensor) -> dict[str, Tensor]:
    """The rewards in units of their group's standard deviation from its mean: the full group, and each kept half.

    Groups whose rewards are equal or missing are left out.
    """
    usable_P = rewards_PG.isfinite().all(1) & (rewards_PG.std(1, correction=0) > 1e-9)
    rewards_PG = rewards_PG[usable_P].double()
    z_PG = (rewards_PG - rewards_PG.mean(1, keepdim=True)) / rewards_PG.std(1, correction=0, keepdim=True)
    group_N = torch.arange(len(z_PG)).repeat_interleave(z_PG.shape[1])
    z_N, seeds_P = z_PG.flatten(), torch.arange(len(z_PG))
    halves = {
        f"{name} {KEPT}": z_N[survivors(group_N, z_N, KEPT, selector, seeds_P)].reshape(-1, KEPT)
        for name, selector in (("uniform", uniform), ("OVF", ovf))
    }
    return {f"full {z_PG.shape[1]}": z_PG, **halves}


def page(data: dict[str, Any]) -> str:
    """The page in Markdown."""
    by_seed = [kept(torch.tensor(run["rewards"], dtype=torch.float64)) for run in data["runs"]]
    rows = []
    for name in by_seed[0]:
        near = [float((z[name].abs() <= _NEAR).double().mean()) for z in by_seed]
        spread = [float(z[name].var(1, correction=0).mean()) for z in by_seed]
        rows.append(f"| {name} | {_figure(near)} | {_figure(spread)} |")
    groups, seeds = sum(len(next(iter(z.values()))) for z in by_seed), len(data["runs"])
    return "\n".join(
        [
            "# Figure 1: rewards within a group cluster, and OVF keeps their two ends",
            "",
            "This page repeats the first figure of the paper (Pro-GRPO, arXiv 2512.15347) on a built-in model. The",
            "figure shows one group of 24, most of whose rewards lie near the mean. A uniform half of it clusters",
            "alike, and the half that OVF keeps spreads to the two ends. The paper prints no numbers for it.",
            "",
            "```bash",
            "progrpo repro fig1",
            "```",
            "",
            f"Ours shows {groups} groups of `{data['model']}` by Flow-GRPO's SDE in ten steps (mean and standard",
            f"deviation over {seeds} seeds). A reward counts as near the mean within half of its group's standard",
            "deviation, as 38 % of normal numbers are. V is the variance that is kept, in units of the full group's.",
            "",
            "| members | near the mean | V |",
            "| --- | --- | --- |",
            *rows,
            "",
            "![Rewards in units of their group's standard deviation](../images/repro_fig1.svg)",
            "",
            "Only the shapes can be compared: the paper's reward is PickScore on SD 3.5 Medium, ours is `shapes_match`",
            "on a small model.",
            "",
        ]
    )


def _figure(values: Sequence[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def picture(data: dict[str, Any]) -> str:
    """A histogram for each choice, over all seeds, as SVG."""
    rewards = torch.tensor([group for run in data["runs"] for group in run["rewards"]], dtype=torch.float64)
    parts = []
    for row, (name, z) in enumerate(kept(rewards).items()):
        counts = torch.histc(z.flatten().clamp(-_RANGE, _RANGE), _BARS, -_RANGE, _RANGE)
        heights, bottom = (counts / counts.max() * 70).tolist(), 90 * (row + 1)
        for i, height in enumerate(heights):
            parts.append(f'<rect x="{110 + 24 * i}" y="{bottom - height:.1f}" width="22" height="{height:.1f}"/>')
        parts.append(f'<text x="96" y="{bottom - 30}" text-anchor="end" fill="#282c34">{name}</text>')
    labels = "".join(
        f'<text x="{110 + 96 * (i + 3)}" y="288" text-anchor="middle" fill="#282c34">{i:+d}</text>'
        for i in range(-3, 4)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 300" font-family="sans-serif" font-size="12"'
        f' fill="#1e6ec8"><rect width="720" height="300" fill="white"/>{"".join(parts)}{labels}</svg>\n'
    )
