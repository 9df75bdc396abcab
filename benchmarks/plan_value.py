"""The value of plans measured from gradients, beside the value that a run predicts (plan/value).

    python benchmarks/plan_value.py [--recipe quickstart] [--after 4] [--prompts 80] [--seeds 0 1 2]
        [--plans standard "24 -> 12 after 4"] [--num-inference-steps 8] [--guidance-scale 1] [--window 3]
        [--ode-steps 1] [--members 48] [--objective dgpo] [--reward shapes_match] [--lr 5e-5] [--json [FILE]]

The policy is a recipe's after so many of its iterations; without `--recipe` it is GRPO with a LoRA on `shapes-flow`,
unpruned. `--objective`, `--reward` and `--lr` put others in their places. Groups of `--members` then run to their end,
previewed at every step, and each member's gradient is taken. From these follows the gradient of every plan on the same
members: it keeps the members that the previews choose, and has advantages among its survivors, as a run has. The value
of a gradient is its SNR^2: the square of its mean along the policy gradient (of the full groups of all other prompts)
over its variance from prompt to prompt. No step size is in it. Lengths are AdamW's: a weight counts by its gradient
over the fourth root of its second moment, so that the product with the policy gradient is the gain of a step in first
order. Gradients of all trained weights are hashed to DIMS numbers with random signs, which keeps inner products. DGPO's
weight of decided groups is left out.

signal      SNR^2 per prompt over that of `none` (24 members, all trained on); standard error by the jackknife over all
            prompts
bearing     cosine of the plan's mean gradient with the policy gradient: the rest to 1 is bias, which no number of
            prompts averages out
predicted   the signal by progrpo.rollout.plan_value, from these final rewards, the agreement of previews with them and
            the noise of prompts' own directions; a run measures that in plain lengths
seconds     per prompt over those of `none`, by the plan's counts and the unit costs of the iterations before
pays        signal over seconds, measured and predicted; a run writes the second as plan/value
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from progrpo.checks import check
from progrpo.config import Config, ModelSettings, RewardTerm, prompt_cost
from progrpo.objectives.advantage import advantages, group_statistics
from progrpo.objectives.base import Experience
from progrpo.objectives.dgpo import DGPO
from progrpo.policies.load import quiet
from progrpo.recipes import load_recipe
from progrpo.rewards.mixture import load_mixture
from progrpo.rollout.denoise import denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint, path, preset, unit_costs
from progrpo.rollout.plan_value import Simulation, prompt_signal
from progrpo.rollout.preview import preview, score
from progrpo.rollout.prune import ovf
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.settings import PreviewSettings
from progrpo.tracking.statistics import spearman, standardised
from progrpo.training.build import policy_context, policy_from, resolve_dtype, train_order
from progrpo.training.distributed import Ranks
from progrpo.training.measure import with_measured_microbatches
from progrpo.training.trainer import Trainer
from progrpo.training.update import half_of_each
from progrpo.types import Prompt, Trajectories
from progrpo.zoo.shapes import world

DIMS = 2**15
MICROBATCH = 48


def plans(steps: int, members: int) -> dict[str, Plan]:
    """The plans of groups of up to so many members, by name.

    They are `none` first, then other presets, plain groups, final choices, and one prune point.
    """
    named = {name: preset(name, steps) for name in ("none", "posthoc", "standard", "flash")}
    named |= {f"plain {size}": Plan(size) for size in (8, 12, 16, 48)}
    named |= {f"{size}, best {keep}": Plan(size, (), keep) for size, keep in ((24, 6), (48, 24), (48, 12))}
    for size, keep in ((24, 12), (24, 6), (48, 24), (48, 12)):
        for step in range(1, steps - 1):
            named[f"{size} -> {keep} after {step}"] = Plan(size, (PrunePoint(step, keep),))
    return {name: plan for name, plan in named.items() if plan.group_size <= members}


class Members(NamedTuple):
    """One full group: preview scores (T, G), final rewards (G,), and each member's gradient for an advantage of 1."""

    seen_TG: Tensor
    final_G: Tensor
    gradient_GD: Tensor


