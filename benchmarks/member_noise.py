"""Whether the noise of members should decide who is kept: gradients of single members of the toy flow, by objective.

    python benchmarks/member_noise.py [--objectives dgpo nft awm elbo grpo] [--keep 12 6] [--shape smooth]
        [--after 20] [--prompts 256] [--json [FILE]]

After some iterations of plain groups of 24, full groups are sampled and each member's gradient is taken for an
advantage of 1, in AdamW's lengths (as in benchmarks/plan_value.py). A group's common gradient drops out, since its
advantages add up to 0: a member's noise is the squared length of the rest. A straight line is fitted to it by the
standardised reward z, which is positive and the same for all groups.

lengths     the mean noise of members by z, over that of all, and the slope of the line
signal      SNR^2 of a prompt over that of all 24: the squared mean along the other prompts' full gradient over the
            variance between prompts; standard errors by the jackknife over blocks of prompts
over ovf    the same over that of OVF on the same groups
k V         the promise: (sum A z)^2 / sum A^2, A being the survivors' advantages
with noise  (sum A z)^2 / sum A^2 s^2, with the line as s^2; `signal over noise` keeps the members that maximise it
promise     that of a run: 1 / (1 / (k V) + p), since prompts ask for different changes, which no number of members
            averages out; p follows from the noise of all 24 and from that of the difference of two halves of them
share       p k V of all 24
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from when_pruning_pays import GROUP, OBJECTIVES, Cell, config_of, mixture

from progrpo.objectives.base import Experience, Objective
from progrpo.objectives.dgpo import DGPO
from progrpo.policies.load import quiet
from progrpo.prompts.order import make_order
from progrpo.rollout.denoise import denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan_value import prompt_signal
from progrpo.rollout.preview import score
from progrpo.rollout.prune import Selector, furthest, ovf, uniform
from progrpo.training.distributed import Ranks
from progrpo.training.trainer import Trainer
from progrpo.training.update import half_of_each
from progrpo.zoo.toy import world
from progrpo.zoo.toy.policy import ToyPolicy, pretrained

BINS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
FIRST = 200_000  # of the prompts that no run is trained on
AT_ONCE = 16  # prompts
BLOCKS = 24
DRAWS = 4  # of random members
LEAST = 0.05  # of the mean noise
PER_ITERATION = 4  # prompts


class Members(NamedTuple):
    """P groups of G members: standardised rewards, and each member's gradient for an advantage of 1."""

    z_PG: Tensor
    gradient_PGD: Tensor


def members_of(trainer: Trainer, prompts: int) -> Members:
    """Full groups by the policy's own sampler; those whose rewards are all equal are left out."""
    rewards, gradients = [], []
    sampling = trainer.sampler.sampling
    objective = trainer.learner.objective
    if isinstance(objective, DGPO):  # the weight of decided groups is the whole group's
        objective = DGPO(replace(objective.settings, dpo_beta=0.0))
    for first in range(0, prompts, AT_ONCE):
        texts = world.prompts(AT_ONCE, first=FIRST + first)
        condition, key = trainer.policy.encode(texts), NoiseKey(5, first)
        batch = expand(trainer.policy, torch.arange(AT_ONCE) + first, GROUP, sampling, key)
        batch = denoise(trainer.sampler.denoiser(condition), batch, key, Meter(), lambda _, living: living)
        scores = score(trainer.sampler, texts, batch.group_N, batch.x_NCHW, Meter())[1]
        rewards.append(scores.value_N.reshape(AT_ONCE, GROUP).double())
        whole = Experience(batch, torch.ones(len(batch)), condition, sampling.process, key)
        gradients.append(member_gradients(trainer, objective, whole).reshape(AT_ONCE, GROUP, -1))
    reward_PG = torch.cat(rewards)
    differs_P = reward_PG.std(1) > 1e-9
    reward_PG = reward_PG[differs_P]
    z_PG = (reward_PG - reward_PG.mean(1, keepdim=True)) / reward_PG.std(1, correction=0, keepdim=True)
    return Members(z_PG, torch.cat(gradients)[differs_P])


