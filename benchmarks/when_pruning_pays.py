"""The map of when selection pays: thousands of short runs of the toy flow, every side with its own best settings.

    python benchmarks/when_pruning_pays.py [--minutes 60] [--out docs/results/when_pruning_pays.json]
    python benchmarks/when_pruning_pays.py --choice auto # those cells alone whose choice begins so
    python benchmarks/when_pruning_pays.py --negatives   # weights of negative advantages, to a file of their own
    python benchmarks/when_pruning_pays.py --gradients   # the bias and the signal of each choice's gradient
    python benchmarks/when_pruning_pays.py --previews    # how previews agree, and how long an iteration takes

A cell is an objective, a choice of members and a shape of reward. It is run with several learning rates and numbers of
prompts an iteration: `PROBED` seeds of each, then `SEEDS` seeds of the best for each cost ratio R. R is the cost of
training a member over that of sampling it to its end; a preview and a reward cost `REWARD` of the latter. R changes no
run, only what its iterations are said to cost, so that each run serves all ratios.

The measure is the cost until the mean reward on held-out prompts has risen by 50 and by 90 % of what plain groups of 24
gain in the end under the same objective and reward. It is compared with the best plain group (6, 12 or 24) at the same
ratio: smaller groups are the honest rival. Finished runs in `--out` are kept, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from curves import reached_at

from progrpo.checks import check
from progrpo.config import (
    AuditSettings,
    Config,
    ModelSettings,
    ObjectiveSettings,
    OptimSettings,
    PlanSettings,
    PreviewSettings,
    PromptSettings,
    SamplingSettings,
    trained_items,
)
from progrpo.durable import write_text
from progrpo.prompts.order import make_order
from progrpo.rewards.mixture import Component, RewardMixture
from progrpo.rewards.settings import RewardTerm
from progrpo.rollout.denoise import denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint, UnitCosts, path, preset
from progrpo.rollout.preview import preview, score
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import Record, ode, sampling_for
from progrpo.tracking.statistics import spearman
from progrpo.training.collector import Batch
from progrpo.training.distributed import Ranks
from progrpo.training.errors import SelfCheckError
from progrpo.training.evaluate import evaluate
from progrpo.training.trainer import Trainer
from progrpo.types import Prompt, Trajectories
from progrpo.zoo.toy import world
from progrpo.zoo.toy.policy import ToyNetwork, ToyPolicy, pretrained
from progrpo.zoo.toy.rewards import ToyReward

NEGATIVES = Path("docs/results/negative_weight.json")
GRADIENTS = Path("docs/results/when_pruning_pays_gradients.json")
PREVIEWS = Path("docs/results/when_pruning_pays_previews.json")
STEPS, GROUP = 10, 24
RATIOS = (0.3, 1.0, 4.0)
REWARD = 0.07  # of a member's sampling: SD 3.5's decode and PickScore over ten of its network calls
PROMPTS = (2, 4, 8)
PROBED, SEEDS = 1, 10
BUDGET = 320  # groups that a run of plain groups of 24 samples at most
EVERY = 32  # groups between evaluations
HELD_OUT = 128


FULL = Plan(GROUP)


@dataclass(frozen=True)
class Choice:
    """A way to choose the members that are trained on."""

    plan: Plan = FULL
    """With `keep_groups` 1 half of the groups go on."""
    selector: str = "ovf"
    baseline: Literal["survivors", "group"] = "survivors"
    negative_weight: float = 1.0
    final_negative_weight: float | None = None
    ode_steps: int = 1
    """Those of a preview."""
    auto_ratio: float | None = None
    """The ratio R whose costs `plan.preset auto` is given; None: the plan is fixed."""

    def settings(self, prompts: int = 2) -> PlanSettings:
        if self.auto_ratio is not None:
            return PlanSettings("auto")
        return PlanSettings(
            preset="custom",
            group_size=self.plan.group_size,
            prune=tuple((point.step, point.keep) for point in self.plan.prune),
            final_keep=self.plan.final_keep,
            keep_groups=None if self.plan.keep_groups is None else prompts // 2,
            selector=self.selector,
        )

    def cost(self, ratio: float, preview: float = REWARD) -> float:
        """The cost of a group, in units of sampling one member to its end."""
        cost = self.plan.predict(STEPS, 1, guidance=False, ode_steps=self.ode_steps, prompts=2)
        scores = REWARD * (cost.reward_calls - cost.previews) + preview * cost.previews
        return (cost.nfe / STEPS + scores + ratio * cost.trained_steps) / 2


def pruned(step: int, keep: int, group: int = GROUP) -> Plan:
    return Plan(group, (PrunePoint(step, keep),))


def posthoc(keep: int) -> Plan:
    return Plan(GROUP, final_keep=keep)


CHOICES: dict[str, Choice] = {
    "plain 24": Choice(),
    "plain 12": Choice(Plan(12)),
    "plain 6": Choice(Plan(6)),
    "posthoc 12": Choice(posthoc(12)),
    "posthoc 6": Choice(posthoc(6)),
    "12 after 4": Choice(pruned(4, 12)),
    "12 after 6": Choice(pruned(6, 12)),
    "6 after 4": Choice(pruned(4, 6)),
    "6 after 6": Choice(pruned(6, 6)),
    "12 after 8": Choice(pruned(8, 12)),
    "6 after 8": Choice(pruned(8, 6)),
    "furthest 12, group": Choice(posthoc(12), "furthest", "group"),
    "furthest 6, group": Choice(posthoc(6), "furthest", "group"),
    "ovf 6, group": Choice(posthoc(6), baseline="group"),
    "uniform 12 after 4": Choice(pruned(4, 12), "uniform"),
    "uniform 6 of 12 after 8": Choice(pruned(8, 6, 12), "uniform"),
    "standard": Choice(preset("standard", STEPS)),
    "flash": Choice(preset("flash", STEPS)),
    "6 of 12 after 8": Choice(pruned(8, 6, 12)),
    "8 of 16 after 8": Choice(pruned(8, 8, 16)),
    "12 of 48 after 8": Choice(pruned(8, 12, 48)),
}
AUTO = {ratio: f"auto, R {ratio:g}" for ratio in RATIOS}
FIXED = dict(CHOICES)
CHOICES |= {name: Choice(auto_ratio=ratio) for ratio, name in AUTO.items()}
OVER_GROUPS = {
    "6 of 12 after 8": "6 of 12 after 8, over groups",
    "posthoc 12": "posthoc 12, over groups",
    "furthest 6, group": "furthest 6, group, over groups",
}
"""Choices that keep as many members of every group, and those that allot as many over an iteration's groups."""
HALVED = {
    "plain 12": "plain 12, half the groups after 8",
    "6 of 12 after 8": "6 of 12 after 8, half the groups",
}
"""Choices, and the same that stop half of an iteration's groups whole, by their previews."""
CHOICES |= {
    "6 of 12 after 8, over groups": Choice(pruned(8, 6, 12), "allotment:by_variance"),
    "posthoc 12, over groups": Choice(posthoc(12), "allotment:by_variance"),
    "furthest 6, group, over groups": Choice(posthoc(6), "allotment:by_advantage", "group"),
    "plain 12, half the groups after 8": Choice(replace(pruned(8, 12, 12), keep_groups=1)),
    "6 of 12 after 8, half the groups": Choice(replace(pruned(8, 6, 12), keep_groups=1)),
}
ODE_STEPS = (1, 2, 4)
PREVIEWED = ("6 of 12 after 8", "12 after 4")
"""Choices whose previews are compared by their number of ODE steps."""
CHOICES |= {
    f"{name}, {count} ODE steps": replace(CHOICES[name], ode_steps=count)
    for name in PREVIEWED
    for count in ODE_STEPS[1:]
}
AGREEING = ("12 after 4", "12 after 6", "12 after 8", "6 of 12 after 8")
"""Choices whose previews are measured."""
WEIGHTS = ("1", "0.5", "0.25", "0", "1 to 0.25", "1 to 0")
"""The weights of negative advantages that are compared, some of which fall over a run."""