class Bench:
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        length, generator = sum(p.numel() for p in self.trained), torch.Generator().manual_seed(0)
        self.place = torch.randint(DIMS, (length,), generator=generator)
        seen = [trainer.learner.updater.optimizer.state[p]["exp_avg_sq"].flatten().float() for p in self.trained]
        self.root = torch.cat(seen).sqrt() + trainer.learner.updater.optimizer.defaults["eps"]
        """The number by which AdamW divides each weight's gradient."""
        self.factor = (torch.randint(2, (length,), generator=generator).float() * 2 - 1) * self.root.rsqrt()
        self.objective = trainer.learner.objective
        if isinstance(self.objective, DGPO):
            self.objective = DGPO(replace(self.objective.settings, dpo_beta=0.0))

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return list(self.trainer.policy.trainable.values())

    def group(self, prompt: Prompt, slot: int, seed: int, size: int) -> Members:
        whole, seen_TG, final_G = self.finished(prompt, slot, seed, size)
        gradients = [self.gradient(whole.take(torch.tensor([member]))) * self.factor for member in range(size)]
        hashed = [torch.zeros(DIMS).index_add(0, self.place, gradient) for gradient in gradients]
        return Members(seen_TG, final_G, torch.stack(hashed))

    def finished(self, prompt: Prompt, slot: int, seed: int, size: int) -> tuple[Experience, Tensor, Tensor]:
        """A group run to its end, of advantages of 1; scores of its previews (T, G) and final rewards (G,)."""
        policy, sampling = self.trainer.policy, self.trainer.sampler.sampling
        sampling = replace(sampling, record=replace(sampling.record, graphs=False))
        settings = PreviewSettings(ode_steps=self.trainer.config.preview.ode_steps)
        sampler = Sampler(policy, self.trainer.reward, sampling, preview_settings=settings)
        condition, key, seen = policy.encode([prompt]), NoiseKey(seed, 0), []

        def watch(step: int, batch: Trajectories) -> Trajectories:
            seen.append(preview(sampler, [prompt], condition, batch, step, Meter())[1])
            return batch

        batch = expand(policy, torch.tensor([slot]), size, sampling, key)
        batch = denoise(sampler.denoiser(condition), batch, key, Meter(), watch)
        final_G = score(sampler, [prompt], batch.group_N, batch.x_NCHW, Meter())[1].ranking_N
        whole = Experience(batch, torch.ones(size), condition, sampling.process, key, sampling.guidance_scale)
        return whole, torch.stack(seen), final_G

    def gradient(self, of: Experience) -> Tensor:
        """The gradient of the loss over these members, of all trained weights in a row."""
        ready = self.objective.prepare(self.trainer.policy, of, MICROBATCH, updates=1)
        items = torch.arange(len(of) * self.objective.settings.items_per_trajectory(len(ready.trajectories.path)))
        self.objective.loss(self.trainer.policy, ready, items).total.backward()
        none = torch.zeros(())
        parts = [(none.expand(p.shape) if p.grad is None else p.grad).flatten().float() for p in self.trained]
        for parameter in self.trained:
            parameter.grad = None
        return torch.cat(parts)


def chosen(plan: Plan, seen_TG: Tensor, final_G: Tensor) -> Tensor:
    """The members that remain of the group's first `group_size`."""
    living = torch.arange(plan.group_size)

    def kept(scores_G: Tensor, keep: int) -> Tensor:
        there = torch.ones(1, len(scores_G), dtype=torch.bool)
        return ovf(scores_G[None], keep, there, torch.zeros(1, dtype=torch.int64)).indices_PK[0]

    for point in plan.active_points():
        living = living[kept(seen_TG[point.step, living], point.keep)]
    return living if plan.final_keep is None else living[kept(final_G[living], plan.final_keep)]


def gradient_of(plan: Plan, members: Members, clip_max: float) -> Tensor:
    """The gradient of a prompt: the mean over survivors of advantage times gradient; (DIMS,)."""
    rows = chosen(plan, members.seen_TG, members.final_G)
    return advantages_of(members.final_G[rows], clip_max) @ members.gradient_GD[rows] / len(rows)


def halves_of(plan: Plan, members: Members, clip_max: float, slot: int) -> Tensor:
    """The difference of the gradients of two halves of a prompt's survivors, which are alike: the members' noise."""
    rows = chosen(plan, members.seen_TG, members.final_G)
    advantages_K = advantages_of(members.final_G[rows], clip_max)
    sign_K = 2.0 * half_of_each(advantages_K, torch.full_like(rows, slot), rows) - 1.0
    return sign_K * advantages_K @ members.gradient_GD[rows] / len(rows)


def advantages_of(rewards_K: Tensor, clip_max: float) -> Tensor:
    """The advantages of one group's survivors."""
    one_group = torch.zeros(len(rewards_K), dtype=torch.int64)
    return advantages(rewards_K, one_group, group_statistics(rewards_K, one_group, 1), clip_max=clip_max)[0]


class Moments(NamedTuple):
    """A plan's gradients over prompts: mean along the policy gradient, squared length of the mean, and variance."""

    along: float
    mean_sq: float
    variance: float

    @classmethod
    def of(cls, with_full_PP: np.ndarray, own_PP: np.ndarray) -> Moments:
        """The moments from inner products with the full groups' gradients and with each other, between prompts only."""
        mean_sq = _off_diagonal(own_PP)
        return cls(_off_diagonal(with_full_PP), mean_sq, float(np.trace(own_PP)) / len(own_PP) - mean_sq)


