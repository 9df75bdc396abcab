"""Choices that keep the full group's gradient, or know the reward's noise, beside OVF on the toy flow under GRPO.

    python benchmarks/soft_ovf.py [--minutes 60] [--out docs/results/soft_ovf.json]
    python benchmarks/soft_ovf.py --table     # the tables from --out; trains nothing

soft        members are drawn with probabilities that grow with the distance of their score from the group's mean
            (exactly k, systematic in the order of scores), and their losses are divided by these probabilities (Horvitz
            and Thompson, 1952). Mean and std are the full group's: of final rewards, or by previews. The expected
            gradient is the full group's
noise-aware where the variance of each reward's noise is known (`uneven`), members are ranked, trained, or both, by the
            posterior mean of their reward: the observed one, drawn towards the group's mean by its reliability
statistics  mean and std of advantages over survivors, the full group, or previews, after OVF and `furthest`

Each choice takes the best of three learning rates (seed 0), then has SEEDS seeds. Its speed is the ratio of the groups
that OVF with statistics of survivors needs for 50 and 90 % of plain GRPO's gain, over its own: a group costs the same.
Where a run does not reach a level, its whole length counts.
Gradients are as in when_pruning_pays.py, before training and after 40 iterations, in float64.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from curves import reached_at
from torch import Tensor
from when_pruning_pays import (
    BUDGET,
    EVERY,
    GROUP,
    HELD_OUT,
    RATIOS,
    STEPS,
    Choice,
    batch_gradients,
    level_of,
    posthoc,
    pruned,
    signal,
    toy_batches,
)

from progrpo.checks import check
from progrpo.config import (
    AuditSettings,
    Config,
    ModelSettings,
    ObjectiveSettings,
    OptimSettings,
    PromptSettings,
    SamplingSettings,
)
from progrpo.durable import write_text
from progrpo.objectives.advantage import GroupStatistics, posterior_means
from progrpo.objectives.base import Experience, Noise
from progrpo.prompts.order import make_order
from progrpo.rewards.base import Reward, Score
from progrpo.rewards.mixture import Component, RewardMixture
from progrpo.rewards.settings import RewardSettings, RewardTerm
from progrpo.rollout.prune import Selection
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import Sampling, ode
from progrpo.training.build import ranking_from
from progrpo.training.distributed import Ranks, Tally
from progrpo.training.evaluate import evaluate
from progrpo.training.experience import AdvantageEstimator
from progrpo.training.trainer import Trainer
from progrpo.types import GroupScores, Prompt, Rollout
from progrpo.zoo.toy import world
from progrpo.zoo.toy.policy import ToyNetwork, ToyPolicy, pretrained
from progrpo.zoo.toy.rewards import ToyReward

PROMPTS, SEEDS = 4, 5
RATES = (2e-3, 4e-3, 8e-3)
NOISE = (0.2, 1.4)  # the stds of `uneven` noise, as likely as each other: a mean variance of 1, as `noisy` has


# --- soft choices -----------------------------------------------------------------------------------------------------


def inclusion(scores_PG: Tensor, keep: int, floor: float) -> Tensor:
    """The probabilities of members to be kept, float64 (P, G): each in (0, 1], and `keep` in sum.

    They are proportional to the distance of a score from the mean, in quadrature with `floor` stds, except where that
    would pass 1.
    """
    distance_PG = scores_PG.double() - scores_PG.double().mean(1, keepdim=True)
    variance_P1 = distance_PG.square().mean(1, keepdim=True)
    size_PG = (distance_PG.square() + (floor**2 + 1e-6) * variance_P1).sqrt() + 1e-12
    chance_PG = torch.zeros_like(size_PG)
    certain_PG = torch.zeros_like(size_PG, dtype=torch.bool)
    for _ in range(keep):
        left_P1 = keep - certain_PG.sum(1, keepdim=True)
        open_PG = size_PG.masked_fill(certain_PG, 0.0)
        chance_PG = (left_P1 * open_PG / open_PG.sum(1, keepdim=True)).masked_fill(certain_PG, 1.0)
        certain_PG = certain_PG | (chance_PG >= 1)
    return chance_PG.clamp(max=1.0)


def drawn(scores_PG: Tensor, chance_PG: Tensor, start_P: Tensor) -> Tensor:
    """The mask (P, G) of a systematic draw in the order of scores, which takes some of each end.

    Starts are in [0, 1).
    """
    order_PG = scores_PG.argsort(dim=1, stable=True)
    total_PG = chance_PG.gather(1, order_PG).cumsum(1)
    total_PG[:, -1] = total_PG[:, -1].round()
    passed_PG = (total_PG - start_P[:, None]).ceil()
    taken_PG = torch.diff(passed_PG, dim=1, prepend=torch.zeros_like(passed_PG[:, :1])) > 0
    return torch.zeros_like(taken_PG).scatter(1, order_PG, taken_PG)


def _soft(scores_PG: Tensor, keep: int, seeds_P: Tensor, floor: float) -> Selection:
    starts = [float(np.random.default_rng(seed).random()) for seed in seeds_P.tolist()]
    kept_PG = drawn(scores_PG, inclusion(scores_PG, keep, floor), torch.tensor(starts, dtype=torch.float64))
    indices_PK = kept_PG.nonzero()[:, 1].reshape(len(scores_PG), keep)
    return Selection(indices_PK, torch.ones_like(indices_PK, dtype=torch.bool))


def soft(scores_PG: Tensor, keep: int, present_PG: Tensor, seeds_P: Tensor) -> Selection:
    """Draw by the distance to the mean alone: the least variance where scores are final rewards."""
    return _soft(scores_PG, keep, seeds_P, 0.0)


def soft_floor(scores_PG: Tensor, keep: int, present_PG: Tensor, seeds_P: Tensor) -> Selection:
    """Draw with a floor of half a std, since a preview at the mean may end elsewhere."""
    return _soft(scores_PG, keep, seeds_P, 0.5)


FLOORS = {"soft_ovf:soft": 0.0, "soft_ovf:soft_floor": 0.5}


def statistics_by_previews(rollout: Rollout) -> GroupStatistics:
    """The full groups' mean and std, where a stopped member has the reward that its preview predicts.

    The prediction is a line through the survivors' previews and rewards, with one slope for all groups. The survivors
    were chosen by these previews, which biases no regression on them. What the line leaves counts in the std.
    """
    (seen,), kept = rollout.previews, rollout.trajectories
    seen_PG = seen.scores_N.reshape(-1, GROUP)
    kept_PG = torch.zeros_like(seen_PG, dtype=torch.bool)
    kept_PG[kept.group_N, kept.member_N] = True
    own_PG = torch.zeros_like(seen_PG).masked_scatter(kept_PG, rollout.finalists.value_N)
    x_PK, y_PK = (values[kept_PG].reshape(len(seen_PG), -1) for values in (seen_PG, own_PG))
    dx_PK, dy_PK = x_PK - x_PK.mean(1, keepdim=True), y_PK - y_PK.mean(1, keepdim=True)
    slope = (dx_PK * dy_PK).sum() / dx_PK.square().sum()
    left = (dy_PK - slope * dx_PK).square().sum() / (dy_PK.numel() - len(dy_PK))
    predicted_PG = y_PK.mean(1, keepdim=True) + slope * (seen_PG - x_PK.mean(1, keepdim=True))
    full_PG = own_PG.where(kept_PG, predicted_PG)
    variance_P = full_PG.var(1, correction=0) + left * (1 - y_PK.shape[1] / GROUP)
    return GroupStatistics(full_PG.mean(1), variance_P.sqrt(), kept_PG.sum(1))


@dataclass(frozen=True)
class Estimator(AdvantageEstimator):
    """The rule of a trial: its own statistics, advantages over inclusion probabilities, posterior means of rewards."""

    trial: Trial | None = None
    statistics: GroupStatistics | None = None

    def experience(
        self, rollout: Rollout, sampling: Sampling, noise: Noise, negative_weight: float = 1.0
    ) -> tuple[Experience, Tally]:
        trial = self.trial
        assert trial is not None
        if trial.trains_posterior:
            rollout = with_posterior(rollout)
        chance_N = None
        if trial.selector in FLOORS:
            seen_N = rollout.previews[0].scores_N if rollout.previews else rollout.finalists.ranking_N
            chance_PG = inclusion(seen_N.reshape(-1, GROUP), trial.plan.survivors, FLOORS[trial.selector])
            chance_N = chance_PG[rollout.trajectories.group_N, rollout.trajectories.member_N]
        rule = replace(self, statistics=statistics_by_previews(rollout) if trial.by_previews else None)
        experience, tally = AdvantageEstimator.experience(rule, rollout, sampling, noise, negative_weight)
        if chance_N is not None:
            weight_N = len(chance_N) / len(rollout.prompts) / GROUP / chance_N
            experience = replace(experience, advantages_N=experience.advantages_N * weight_N.float())
        return experience, tally

    def _advantages(self, scores: GroupScores, baseline: GroupStatistics, std: Tensor | None) -> tuple[Tensor, Tensor]:
        return super()._advantages(scores, self.statistics or baseline, std)


# --- noise that is known ----------------------------------------------------------------------------------------------


class Uneven(Reward):
    """The nearness with noise whose std is one of `NOISE`; or, with `variance`, the variance of that noise."""

    def __init__(self, variance: bool) -> None:
        self._variance = variance
        self._exact = ToyReward("smooth")

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        generators = [np.random.default_rng(zlib.crc32(p.tobytes())) for p in pictures_NHWC]
        stds = [NOISE[int(generator.integers(2))] for generator in generators]
        if self._variance:
            return [Score(std**2) for std in stds]
        exact = [score.number() for score in self._exact.score(pictures_NHWC, prompts)]
        return [
            Score(value + std * float(generator.standard_normal()))
            for value, std, generator in zip(exact, stds, generators, strict=True)
        ]


def with_posterior(rollout: Rollout) -> Rollout:
    """The rollout of a choice by final rewards with posterior means in the place of rewards."""
    rewards_N, variance_N = rollout.finalists.rewards_NR.unbind(1)
    values_N = posterior_means(rewards_N, variance_N, rollout.finalists.group_N, len(rollout.prompts))
    kept = rollout.trajectories
    return replace(
        rollout,
        finalists=replace(rollout.finalists, value_N=values_N),
        survivors=replace(rollout.survivors, value_N=values_N[kept.group_N * GROUP + kept.member_N]),
    )


def mixture(shape: str, ranks_posterior: bool) -> RewardMixture:
    if shape != "uneven":
        return RewardMixture([Component(RewardTerm("toy"), ToyReward(shape))])
    terms, noise = (RewardTerm("toy"), RewardTerm("noise", weight=0.0)), "noise" if ranks_posterior else ""
    parts = [Component(term, Uneven(variance)) for term, variance in zip(terms, (False, True), strict=True)]
    return RewardMixture(parts, ranking_from(ObjectiveSettings(), RewardSettings(terms, noise=noise)))


# --- the runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial(Choice):
    """A choice, and whether statistics are those of the full group by previews, and posterior means are used."""

    by_previews: bool = False
    ranks_posterior: bool = False
    trains_posterior: bool = False


def _trials() -> dict[str, Trial]:
    trials = {"plain 24": Trial()}
    for keep in (12, 6):
        point = f"posthoc {keep}"
        trials[f"{point}: ovf, survivors"] = Trial(posthoc(keep))
        trials[f"{point}: ovf, group"] = Trial(posthoc(keep), baseline="group")
        trials[f"{point}: furthest, group"] = Trial(posthoc(keep), selector="furthest", baseline="group")
        trials[f"{point}: soft, group"] = Trial(posthoc(keep), selector="soft_ovf:soft", baseline="group")
    for after in (8, 6):
        for keep in (12, 6):
            point = f"{keep} after {after}"
            trials[f"{point}: ovf, survivors"] = Trial(pruned(after, keep))
            trials[f"{point}: ovf, previews"] = Trial(pruned(after, keep), by_previews=True)
            if after == 6:
                trials[f"{point}: uniform, survivors"] = Trial(pruned(after, keep), selector="uniform")
            trials[f"{point}: soft, previews"] = Trial(
                pruned(after, keep), selector="soft_ovf:soft_floor", by_previews=True
            )
    return trials


def _noise_trials() -> dict[str, Trial]:
    trials = {"plain 24": Trial(), "plain 24, posterior": Trial(trains_posterior=True)}
    for name, ranks, trains in (
        ("ovf, survivors", False, False),
        ("ranked by posterior", True, False),
        ("trained by posterior", False, True),
        ("ranked and trained by posterior", True, True),
    ):
        trials[f"posthoc 6: {name}"] = Trial(posthoc(6), ranks_posterior=ranks, trains_posterior=trains)
    return trials


TRIALS = {
    "smooth": _trials(),
    "noisy": {
        n: trial for n, trial in _trials().items() if n == "plain 24" or n.startswith(("posthoc", "6 after 6: ovf"))
    },
    "uneven": _noise_trials(),
}
Cell = tuple[str, str]
"""The shape of the reward, and the name of a trial."""


def cells() -> Iterator[Cell]:
    for shape, trials in TRIALS.items():
        for name in trials:
            yield shape, name


def trainer_of(cell: Cell, lr: float, prompts: int, seed: int, policy: ToyPolicy) -> Trainer:
    trial = TRIALS[cell[0]][cell[1]]
    config = Config(
        seed=seed,
        iterations=iterations_of(trial, prompts),
        model=ModelSettings(dtype="float32"),
        prompts=PromptSettings(per_iteration=prompts),
        sampling=SamplingSettings(num_inference_steps=STEPS, microbatch=4096),
        plan=trial.settings(),
        objective=ObjectiveSettings(name="grpo", baseline=trial.baseline),
        optim=OptimSettings(lr=lr, decay=0.0, microbatch=8192, max_grad_norm=1e9),
        audit=AuditSettings(every=0),
    )
    check(config)
    order = make_order("turn", {"": tuple(world.prompts(4096))}, seed)
    trainer = Trainer(config, policy, mixture(cell[0], trial.ranks_posterior), order, Ranks())
    own = trainer.learner.estimator
    values = {field.name: getattr(own, field.name) for field in fields(AdvantageEstimator)}
    trainer.learner.estimator = Estimator(**values, trial=trial)
    return trainer


def iterations_of(trial: Trial, prompts: int) -> int:
    share = Trial().cost(RATIOS[0]) / trial.cost(RATIOS[0])
    return round(BUDGET * max(1.0, min(share, 3.0)) / prompts)


def run(network: ToyNetwork, cell: Cell, lr: float, seed: int, goal: float | None) -> dict[str, Any]:
    """Train, and stop once the goal is passed."""
    policy = ToyPolicy(deepcopy(network))
    trainer = trainer_of(cell, lr, PROMPTS, seed, policy)
    exact = RewardMixture([Component(RewardTerm("toy"), ToyReward("smooth"))])
    sampler = Sampler(policy, exact, ode(policy, STEPS, 1.0, 4096))
    held_out = world.prompts(HELD_OUT, first=100_000)
    curve: list[tuple[int, float]] = []
    for iteration in range(trainer.config.iterations + 1):
        if iteration % (EVERY // PROMPTS) == 0:
            graded = evaluate(sampler, held_out, 0, Ranks()).mean("graded")
            assert graded is not None
            curve.append((iteration, round(graded, 4)))
            if goal is not None and len(curve) > 3 and mean(value for _, value in curve[-3:]) > goal:
                break
        if iteration < trainer.config.iterations:
            trainer.step()
    return {"shape": cell[0], "choice": cell[1], "lr": lr, "seed": seed, "curve": curve}


class Results:
    """The finished runs and gradients of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stored = json.loads(path.read_text()) if path.exists() else {"gradients": [], "runs": []}
        self.gradients, self.runs = stored["gradients"], stored["runs"]

    def save(self) -> None:
        parts = []
        for name in ("gradients", "runs"):
            lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in getattr(self, name))
            parts.append(f'"{name}": [\n{lines}\n]')
        write_text(self.path, "{\n" + ",\n".join(parts) + "\n}\n")

    def of(self, cell: Cell, lr: float | None = None) -> list[dict[str, Any]]:
        own = [r for r in self.runs if (r["shape"], r["choice"]) == cell]
        return [r for r in own if lr is None or r["lr"] == lr]

    def ends(self, shape: str) -> tuple[float, float]:
        """The held-out reward before training, and the best of plain groups of 24."""
        cell = (shape, "plain 24")
        finals = {lr: [mean(v for _, v in r["curve"][-3:]) for r in self.of(cell, lr)] for lr in RATES}
        most = max(map(len, finals.values()))
        return self.of(cell)[0]["curve"][0][1], max(mean(f) for f in finals.values() if len(f) == most)

    def needed(self, cell: Cell, share: float, lr: float) -> list[float]:
        """The iterations to a share of the goal, by seed; those of the whole run where it does not get there."""
        level = level_of(self.ends(cell[0]), share)
        whole = float(iterations_of(TRIALS[cell[0]][cell[1]], PROMPTS))
        return [reached_at(r["curve"], level) or whole for r in sorted(self.of(cell, lr), key=lambda r: r["seed"])]

    def best(self, cell: Cell) -> float:
        """The rate that is the fastest to 90 % of the goal, and to 50 % where none gets further, by seed 0."""
        return min(RATES, key=lambda lr: (self.needed(cell, 0.9, lr)[0], self.needed(cell, 0.5, lr)[0]))