def _weighted(choice: Choice, weights: str) -> Choice:
    first, _, last = weights.partition(" to ")
    return replace(choice, negative_weight=float(first), final_negative_weight=float(last) if last else None)


CHOICES |= {
    f"{name}, negatives {weights}": _weighted(CHOICES[name], weights)
    for name in ("plain 12", "posthoc 6")
    for weights in WEIGHTS
}
AUDITED = 40  # groups between the audits of `auto`
PLAIN = ("plain 6", "plain 12", "plain 24")
MAIN = (
    *PLAIN,
    *("posthoc 12", "posthoc 6", "furthest 6, group"),
    *("12 after 8", "6 after 8", "12 after 4", "6 after 4"),
    *("6 of 12 after 8", "standard"),
)
# The learning rates of each objective; windows are of three steps
OBJECTIVES: dict[str, tuple[float, ...]] = {
    "grpo": (2e-3, 4e-3, 8e-3),
    "grpo window": (2e-3, 4e-3, 8e-3),
    "awm": (1e-3, 2e-3, 4e-3, 8e-3),
    "nft": (1e-3, 2e-3, 4e-3, 8e-3),
    "dgpo": (1e-3, 2e-3, 4e-3, 8e-3),
    "elbo": (1e-3, 2e-3, 4e-3, 8e-3),
}
EDGES = ("plain 12", "6 of 12 after 8")
"""Choices that are tried at twice the largest rate under the objectives of the forward process."""
SHAPES = ("heavy", "peaked", "binary", "noisy")