def _off_diagonal(products_PP: np.ndarray) -> float:
    count = len(products_PP)
    return float(products_PP.sum() - np.trace(products_PP)) / (count * (count - 1))


def signal(by_seed: list[Moments]) -> float:
    """The SNR^2 of a prompt, up to the policy gradient's length, which all plans share."""
    along, _, variance = np.mean(by_seed, axis=0).tolist()
    snr_sq: float = along * abs(along) / variance
    return snr_sq


def bearing(plan: list[Moments], full: list[Moments]) -> float:
    """The cosine of a plan's mean gradient with that of full groups."""
    along, mean_sq, _ = np.mean(plan, axis=0).tolist()
    _, full_sq, _ = np.mean(full, axis=0).tolist()
    return float(along / np.sqrt(mean_sq * full_sq)) if min(mean_sq, full_sq) > 0 else float("nan")


def worth(plan: list[Tensor], none: list[Tensor], full: list[Tensor]) -> dict[str, Any]:
    """The plan's signal over that of `none`, and its bearing, from gradients (P, DIMS) by seed."""
    kinds = (plan, none, full)
    products = [[((g @ f.T).numpy(), (g @ g.T).numpy()) for g, f in zip(of, full, strict=True)] for of in kinds]
    moments = [[Moments.of(*pair) for pair in by_seed] for by_seed in products]
    signals, bearings = [], []
    for s, gradient_PD in enumerate(plan):
        for p in range(len(gradient_PD)):
            rest = np.arange(len(gradient_PD)) != p
            ours, theirs, whole = (
                [*of[:s], Moments.of(*(x[rest][:, rest] for x in by_seed[s])), *of[s + 1 :]]
                for of, by_seed in zip(moments, products, strict=True)
            )
            signals.append(signal(ours) / signal(theirs))
            bearings.append(bearing(ours, whole))
    ours, theirs, whole = moments
    _, mean_sq, variance = np.mean(ours, axis=0).tolist()
    return {
        "snr_sq": mean_sq / variance,
        "signal": signal(ours) / signal(theirs),
        "error": _jackknife(signals),
        "bearing": bearing(ours, whole),
        "bearing, error": _jackknife(bearings),
        "by seed": [signal([a]) / signal([b]) for a, b in zip(ours, theirs, strict=True)],
    }


def _jackknife(without_one: list[float]) -> float:
    return float(np.sqrt((len(without_one) - 1) * np.var(without_one)))


def config_for(options: argparse.Namespace) -> Config:
    plain = Config(model=ModelSettings(dtype="auto"))
    config = load_recipe(options.recipe) if options.recipe else replace(plain, plan=replace(plain.plan, preset="none"))
    given = {name: getattr(options, name) for name in ("num_inference_steps", "guidance_scale")}
    sampling = replace(config.sampling, **{name: value for name, value in given.items() if value is not None})
    if options.window:
        sampling = replace(sampling, sde_window="first", sde_window_size=options.window)
    config = replace(
        config,
        sampling=sampling,
        preview=replace(config.preview, ode_steps=options.ode_steps),
        audit=replace(config.audit, every=0),
    )
    if options.objective:
        config = replace(config, objective=replace(config.objective, name=options.objective))
    if options.reward:
        config = replace(config, reward=replace(config.reward, terms=(RewardTerm(options.reward),)))
    if options.lr is not None:
        config = replace(config, optim=replace(config.optim, lr=options.lr))
    check(config)
    return config