def next_work(results: Results, shapes: Sequence[str]) -> tuple[Cell, float, int] | None:
    # the goals come first
    for cell in sorted((cell for cell in cells() if cell[0] in shapes), key=lambda cell: cell[1] != "plain 24"):
        for lr in RATES:
            if not results.of(cell, lr):
                return cell, lr, 0
        lr = results.best(cell)
        if len(results.of(cell, lr)) < SEEDS:
            return cell, lr, len(results.of(cell, lr))
    return None


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(network: ToyNetwork, prompts: int = 1024, batch: int = 64) -> Iterator[dict[str, Any]]:
    """The bearing and the signal of every trial's gradient, in float64, on the same prompts and noise.

    *Aligned* is the bearing without the error of the two means, 1 for a gradient that has no bias but for its length;
    *error* its standard error by the jackknife. *Length* is that of the mean along the full groups'.
    """
    for after in (0, 40):
        trained = deepcopy(network)
        trainer = trainer_of(("smooth", "plain 24"), 4e-3, PROMPTS, 0, ToyPolicy(trained))
        for _ in range(after):
            trainer.step()
        policy = ToyPolicy(trained, torch.float64)
        batches = toy_batches(prompts // batch, batch)
        full_BD = batch_gradients(trainer_of(("smooth", "plain 24"), 1e-3, batch, 1, policy), batches, 1)
        full = signal(full_BD, full_BD.mean(0), batch)
        for name in TRIALS["smooth"]:
            own_BD = batch_gradients(trainer_of(("smooth", name), 1e-3, batch, 1, policy), batches, 1)
            rows = list(range(len(own_BD)))
            left = [aligned(own_BD[rows[:b] + rows[b + 1 :]], full_BD[rows[:b] + rows[b + 1 :]]) for b in rows]
            yield {
                "choice": name,
                "after": after,
                "bearing": round(float(torch.cosine_similarity(own_BD.mean(0), full_BD.mean(0), dim=0)), 4),
                "aligned": round(aligned(own_BD, full_BD), 4),
                "error": round(float(np.std(left) * (len(left) - 1) ** 0.5), 4),
                "length": round(float(own_BD.mean(0) @ full_BD.mean(0) / full_BD.mean(0).square().sum()), 3),
                "signal": round(signal(own_BD, full_BD.mean(0), batch) / full, 3),
            }


def aligned(own_BD: Tensor, full_BD: Tensor) -> float:
    """The cosine of the expected gradients: products of means without what their common noise adds."""

    def product(a_BD: Tensor, b_BD: Tensor) -> Tensor:
        a, b = a_BD.mean(0), b_BD.mean(0)
        return a @ b - ((a_BD - a) * (b_BD - b)).sum() / (len(a_BD) - 1) / len(a_BD)

    return float(product(own_BD, full_BD) / (product(own_BD, own_BD) * product(full_BD, full_BD)).sqrt())


# --- the tables -------------------------------------------------------------------------------------------------------


def tables(results: Results) -> Iterator[str]:
    for shape, trials in TRIALS.items():
        yield f"\n{shape}: ends {results.ends(shape)}\n"
        yield "| choice | to 50 % | to 90 % | lr | seeds |"
        yield "|---|---|---|---|---|"
        for name in trials:
            cell = (shape, name)
            if len(results.of(cell)) < len(RATES):
                continue
            rival = (shape, name.split(":")[0] + ": ovf, survivors" if ":" in name else "plain 24")
            words = [speed(results, cell, rival, share) for share in (0.5, 0.9)]
            lr = results.best(cell)
            yield f"| {name} | {' | '.join(words)} | {lr:g} | {len(results.of(cell, lr))} |"
    yield "\n| choice | bearing | aligned | length | signal |"
    yield "|---|---|---|---|---|"
    for g in results.gradients:
        yield (
            f"| {g['choice']}, after {g['after']} | {g['bearing']:.3f} | {g['aligned']:.3f} ± {g['error']:.3f}"
            f" | {g['length']:.2f} | {g['signal']:.2f} |"
        )


def speed(results: Results, cell: Cell, rival: Cell, share: float) -> str:
    own = results.needed(cell, share, results.best(cell))
    # seeds share prompts and noise, so that they are drawn together
    pairs = np.array(list(zip(results.needed(rival, share, results.best(rival)), own, strict=False)))
    generator = np.random.default_rng(0)
    draws = [np.divide(*generator.choice(pairs, len(pairs)).mean(0)) for _ in range(2000)]
    ratio, (low, high) = np.divide(*pairs.mean(0)), np.quantile(draws, [0.05, 0.95])
    late = sum(n >= iterations_of(TRIALS[cell[0]][cell[1]], PROMPTS) for n in own)
    return f"{ratio:.2f} [{low:.2f}, {high:.2f}]" + (f", {late} late" if late else "") + f" ({mean(own):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("docs/results/soft_ovf.json"))
    parser.add_argument("--shapes", nargs="+", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--table", action="store_true", help="print the tables, and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(arguments.out)
    if not arguments.table:
        network = pretrained(0)
        if not results.gradients:
            for row in gradients(network):
                results.gradients.append(row)
                print(row, flush=True)
            results.save()
        until = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < until and (item := next_work(results, arguments.shapes)) is not None:
            cell, lr, seed = item
            plain = cell[1] == "plain 24"
            start = time.process_time()
            goal = None if plain else level_of(results.ends(cell[0]), 0.95)
            results.runs.append(run(network, cell, lr, seed, goal))
            results.save()
            print(
                len(results.runs),
                item,
                results.runs[-1]["curve"][-1],
                f"{time.process_time() - start:.1f} s",
                flush=True,
            )
    print("\n".join(tables(results)))


if __name__ == "__main__":
    main()