def member_gradients(trainer: Trainer, objective: Objective, whole: Experience) -> Tensor:
    """The gradient (N, D) of each trajectory's mean loss.

    That of a linear layer is the outer product of the gradient of its output and its input.
    """
    assert isinstance(trainer.policy, ToyPolicy)
    layers = [layer for layer in trainer.policy.network.modules() if isinstance(layer, torch.nn.Linear)]
    inputs: dict[torch.nn.Module, Tensor] = {}
    slopes: dict[torch.nn.Module, Tensor] = {}

    def watch(layer: torch.nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            inputs[layer] = given[0].detach()
            output.register_hook(lambda slope: slopes.__setitem__(layer, slope.detach()))

    handles = [layer.register_forward_hook(watch) for layer in layers]
    ready = objective.prepare(trainer.policy, whole, len(whole), updates=1)
    draws = objective.settings.items_per_trajectory(len(ready.trajectories.path))
    objective.loss(trainer.policy, ready, torch.arange(len(whole) * draws)).total.backward()
    for handle in handles:
        handle.remove()
    for parameter in trainer.policy.trainable.values():
        parameter.grad = None
    state, parts = trainer.learner.updater.optimizer.state, []
    for layer in layers:
        given, slope = (seen[layer].reshape(draws, len(whole), -1) for seen in (inputs, slopes))
        for weights, part in (
            (layer.weight, torch.einsum("dno,dni->noi", slope, given)),
            (layer.bias, slope.sum(0)),
        ):
            root = state[weights]["exp_avg_sq"].sqrt() + 1e-8  # by which AdamW divides
            parts.append((part / draws * root.rsqrt()).flatten(1))
    return torch.cat(parts, dim=1)


# --- choices ----------------------------------------------------------------------------------------------------------


def by_selector(selector: Selector, seed: int = 0) -> Callable[[Tensor, int], Tensor]:
    """A selector's choice as a mask (P, G)."""

    def choose(z_PG: Tensor, keep: int) -> Tensor:
        seeds_P = torch.arange(len(z_PG)) + seed * len(z_PG)
        chosen = selector(z_PG, keep, torch.ones_like(z_PG, dtype=torch.bool), seeds_P).indices_PK
        return torch.zeros_like(z_PG, dtype=torch.bool).scatter(1, chosen, True)

    return choose


def signal_over_noise(z_PG: Tensor, noise_PG: Tensor, keep: int) -> Tensor:
    """The mask (P, G) of the members with the most signal over noise, by exchanging members of OVF's choice.

    Each round makes the best exchange of one member, until none is better. With equal noise it is OVF's choice.
    """
    chosen_PG = by_selector(ovf)(z_PG, keep)
    terms_PGT = _terms(z_PG, noise_PG)
    for _ in range(10 * keep):
        sums_PT = (terms_PGT * chosen_PG[..., None]).sum(1)
        exchanged = sums_PT[:, None, None] - terms_PGT[:, :, None] + terms_PGT[:, None]
        legal_PGG = chosen_PG[:, :, None] & ~chosen_PG[:, None]
        quality_PGG = _quality(exchanged, keep).masked_fill(~legal_PGG, -torch.inf)
        best_P, place_P = quality_PGG.flatten(1).max(1)
        better_P = best_P > _quality(sums_PT, keep) * (1 + 1e-12)
        if not better_P.any():
            break
        row, out, into = better_P.nonzero()[:, 0], place_P[better_P] // GROUP, place_P[better_P] % GROUP
        chosen_PG[row, out], chosen_PG[row, into] = False, True
    return chosen_PG


def _terms(z_PG: Tensor, noise_PG: Tensor) -> Tensor:
    """The terms of each member in the sums of its subset, (P, G, 5)."""
    return torch.stack([z_PG, z_PG.square(), noise_PG, noise_PG * z_PG, noise_PG * z_PG.square()], dim=-1)


def _quality(sums: Tensor, keep: int) -> Tensor:
    """(sum A z)^2 / sum A^2 s^2 of a subset, from the sums of its members' terms (last dim)."""
    z, square, noise, noise_z, noise_square = sums.unbind(-1)
    mean = z / keep
    spread = (square - z * mean).clamp(min=0)
    return (spread.square() / (noise_square - 2 * mean * noise_z + mean.square() * noise)).nan_to_num(0.0)


# --- what they are worth ----------------------------------------------------------------------------------------------


def promised(members: Members, chosen_PG: Tensor, noise_PG: Tensor) -> float:
    """The signal of a choice by the noise of members alone, mean over groups."""
    sums_PT = (_terms(members.z_PG, noise_PG) * chosen_PG[..., None]).sum(1)
    return float(_quality(sums_PT, int(chosen_PG[0].sum())).mean())


def gradient(members: Members, chosen_PG: Tensor, sign_PG: Tensor | float = 1.0) -> Tensor:
    """The gradient of each prompt, (P, D): the mean over survivors of advantage times gradient."""
    kept = chosen_PG.double()
    count = kept.sum(1, keepdim=True)
    centred = (members.z_PG - (members.z_PG * kept).sum(1, keepdim=True) / count) * kept
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()
    weight_PG = (centred / (std + 1e-4) / count * sign_PG).float()
    return torch.einsum("pg,pgd->pd", weight_PG, members.gradient_PGD)


def snr_sq(parts: Sequence[Tensor], full_PD: Tensor, rows: Tensor) -> float:
    """SNR^2 of a prompt up to the length of the full gradient; the mean of several draws of the same choice."""
    full = full_PD[rows]
    along, variance = [], []
    for part in parts:
        own = part[rows]
        total, pairs = own.sum(0), len(own) * (len(own) - 1)
        along.append(float((own @ full.sum(0)).sum() - (own * full).sum()) / pairs)
        mean_sq = float(total @ total - own.square().sum()) / pairs
        variance.append(float(own.square().sum()) / len(own) - mean_sq)
    return float(np.mean(along)) ** 2 / float(np.mean(variance))


def compared(ours: Sequence[Tensor], theirs: Sequence[Tensor], full_PD: Tensor) -> tuple[float, float]:
    """The ratio of two signals, with its standard error."""
    everyone = torch.arange(len(full_PD))
    without = [everyone[everyone % BLOCKS != block] for block in range(BLOCKS)]
    ratios = [snr_sq(ours, full_PD, rows) / snr_sq(theirs, full_PD, rows) for rows in without]
    error = float(np.sqrt((BLOCKS - 1) * np.var(ratios)))
    return snr_sq(ours, full_PD, everyone) / snr_sq(theirs, full_PD, everyone), error


def dealt(z_PG: Tensor) -> Tensor:
    """The signs (P, G) of two halves of each group that are alike, as a run deals them."""
    slot_PG, member_PG = (
        places.expand_as(z_PG) for places in (torch.arange(len(z_PG))[:, None], torch.arange(z_PG.shape[1]))
    )
    is_first_N = half_of_each(z_PG.flatten(), slot_PG.flatten(), member_PG.flatten())
    return 2.0 * is_first_N.reshape(z_PG.shape).double() - 1.0


def study(name: str, shape: str, after: int, prompts: int, keeps: Sequence[int]) -> dict[str, Any]:
    config = config_of(Cell(name, "plain 24", shape), OBJECTIVES[name][1], PER_ITERATION, seed=0)
    order = make_order("turn", {"": tuple(world.prompts(4096))}, config.seed)
    trainer = Trainer(config, ToyPolicy(pretrained()), mixture(shape), order, Ranks())
    for _ in range(after):
        trainer.step()
    members = members_of(trainer, prompts)
    z_PG, everyone = members.z_PG, torch.ones_like(members.z_PG, dtype=torch.bool)
    length_PG = (members.gradient_PGD - members.gradient_PGD.mean(1, keepdim=True)).square().sum(2).double()
    length_PG = length_PG / length_PG.mean()
    slope = float((length_PG * z_PG).mean())  # of least squares: z has mean 0 and variance 1
    noise_PG, equal_PG = (1 + slope * z_PG).clamp(min=LEAST), torch.ones_like(z_PG)
    place_PG = torch.bucketize(z_PG, torch.tensor(BINS, dtype=torch.float64))
    lengths = [round(float(length_PG[place_PG == place].mean()), 3) for place in range(len(BINS) + 1)]
    full_PD = gradient(members, everyone)
    full_sq = full_PD.square().sum(1).mean()
    mean_sq = (full_PD.sum(0).square().sum() - full_PD.square().sum()) / (len(full_PD) * (len(full_PD) - 1))
    of_members = gradient(members, everyone, dealt(z_PG)).square().sum(1).mean()
    share = float((full_sq - mean_sq) / of_members) - 1
    whole = [promised(members, everyone, noise) for noise in (equal_PG, noise_PG)]
    own_direction = share / whole[0]
    rows = []
    for keep in keeps:
        choices = {
            "random": [by_selector(uniform, draw)(z_PG, keep) for draw in range(DRAWS)],
            "ovf": [by_selector(ovf)(z_PG, keep)],
            "furthest": [by_selector(furthest)(z_PG, keep)],
            "signal over noise": [signal_over_noise(z_PG, noise_PG, keep)],
        }
        of_ovf = [gradient(members, choices["ovf"][0])]
        for choice, masks in choices.items():
            parts = [gradient(members, mask) for mask in masks]
            signal, error = compared(parts, [full_PD], full_PD)
            over_ovf, over_ovf_error = compared(parts, of_ovf, full_PD)
            k_v, with_noise = (
                float(np.mean([promised(members, mask, noise) for mask in masks])) for noise in (equal_PG, noise_PG)
            )
            numbers = {
                **{"keep": keep, "signal": signal, "error": error},
                **{"over ovf": over_ovf, "over ovf, error": over_ovf_error},
                **{"k V": k_v / whole[0], "with noise": with_noise / whole[1]},
                "promise": prompt_signal(k_v, own_direction) / prompt_signal(whole[0], own_direction),
            }
            rows.append({"choice": choice, **{key: round(value, 3) for key, value in numbers.items()}})
    facts = {"lengths": lengths, "slope": round(slope, 3), "share": round(share, 3)}
    return {**facts, "snr_sq": round(float(mean_sq / (full_sq - mean_sq)), 4), "choices": rows}


def table(studies: dict[str, Any]) -> str:
    edges = ["below", *(f"{edge:g}" for edge in BINS)]
    lines = [f"| objective | {' | '.join(edges)} | slope | share |", "|" + "---|" * (len(edges) + 3)]
    for name, one in studies.items():
        lines.append(f"| {name} | {' | '.join(f'{x:.2f}' for x in one['lengths'])} | {one['slope']} | {one['share']} |")
    heads = ["objective", "kept", "choice", "signal", "over ovf", "k V", "with noise", "promise"]
    lines += ["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, one in studies.items():
        for r in one["choices"]:
            lines.append(
                f"| {name} | {r['keep']} | {r['choice']} | {r['signal']:.2f} ± {r['error']:.2f}"
                f" | {r['over ovf']:.3f} ± {r['over ovf, error']:.3f}"
                f" | {r['k V']:.2f} | {r['with noise']:.2f} | {r['promise']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=["dgpo", "nft", "awm", "elbo", "grpo"], choices=OBJECTIVES)
    parser.add_argument("--keep", type=int, nargs="+", default=[12, 6])
    parser.add_argument("--shape", default="smooth", help="of the reward")
    parser.add_argument("--after", type=int, default=20, help="iterations of training before")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--json", nargs="?", const="-", help="print JSON, or write it to a file")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    studies = {
        name: study(name, arguments.shape, arguments.after, arguments.prompts, arguments.keep)
        for name in arguments.objectives
    }
    content = json.dumps({**vars(arguments), "torch": torch.__version__, "results": studies}, indent=1) + "\n"
    if arguments.json not in (None, "-"):
        Path(arguments.json).write_text(content)
    print(content if arguments.json == "-" else table(studies))


if __name__ == "__main__":
    main()
