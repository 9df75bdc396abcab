"""Few-step drafts of the ODE from the same initial noise, plain and corrected: how they rank a group.

    python benchmarks/draft.py [--model shapes-flow] [--steps 4] [--corrections none multistep noise end]
        [--seconds 100] [--groups 24] [--out docs/results/drafts.json]

A draft takes a few ODE steps from the noise that the ten steps of the full ODE start from. Corrections:

none       Euler's steps, in equal parts of the grid, as `preview.ode_steps` takes them after step 0
multistep  as many calls, by the second-order Adams-Bashforth rule (DEIS, arXiv 2204.13902): each step also goes by the
           change of the output since the last call
weights    multistep, with learnt weights of the outputs so far in each step (Bespoke solvers, arXiv 2310.19075): ten
           numbers for four steps
noise      multistep, from the noise and a residual that a small network of noise and prompt adds to it, trained through
           the steps of the draft towards the end of the full ODE
end        multistep, with a residual on its end, by a like network of the draft's end, its outputs and the prompt

Corrections learn for `--seconds` of processor time each, from 1,536 pairs of noise and end that the frozen model makes
of training prompts; the loss is the mean squared error of latents. Drafts are compared on validation prompts. Pairs are
kept in build/, and finished rows in `--out`, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from preview import GROUP, REWARDS, STEPS, agreement, bootstrapped, load_policy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from progrpo.diffusion.levels import Levels
from progrpo.diffusion.prediction import PREDICTIONS
from progrpo.durable import write_text
from progrpo.policies.base import Policy
from progrpo.rewards.mixture import load_mixture
from progrpo.rewards.settings import RewardTerm
from progrpo.rollout.denoise import Denoiser, denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.preview import score
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import ode
from progrpo.types import Condition, Prompt
from progrpo.zoo.shapes import world

CORRECTIONS = ("none", "multistep", "weights", "noise", "end")
PROMPTS, MEMBERS, BATCH = 96, 16, 24
LEARNING_RATE, WEIGHTS_RATE, WIDTH = 2e-3, 0.05, 48


class Row(TypedDict):
    """The figures of one correction: Spearman and V relative to the choice by finals, with errors, of each reward."""

    model: str
    steps: int
    correction: str
    groups: int
    latent_error: float
    spearman: list[list[float]]
    variance: list[list[float]]
    trained_on: int


@dataclass(frozen=True)
class Pairs:
    """Noise and the end of the full ODE from it, of some prompts: (N, C, H, W), and the prompt of each (N,)."""

    prompts: Sequence[Prompt]
    noise_NCHW: Tensor
    end_NCHW: Tensor
    prompt_N: Tensor

    @classmethod
    def of(cls, model: str, policy: Policy, split: str, count: int, members: int, seed: int) -> Pairs:
        """The pairs of so many members of so many prompts, from build/ if they are there."""
        prompts = world.sample_prompts(split, count, seed)
        path = Path(f"build/draft/{model}-{split}-{count}-{members}-{seed}.safetensors")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(_sampled(policy, prompts, members, seed), path)
        saved = load_file(path)
        return cls(prompts, saved["noise"], saved["end"], saved["prompt"])


def _sampled(policy: Policy, prompts: Sequence[Prompt], members: int, seed: int) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {"noise": [], "end": [], "prompt": []}
    sampling, key = ode(policy, STEPS, 1.0, 48), NoiseKey(seed, 0)
    for slots in torch.arange(len(prompts)).split(8):
        condition = policy.encode([prompts[slot] for slot in slots.tolist()])
        start = expand(policy, slots, members, sampling, key)
        end = denoise(Denoiser(policy, condition, sampling), start, key, Meter())
        for name, part in (("noise", start.x_NCHW), ("end", end.x_NCHW), ("prompt", start.slot_N)):
            parts[name].append(part)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


class Residual(nn.Module):
    """Four convolutions, scaled and shifted by the prompt: a residual that is 0 before training."""

    def __init__(self, channels: int, shape: tuple[int, ...], text_width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.places = nn.Parameter(torch.zeros(WIDTH, *shape[1:]))
        self.middle = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))
        self.text = nn.Linear(text_width, 64)
        self.modulation = nn.Linear(64, 6 * WIDTH)
        self.last = nn.Conv2d(WIDTH, shape[0], 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_NCHW: Tensor, text_NLD: Tensor) -> Tensor:
        condition = self.modulation(F.gelu(self.text(text_NLD.float())).mean(1)).unflatten(1, (3, 2, WIDTH, 1, 1))
        h = self.first(x_NCHW) + self.places
        for layer, convolution in enumerate(self.middle):
            scale, shift = condition[:, layer].unbind(1)
            h = h + convolution(F.gelu(F.group_norm(h, 4) * (1 + scale) + shift))
        residual: Tensor = self.last(F.gelu(h))
        return residual


def _weights(times: Sequence[float], multistep: bool) -> Tensor:
    """The weights (n, n) by which each of n steps goes by the outputs so far: Euler's, or second-order Adams-Bashforth.

    `times` are the steps' ends, in the variable in which the output is the slope.
    """
    weights = torch.eye(len(times) - 1)
    if multistep:
        for k in range(1, len(weights)):
            before, at, after = times[k - 1 : k + 2]
            ahead = (after - at) / (at - before) / 2
            weights[k, k - 1 : k + 1] += torch.tensor([-ahead, ahead])
    return weights


class Drafter:
    """Drafts of one model in so many steps, with one correction."""

    def __init__(self, policy: Policy, steps: int, correction: str) -> None:
        self.policy, self.correction = policy, correction
        self.prediction = PREDICTIONS[policy.prediction]
        places = torch.linspace(0, STEPS, steps + 1, dtype=torch.float64)[:-1]
        self.levels: Levels = policy.levels_between(policy.levels(STEPS), places)
        sigma, alpha = self.levels.sigma, self.levels.alpha
        # the time in which the output is the slope: of a flow, and of DDIM's x / alpha; 0 at the end
        clock = sigma if policy.prediction == "flow" else sigma / alpha
        self.weights = nn.Parameter(_weights([*clock.tolist(), 0.0], multistep=correction != "none"))
        channels = policy.latent_shape[0]
        seen = {"noise": channels, "end": (steps + 1) * channels}.get(correction)
        width = policy.encode(world.sample_prompts("train", 1, 0)).tensors["prompt_embeds"].shape[2]
        self.residual = None if seen is None else Residual(seen, policy.latent_shape, width)

    def draft(self, noise_NCHW: Tensor, condition: Condition) -> Tensor:
        """The corrected end of the draft."""
        x, text = noise_NCHW, condition.tensors["prompt_embeds"]
        if self.correction == "noise" and self.residual is not None:
            x = x + self.residual(x, text)
        if self.correction == "end":
            return self._corrected(self.uncorrected(x, condition), text)
        return self.uncorrected(x, condition)[:, : x.shape[1]]

    def _corrected(self, seen_NCHW: Tensor, text_NLD: Tensor) -> Tensor:
        assert self.residual is not None
        residual: Tensor = self.residual(seen_NCHW, text_NLD)
        return seen_NCHW[:, : residual.shape[1]] + residual

    def uncorrected(self, x: Tensor, condition: Condition) -> Tensor:
        """The end of the draft and, as further channels, the network's outputs on the way."""
        outputs: list[Tensor] = []
        for k in range(len(self.levels)):
            outputs.append(self.policy.predict(x, self.levels.timestep[k], condition))
            slope = torch.einsum("k,k...->...", self.weights[k, : k + 1], torch.stack(outputs))
            if k + 1 < len(self.levels):
                x = self.prediction.step(x, slope, self.levels[k], self.levels[k + 1])
            else:
                x = self.prediction.x0(x, slope, self.levels[k])
        return torch.cat([x, *outputs], dim=1)

    def learn(self, pairs: Pairs, seconds: float) -> int:
        """Train the correction for so much processor time; returns the number of pairs that it has seen."""
        begin, seen, generator = time.process_time(), 0, torch.Generator().manual_seed(0)
        everything = self.policy.encode(pairs.prompts).take(pairs.prompt_N)
        starts = pairs.noise_NCHW
        if self.correction == "end":  # the draft itself does not change
            parts = torch.arange(len(starts)).split(2 * BATCH)
            with torch.no_grad():
                starts = torch.cat([self.uncorrected(starts[rows], everything.take(rows)) for rows in parts])
        trained = [self.weights] if self.residual is None else list(self.residual.parameters())
        rate = WEIGHTS_RATE if self.residual is None else LEARNING_RATE
        optimizer = torch.optim.AdamW(trained, weight_decay=0.01 if self.residual else 0.0)
        while (done := (time.process_time() - begin) / seconds) < 1:
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (seen // BATCH + 1) / 10) * (1 - done)
            rows = torch.randint(len(starts), (BATCH,), generator=generator)
            condition = everything.take(rows)
            if self.correction == "end":
                end = self._corrected(starts[rows], condition.tensors["prompt_embeds"])
            else:
                end = self.draft(starts[rows], condition)
            F.mse_loss(end, pairs.end_NCHW[rows]).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen += BATCH
        return seen


@torch.no_grad()
def measured(drafter: Drafter, pairs: Pairs, sampler: Sampler) -> Iterator[tuple[float, list[list[float | None]]]]:
    """The latent error of each group, and [Spearman, V, V by finals] of each reward."""
    for group, prompt in enumerate(pairs.prompts):
        rows = pairs.prompt_N == group
        condition = drafter.policy.encode([prompt]).take(torch.zeros(int(rows.sum()), dtype=torch.int64))
        draft, end = drafter.draft(pairs.noise_NCHW[rows], condition), pairs.end_NCHW[rows]
        group_N = torch.zeros(len(end), dtype=torch.int64)
        seen_NR, final_NR = (score(sampler, [prompt], group_N, x, Meter())[1].rewards_NR for x in (draft, end))
        by_reward = zip(agreement(seen_NR, final_NR), agreement(final_NR, final_NR), strict=True)
        yield F.mse_loss(draft, end).item(), [[*seen, best] for seen, (_, best) in by_reward]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-flow")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--corrections", nargs="+", default=list(CORRECTIONS))
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("docs/results/drafts.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, steps = arguments.model, arguments.steps
    policy = load_policy(model)
    for parameter in policy.trainable.values():
        parameter.requires_grad_(False)
    held_out = Pairs.of(model, policy, "validation", arguments.groups, GROUP, 11)
    sampler = Sampler(policy, load_mixture([RewardTerm(name) for name in REWARDS], frames=1), ode(policy, STEPS, 1, 24))
    rows: list[Row] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for correction in arguments.corrections:
        if (model, steps, correction) in ((row["model"], row["steps"], row["correction"]) for row in rows):
            continue
        drafter = Drafter(policy, steps, correction)
        seen = 0
        if correction not in ("none", "multistep"):
            seen = drafter.learn(Pairs.of(model, policy, "train", PROMPTS, MEMBERS, 3), arguments.seconds)
        errors, groups = zip(*measured(drafter, held_out, sampler), strict=True)
        figures = [bootstrapped([group[r] for group in groups]) for r in range(len(REWARDS))]
        rows.append(
            Row(
                model=model,
                steps=steps,
                correction=correction,
                groups=len(groups),
                latent_error=round(float(np.mean(errors)), 4),
                spearman=[[round(f.spearman, 3), round(f.spearman_error, 3)] for f in figures],
                variance=[[round(f.variance, 3), round(f.variance_error, 3)] for f in figures],
                trained_on=seen,
            )
        )
        write_text(arguments.out, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        print(rows[-1], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