def measure(options: argparse.Namespace) -> dict[str, Any]:
    config, ranks = config_for(options), Ranks()
    steps = config.sampling.num_inference_steps
    known = plans(steps, options.members)
    named = {name: plan for name, plan in known.items() if name in ("none", *(options.plans or known))}
    gradients: dict[str, list[Tensor]] = {name: [] for name in ("full", *named)}
    halves: list[Tensor] = []
    agreements: list[list[float | None]] = []
    finals: list[list[float]] = []
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for seed in options.seeds:
        trainer = trained(replace(config, seed=seed), options.after, ranks)
        units, bench = unit_costs(trainer.totals.counted, trainer.totals.seconds), Bench(trainer)
        clip_max = trainer.learner.objective.settings.adv_clip_max
        of_seed: dict[str, list[Tensor]] = {name: [] for name in gradients}
        for slot, prompt in enumerate(world.sample_prompts("validation", options.prompts, seed)):
            members = bench.group(prompt, slot, seed, options.members)
            for name, plan in {"full": Plan(options.members), **named}.items():
                of_seed[name].append(gradient_of(plan, members, clip_max))
            halves.append(halves_of(named["none"], members, clip_max, slot))
            standard_G = standardised(members.final_G.numpy())
            if standard_G is not None:
                agreements.append([spearman(seen.numpy(), members.final_G.numpy()) for seen in members.seen_TG])
                finals.append(standard_G[~np.isnan(standard_G)].tolist())
            if slot % 20 == 19:
                print(f"seed {seed}: {slot + 1} prompts", file=sys.stderr, flush=True)
        for name, plan in named.items():
            seconds[name].append(units.seconds(prompt_cost(trainer.config, plan)))
        for name, by_prompt in of_seed.items():
            gradients[name].append(torch.stack(by_prompt))
    agreement_T = [float(np.mean([v or 0.0 for v in step])) for step in zip(*agreements, strict=True)]
    simulation = Simulation.of(agreement_T, finals, options.members)
    own_direction = own_noise(gradients["none"], halves) / simulation.signal(named["none"], ovf)
    expected = {name: prompt_signal(simulation.signal(plan, ovf), own_direction) for name, plan in named.items()}
    results = {}
    for name, plan in named.items():
        ours = worth(gradients[name], gradients["none"], gradients["full"])
        predicted, spent = expected[name] / expected["none"], float(np.sum(seconds[name]) / np.sum(seconds["none"]))
        rates = {"pays": ours["signal"] / spent, "pays, predicted": predicted / spent}
        results[name] = {"path": path(plan), **ours, "predicted": predicted, "seconds": spent, **rates}
    return {"agreement": agreement_T, "own_direction": own_direction, "plans": results}


def own_noise(none: list[Tensor], halves: list[Tensor]) -> float:
    """The noise of prompts' own directions over that of their members, from gradients (P, DIMS) by seed."""
    moments = [Moments.of((g @ g.T).numpy(), (g @ g.T).numpy()) for g in none]
    of_members = float(torch.stack(halves).square().sum(1).mean())
    return max(0.0, float(np.mean([one.variance for one in moments])) / of_members - 1)


def trained(config: Config, iterations: int, ranks: Ranks) -> Trainer:
    """A run's trainer after so many iterations, without evaluations and files."""
    config = resolve_dtype(config, ranks)
    policy, order = policy_from(config.model, policy_context(config, ranks)), train_order(config.prompts, config.seed)
    reward = load_mixture(config.reward.terms, config.reward.frames)
    trainer = Trainer(
        with_measured_microbatches(config, policy, order.prompts_for(0, 1)[0], ranks), policy, reward, order, ranks
    )
    for _ in range(iterations):
        trainer.step()
    return trainer


def table(results: dict[str, Any]) -> str:
    lines = ["| Plan | signal | predicted | bearing | seconds | pays | predicted |", "|---|---|---|---|---|---|---|"]
    for name, r in results["plans"].items():
        lines.append(
            f"| {name} | {r['signal']:.2f} ± {r['error']:.2f} | {r['predicted']:.2f}"
            f" | {r['bearing']:.2f} ± {r['bearing, error']:.2f} | {r['seconds']:.2f}"
            f" | {r['pays']:.2f} ± {r['error'] / r['seconds']:.2f} | {r['pays, predicted']:.2f} |"
        )
    agreement = ", ".join(f"{a:.2f}" for a in results["agreement"])
    return "\n".join([*lines, "", f"Agreement of previews by step: {agreement}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe")
    parser.add_argument("--after", type=int, default=4, help="iterations of training before")
    parser.add_argument("--prompts", type=int, default=80, help="of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plans", nargs="+", help="some of them alone")
    parser.add_argument("--num-inference-steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--window", type=int, help="noise and training on the first so many steps alone")
    parser.add_argument("--ode-steps", type=int, default=1, help="of previews")
    parser.add_argument(
        "--members", type=int, default=48, help="of a full group; plans with larger groups are left out"
    )
    parser.add_argument("--objective", help="another than the recipe's or GRPO")
    parser.add_argument("--reward", help="another than the recipe's or the graded verifier")
    parser.add_argument("--lr", type=float, help="another learning rate than the recipe's or the default")
    parser.add_argument("--json", nargs="?", const="-", help="print JSON, or write it to a file")
    options = parser.parse_args()
    quiet()
    if options.members < 24:
        parser.error(f"--members {options.members} is below 24, the group size of the plan none")
    known = plans(config_for(options).sampling.num_inference_steps, options.members)
    for name in set(options.plans or ()) - set(known):
        parser.error(f"--plans: {name!r} is unknown; choose of {', '.join(known)}")
    results = measure(options)
    content = json.dumps({**vars(options), "torch": torch.__version__, **results}, indent=1) + "\n"
    if options.json not in (None, "-"):
        Path(options.json).write_text(content)
    print(content if options.json == "-" else table(results))


if __name__ == "__main__":
    main()