@dataclass(frozen=True)
class Cell:
    objective: str
    choice: str
    shape: str


class Followed(TypedDict, total=False):
    """The course of a run whose plan changes, by the points of its curve."""

    spent: list[float]
    """The cost until each point, audits included."""
    plans: list[str]


class Run(Followed):
    """A run of a cell: the held-out reward by iterations."""

    objective: str
    choice: str
    shape: str
    lr: float
    prompts: int
    seed: int
    curve: list[tuple[int, float]]
    norm: float


def cell_of(entry: Run) -> Cell:
    return Cell(entry["objective"], entry["choice"], entry["shape"])


def cells() -> Iterator[Cell]:
    """All cells: what matters most first, and plain groups of 24, whose gain is the goal, before their rivals."""
    for choice in (*FIXED, *AUTO.values()):
        yield Cell("grpo", choice, "smooth")
    for objective in list(OBJECTIVES)[1:]:
        for choice in ("plain 24", *(name for name in MAIN if name != "plain 24")):
            yield Cell(objective, choice, "smooth")
    for shape in SHAPES:
        for choice in ("plain 24", *(name for name in MAIN if name != "plain 24")):
            yield Cell("grpo", choice, shape)
    for choice in AUTO.values():
        yield Cell("grpo", choice, "binary")


def more_cells() -> Iterator[Cell]:
    """The cells beside the map: survivors allotted over groups, groups stopped whole, and better previews."""
    for shape in ("smooth", "binary"):
        for choice in OVER_GROUPS.values():
            yield Cell("grpo", choice, shape)
    for choice in HALVED.values():
        yield Cell("grpo", choice, "binary")
    yield Cell("dgpo", OVER_GROUPS["6 of 12 after 8"], "smooth")
    for choice in CHOICES:
        if choice.endswith("ODE steps"):
            yield Cell("grpo", choice, "smooth")


def negative_cells() -> Iterator[Cell]:
    """The cells that compare weights of negative advantages, after the plain groups whose gain is the goal.

    Weights that fall are of GRPO and AWM.
    """
    for objective in OBJECTIVES:
        yield Cell(objective, "plain 24", "smooth")
        for name in CHOICES:
            if "negatives" in name and (" to " not in name or objective in ("grpo", "awm")):
                yield Cell(objective, name, "smooth")


def tried(cell: Cell) -> Iterator[tuple[float, int]]:
    """The learning rates and prompts that are tried of a cell."""
    rates = OBJECTIVES[cell.objective]
    if cell.choice in EDGES and cell.objective in ("awm", "nft", "dgpo") and cell.shape == "smooth":
        rates = (*rates, 2 * rates[-1])
    few = "negatives" in cell.choice and (cell.objective in ("elbo", "grpo window") or " to " in cell.choice)
    return ((lr, prompts) for prompts in ((4,) if few else PROMPTS) for lr in rates)


def config_of(cell: Cell, lr: float, prompts: int, seed: int) -> Config:
    choice = CHOICES[cell.choice]
    name, _, window = cell.objective.partition(" ")
    config = Config(
        seed=seed,
        iterations=iterations_of(choice, prompts),
        model=ModelSettings(dtype="float32"),
        prompts=PromptSettings(per_iteration=prompts),
        sampling=SamplingSettings(
            num_inference_steps=STEPS, microbatch=4096, sde_window="first" if window else "auto", sde_window_size=3
        ),
        plan=choice.settings(prompts),
        preview=PreviewSettings(ode_steps=choice.ode_steps),
        objective=_objective(name, choice),
        optim=OptimSettings(lr=lr, decay=0.0, microbatch=8192, max_grad_norm=1e9),
        audit=AuditSettings(every=0 if choice.auto_ratio is None else AUDITED // prompts),
    )
    check(config)
    return config


def _objective(name: str, choice: Choice) -> ObjectiveSettings:
    settings = ObjectiveSettings(name=name, baseline=choice.baseline)
    weights: dict[str, Any] = {
        "negative_weight": choice.negative_weight,
        "final_negative_weight": choice.final_negative_weight,
    }
    section: dict[str, Any] = {name: replace(settings.loss, **weights)}
    return replace(settings, **section)


def iterations_of(choice: Choice, prompts: int) -> int:
    """The iterations of a run: as many as cost what the budget's plain groups cost at the smallest ratio.

    They are thrice those of plain groups at most. `auto` has as many, and ends where its costs have reached the budget.
    """
    if choice.auto_ratio is not None:
        return round(3 * BUDGET / prompts)
    share = Choice().cost(RATIOS[0]) / choice.cost(RATIOS[0])
    return round(BUDGET * max(1.0, min(share, 3.0)) / prompts)


def whole_cost(cell: Cell, prompts: int, ratio: float) -> float:
    """The cost of a run of a cell that does not stop at the goal."""
    choice = CHOICES[cell.choice]
    if choice.auto_ratio is not None:
        return BUDGET * Choice().cost(ratio)
    return choice.cost(ratio) * prompts * iterations_of(choice, prompts)


def mixture(shape: str, seen: bool = True) -> RewardMixture:
    return RewardMixture([Component(RewardTerm("toy"), ToyReward(shape, seen))])


def run(network: ToyNetwork, cell: Cell, lr: float, prompts: int, seed: int, goal: float | None) -> Run:
    """Train, and stop once the goal is passed."""
    ranks = Ranks()
    policy = ToyPolicy(deepcopy(network))
    trainer = _trainer(cell, lr, prompts, seed, policy)
    config = trainer.config
    sampler = Sampler(policy, mixture(cell.shape, seen=False), ode(policy, STEPS, 1.0, 4096))
    held_out = world.prompts(HELD_OUT, first=100_000)
    ratio = CHOICES[cell.choice].auto_ratio
    if ratio is not None:
        trainer.plan_monitor.judge.recorded = UnitCosts(1 / STEPS, REWARD, REWARD, ratio / trained_items(config))
    curve: list[tuple[int, float]] = []
    spent: list[float] = []
    plans: list[str] = []
    norms: list[float] = []
    every = max(1, EVERY // prompts)
    for iteration in range(config.iterations + 1):
        if iteration % every == 0:
            graded = evaluate(sampler, held_out, 0, ranks).mean("graded")
            assert graded is not None
            curve.append((iteration, round(graded, 4)))
            if ratio is not None:
                spent.append(round(_spent(trainer, ratio), 2))
                plans.append(str(path(trainer.plan)))
            if goal is not None and len(curve) > 3 and mean(value for _, value in curve[-3:]) > goal:
                break
            if ratio is not None and spent[-1] >= whole_cost(cell, prompts, ratio):
                break
        if iteration < config.iterations:
            before = [p.detach().clone() for p in policy.trainable.values()]
            try:
                trainer.step()
            except SelfCheckError:
                break  # a learning rate at which the model falls apart: the run does not reach the level
            moved = [(p.detach() - b).square().sum() for p, b in zip(policy.trainable.values(), before, strict=True)]
            norms.append(float(torch.stack(moved).sum().sqrt()))
    followed: Followed = {} if ratio is None else {"spent": spent, "plans": plans}
    return {
        **followed,
        "objective": cell.objective,
        "choice": cell.choice,
        "shape": cell.shape,
        "lr": lr,
        "prompts": prompts,
        "seed": seed,
        "curve": curve,
        "norm": round(mean(norms), 5),
    }


def _spent(trainer: Trainer, ratio: float) -> float:
    """The cost of a run until now, in units of sampling one member to its end."""
    cost = trainer.totals.counted + trainer.totals.audited
    trained = ratio * cost.trained_steps / trained_items(trainer.config)
    return cost.nfe / STEPS + REWARD * cost.reward_calls + trained


def _trainer(cell: Cell, lr: float, prompts: int, seed: int, policy: ToyPolicy) -> Trainer:
    order = make_order("turn", {"": tuple(world.prompts(4096))}, seed)
    return Trainer(config_of(cell, lr, prompts, seed), policy, mixture(cell.shape), order, Ranks())


# --- the measure ------------------------------------------------------------------------------------------------------


def cost_to(entry: Run, level: float, ratio: float) -> float:
    """The cost to a level; infinite where a run does not get there."""
    if "spent" in entry:
        values = [value for _, value in entry["curve"]]
        reached = reached_at(list(zip(entry["spent"], values, strict=True)), level)
        return float("inf") if reached is None else reached
    iterations = reached_at(entry["curve"], level)
    cost = CHOICES[entry["choice"]].cost(ratio) * entry["prompts"]
    return float("inf") if iterations is None else iterations * cost


class Results:
    """The finished runs of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._best: dict[tuple[Cell, float, float, int, int], tuple[float, int] | None] = {}
        self._read()

    def _read(self) -> None:
        self.runs: list[Run] = json.loads(self.path.read_text()) if self.path.exists() else []
        self._by_cell: dict[Cell, list[Run]] = {}
        for entry in self.runs:
            self._by_cell.setdefault(cell_of(entry), []).append(entry)

    def of(self, cell: Cell) -> list[Run]:
        return self._by_cell.get(cell, [])

    def has(self, cell: Cell, lr: float, prompts: int, seed: int) -> bool:
        return any((r["lr"], r["prompts"], r["seed"]) == (lr, prompts, seed) for r in self.of(cell))

    def add(self, entry: Run) -> None:
        self._read()  # another process may have added runs to the file
        self.runs.append(entry)
        self._by_cell.setdefault(cell_of(entry), []).append(entry)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in self.runs)
        write_text(self.path, f"[\n{lines}\n]\n")

    def ends(self, objective: str, shape: str) -> tuple[float, float] | None:
        """The held-out reward before training, and the one that plain groups of 24 end at with their best settings.

        Settings count that were run with the most seeds: the best of several single runs was lucky.
        """
        finals: dict[tuple[float, int], list[float]] = {}
        runs = self.of(Cell(objective, "plain 24", shape))
        for entry in runs:
            final = mean(value for _, value in entry["curve"][-3:])
            finals.setdefault((entry["lr"], entry["prompts"]), []).append(final)
        most = max(map(len, finals.values()), default=0)
        ends = [mean(values) for values in finals.values() if len(values) == most]
        return (runs[0]["curve"][0][1], max(ends)) if ends else None

    def best(self, cell: Cell, level: float, ratio: float, fewest: int = 1) -> tuple[float, int] | None:
        """The learning rate and prompts with the lowest mean cost to a level, of those with so many seeds or more.

        A run that does not reach the level counts as long as it may be.
        """
        runs = self.of(cell)
        known = (cell, level, ratio, fewest, len(runs))
        if known not in self._best:
            costs: dict[tuple[float, int], list[float]] = {}
            for entry in runs:
                whole = whole_cost(cell, entry["prompts"], ratio)
                costs.setdefault((entry["lr"], entry["prompts"]), []).append(min(cost_to(entry, level, ratio), whole))
            means = {key: mean(values) for key, values in costs.items() if len(values) >= fewest}
            self._best[known] = min(means, key=means.__getitem__, default=None)
        return self._best[known]

    def most_seeds(self, cell: Cell) -> int:
        """The most seeds that a setting of a cell was run with."""
        return max(Counter((entry["lr"], entry["prompts"]) for entry in self.of(cell)).values(), default=0)

    def costs(self, cell: Cell, share: float, ratio: float) -> tuple[list[float], tuple[float, int]] | None:
        """The costs to a share of the goal under the cell's best settings, a run each, and these settings."""
        ends = self.ends(cell.objective, cell.shape)
        best = None if ends is None else self.best(cell, level_of(ends, share), ratio, self.most_seeds(cell))
        if ends is None or best is None:
            return None
        runs = [r for r in self.of(cell) if (r["lr"], r["prompts"]) == best]
        return [cost_to(r, level_of(ends, share), ratio) for r in runs], best


def level_of(ends: tuple[float, float], share: float) -> float:
    return ends[0] + share * (ends[1] - ends[0])


def work(results: Results, order: Sequence[Cell], seeds: int) -> Iterator[tuple[Cell, float, int, int]]:
    """The runs that are left to do, in order: for each cell all settings, then more seeds of its best ones."""
    for cell in order:
        for lr, prompts in tried(cell):
            for seed in range(PROBED):
                if not results.has(cell, lr, prompts, seed):
                    yield cell, lr, prompts, seed
        ends = results.ends(cell.objective, cell.shape)
        assert ends is not None
        settings = dict.fromkeys(results.best(cell, level_of(ends, 0.9), ratio) for ratio in RATIOS)
        for seed in range(seeds):
            for best in settings:
                if best is not None and not results.has(cell, *best, seed):
                    yield cell, *best, seed


def next_work(results: Results, order: Sequence[Cell], most: int = SEEDS) -> tuple[Cell, float, int, int] | None:
    """The next run: three seeds of every cell come before more of any."""
    for seeds in (3, most):
        for item in work(results, order, seeds):
            return item
    return None


# --- the prediction ---------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """V, the variance of the kept final rewards over that of all, and how the last previews agree with final rewards.

    The agreement is Spearman's correlation within a group, over all its members; None without previews.
    """

    variance: float
    agreement: float | None


@torch.no_grad()
def kept_by(policy: ToyPolicy, choice: Choice, shape: str, stochastic: int, prompts: int = 128) -> Kept:
    """What a choice keeps of groups that are sampled to their end, at the policy's weights."""
    plan = choice.plan
    settings = SamplingSettings(num_inference_steps=STEPS, microbatch=4096)
    sampling = sampling_for(policy, settings, range(stochastic), Record())
    selector = PlanSettings(selector=choice.selector).load_selector()
    drafts = PreviewSettings(ode_steps=choice.ode_steps)
    sampler = Sampler(policy, mixture(shape), sampling, plan, selector, drafts)
    texts, slots, key = world.prompts(prompts), torch.arange(prompts), NoiseKey(0, 0)
    condition = policy.encode(texts)
    keeps = {point.step: point.keep for point in plan.active_points()}
    scores: list[tuple[torch.Tensor, int]] = []

    def watch(step: int, batch: Trajectories) -> Trajectories:
        if step in keeps:
            seen_N = preview(sampler, texts, condition, batch, step, Meter())[1]
            scores.append((seen_N.reshape(prompts, -1), keeps[step]))
        return batch

    batch = expand(policy, slots, plan.group_size, sampling, key)
    batch = denoise(sampler.denoiser(condition), batch, key, Meter(), watch)
    final_PG = score(sampler, texts, batch.group_N, batch.x_NCHW, Meter())[1].value_N.reshape(prompts, -1)
    last = [scores_PG.numpy() for scores_PG, _ in scores[-1:]]
    agreements = [spearman(*pair) for scores_PG in last for pair in zip(scores_PG, final_PG.numpy(), strict=True)]
    if plan.final_keep is not None:
        scores.append((final_PG, plan.final_keep))
    living_PK = torch.arange(plan.group_size).expand(prompts, -1)
    for by_PG, keep in scores:
        by_PK = by_PG.gather(1, living_PK)
        there_PK = torch.ones_like(by_PK, dtype=torch.bool)
        living_PK = living_PK.gather(1, selector(by_PK, keep, there_PK, key.group_seeds(slots, 0)).indices_PK)
    kept = final_PG.gather(1, living_PK)
    variance = float(kept.var(1, correction=0).mean() / final_PG.var(1, correction=1).mean())
    return Kept(variance, mean(a for a in agreements if a is not None) if agreements else None)


# --- gradients --------------------------------------------------------------------------------------------------------


class Gradient(TypedDict):
    """The gradient of a choice, over that of plain groups of 24 at the same weights."""

    choice: str
    after: int
    """Iterations of plain GRPO before it."""
    bearing: float
    """The cosine of the mean gradients: the rest to 1 is bias."""
    signal: float
    """The squared length of the mean along plain GRPO's over the variance from prompt to prompt."""
    kept_variance: float
    predicted: float
    """The same ratio of signals by k V."""


def gradients(network: ToyNetwork, known: Sequence[Gradient], prompts: int = 1024, batch: int = 64) -> list[Gradient]:
    """The gradients of GRPO in float64, before training and after some of it, of every choice on the same prompts.

    Those that are `known` are not taken again.
    """
    results = {(row["choice"], row["after"]): row for row in known}
    for after in (0, 40):
        missing = [name for name in FIXED if (name, after) not in results]
        if not missing:
            continue
        policy = ToyPolicy(_after(network, after), torch.float64)
        batches = toy_batches(prompts // batch, batch)

        def rows_of(name: str, policy: ToyPolicy = policy, batches: list[list[Prompt]] = batches) -> torch.Tensor:
            return batch_gradients(_trainer(Cell("grpo", name, "smooth"), 1e-3, batch, 1, policy), batches, 1)

        full_BD = rows_of("plain 24")
        full = full_BD.mean(0)
        for name in missing:
            own_BD, choice = rows_of(name), CHOICES[name]
            kept = kept_by(policy, choice, "smooth", STEPS).variance
            row: Gradient = {
                "choice": name,
                "after": after,
                "bearing": round(float(torch.cosine_similarity(own_BD.mean(0), full, dim=0)), 4),
                "signal": round(signal(own_BD, full, batch) / signal(full_BD, full, batch), 3),
                "kept_variance": round(kept, 3),
                "predicted": round(choice.plan.survivors * kept / (GROUP - 1), 3),
            }
            results[name, after] = row
            print(row, flush=True)
    return [results[name, after] for after in (0, 40) for name in FIXED]


def _after(network: ToyNetwork, iterations: int) -> ToyNetwork:
    """The network after so many iterations of plain GRPO."""
    trained = deepcopy(network)
    trainer = _trainer(Cell("grpo", "plain 24", "smooth"), 4e-3, 4, 0, ToyPolicy(trained))
    for _ in range(iterations):
        trainer.step()
    return trained


class Previewed(TypedDict):
    """A choice by previews under GRPO on the smooth reward."""

    choice: str
    ode_steps: int
    after: int
    """Iterations of plain GRPO before it."""
    agreement: float
    kept_variance: float


class Previews(TypedDict):
    """How previews agree, and what an iteration takes."""

    machine: str
    milliseconds: dict[str, float]
    """The CPU time of an iteration on one thread, by choice."""
    previews: list[Previewed]


def previewed(network: ToyNetwork) -> Previews:
    """Measure previews by their number of ODE steps, and the milliseconds of an iteration."""
    rows: list[Previewed] = []
    for after in (0, 40):
        policy = ToyPolicy(_after(network, after))
        for name in AGREEING:
            for count in ODE_STEPS:
                kept = kept_by(policy, replace(CHOICES[name], ode_steps=count), "smooth", STEPS, prompts=512)
                assert kept.agreement is not None
                row: Previewed = {
                    "choice": name,
                    "ode_steps": count,
                    "after": after,
                    "agreement": round(kept.agreement, 3),
                    "kept_variance": round(kept.variance, 3),
                }
                rows.append(row)
    spent = {name: milliseconds(network, name) for name in ("plain 24", "plain 12", "6 of 12 after 8")}
    return {"machine": _processor(), "milliseconds": spent, "previews": rows}


def _processor() -> str:
    """The name of the processor where Linux says it, or else its architecture."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def milliseconds(network: ToyNetwork, name: str, blocks: int = 5, iterations: int = 10) -> float:
    """The CPU time of an iteration of 4 prompts under GRPO: the least of some blocks, since other work slows them."""
    trainer = _trainer(Cell("grpo", name, "smooth"), 1e-3, 4, 0, ToyPolicy(deepcopy(network)))
    trainer.step()
    spent = []
    for _ in range(blocks):
        start = time.process_time()
        for _ in range(iterations):
            trainer.step()
        spent.append(1000 * (time.process_time() - start) / iterations)
    return round(min(spent), 1)


def signal(rows_BD: torch.Tensor, along: torch.Tensor, prompts: int) -> float:
    """The signal of one prompt: rows are means over so many prompts."""
    parts = rows_BD @ along / along.norm()
    noise = (rows_BD - rows_BD.mean(0)).square().sum() / (len(rows_BD) - 1) * prompts
    # the mean's own noise along the direction is not signal
    return float((parts.mean().square() - parts.var() / len(parts)) / noise)


def toy_batches(batches: int, prompts: int) -> list[list[Prompt]]:
    return [world.prompts(prompts, first=prompts * number) for number in range(batches)]


def batch_gradients(
    trainer: Trainer, batches: Iterable[Sequence[Prompt]], seed: int, microbatch: int = 8192
) -> torch.Tensor:
    """The gradient of each batch of prompts by all trained weights, in their dtype (B, weights). No step is taken."""
    learner, rows = trainer.learner, []
    trained = list(trainer.policy.trainable.values())
    for number, prompts in enumerate(batches):
        key = NoiseKey(seed, number)
        rolled = trainer.collector.rollout(Batch(number, prompts, torch.arange(len(prompts)), key), Meter())
        experience, _ = learner.estimator.experience(rolled, trainer.sampler.sampling, key)
        experience = learner.objective.prepare(trainer.policy, experience, microbatch, 1)
        items = len(experience) * learner.objective.settings.items_per_trajectory(len(experience.trajectories.path))
        for parameter in trained:
            parameter.grad = None  # pretraining may have left one
        for chunk in torch.arange(items).split(microbatch):
            (learner.objective.loss(trainer.policy, experience, chunk).total / items).backward()
        rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained]))
    return torch.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("docs/results/when_pruning_pays.json"))
    parser.add_argument("--choice", default="", help="the beginning of the choices to run")
    parser.add_argument("--negatives", action="store_true", help="compare weights of negative advantages")
    parser.add_argument("--gradients", action="store_true", help="take the gradients that are left to take")
    parser.add_argument("--previews", action="store_true", help="measure previews, and how long an iteration takes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(NEGATIVES if arguments.negatives else arguments.out)
    network = pretrained(0)
    if arguments.gradients:
        rows = gradients(network, json.loads(GRADIENTS.read_text()) if GRADIENTS.exists() else [])
        write_text(GRADIENTS, json.dumps(rows, indent=1) + "\n")
        return
    if arguments.previews:
        write_text(PREVIEWS, json.dumps(previewed(network), indent=1) + "\n")
        return
    every = negative_cells() if arguments.negatives else (*cells(), *more_cells())
    order = [cell for cell in every if cell.choice.startswith(arguments.choice)]
    until = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < until:
        item = next_work(results, order, 3 if arguments.negatives else SEEDS)
        if item is None:
            break
        cell, lr, prompts, seed = item
        ends = results.ends(cell.objective, cell.shape)
        plain = cell.choice == "plain 24"
        start = time.process_time()
        results.add(run(network, cell, lr, prompts, seed, None if plain or ends is None else level_of(ends, 0.95)))
        last = results.runs[-1]["curve"][-1]
        print(f"{len(results.runs)} {item} {last} {time.process_time() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
