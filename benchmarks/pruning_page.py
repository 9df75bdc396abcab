"""The page of when selection pays, docs/results/when_pruning_pays.md: its tables and its picture. It trains nothing.

    python benchmarks/pruning_page.py [--out docs/results/when_pruning_pays.json]

The runs, gradients and previews are those of benchmarks/when_pruning_pays.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from charts import INK, QUIET, Figure, drawn, save
from matplotlib.patches import Rectangle
from when_pruning_pays import (
    AGREEING,
    AUTO,
    CHOICES,
    FIXED,
    GRADIENTS,
    GROUP,
    HALVED,
    NEGATIVES,
    OBJECTIVES,
    ODE_STEPS,
    OVER_GROUPS,
    PLAIN,
    PREVIEWS,
    RATIOS,
    REWARD,
    SEEDS,
    STEPS,
    WEIGHTS,
    Cell,
    Gradient,
    Previews,
    Results,
    cells,
    cost_to,
    kept_by,
    level_of,
    more_cells,
    whole_cost,
)

from progrpo.durable import write_text
from progrpo.rollout.plan_value import prompt_signal
from progrpo.zoo.toy.policy import ToyNetwork, ToyPolicy, pretrained

PAGE = Path("docs/results/when_pruning_pays.md")
ENGINE = Path("docs/results/engine.json")
PICTURE = Path("docs/images/when_pruning_pays.png")
AT = (4e-3, 4)  # the learning rate and prompts at which the norms of updates are compared
PREVIEW_COSTS = (0.0, REWARD, 0.2, 0.4)


@dataclass(frozen=True)
class Finding:
    """A choice against the best plain group at one ratio: the ratio of costs to a level, with a 90 % interval.

    Where a run does not reach it, the speed is the most that its whole length leaves open.
    """

    speed: float
    low: float
    high: float
    reaches: bool
    seeds: int
    settings: tuple[float, int]
    predicted: float
    promised: float | None


def compared(rival: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of mean costs, and its 90 % interval by the bootstrap over runs."""
    sides = np.asarray(rival), np.asarray(own)
    lengths = [len(side) for side in sides]
    bounds = np.repeat(lengths, lengths)  # a draw takes as many runs of each side as it has
    rows = np.split(np.random.default_rng(0).integers(0, bounds, (1000, len(bounds))), lengths[:1], axis=1)
    above, below = (side[drawn].mean(axis=1) for side, drawn in zip(sides, rows, strict=True))
    low, high = np.quantile(above / below, [0.05, 0.95])
    return mean(rival) / mean(own), float(low), float(high)


class Map:
    """The costs and speeds of cells by finished runs."""

    def __init__(self, results: Results, network: ToyNetwork) -> None:
        self.results = results
        self._policy = ToyPolicy(network)
        self._signals: dict[tuple[str, str, int], float] = {}
        self._noise: dict[str, Any] = json.loads(ENGINE.read_text())["member noise"]["results"]

    def signal(self, cell: Cell) -> float:
        """The signal k V of a cell at the untrained model."""
        choice = CHOICES[cell.choice]
        stochastic = {"grpo": STEPS, "grpo window": 3}.get(cell.objective, 0)
        key = (cell.choice, cell.shape, stochastic)
        if key not in self._signals:
            kept = kept_by(self._policy, choice, cell.shape, stochastic).variance
            self._signals[key] = choice.plan.survivors * kept
        return self._signals[key]

    def rival(self, cell: Cell, share: float, ratio: float) -> list[float]:
        """The costs of the best plain group."""
        groups = [self.results.costs(replace(cell, choice=name), share, ratio) for name in PLAIN]
        return min((group[0] for group in groups if group is not None), key=mean, default=[])

    def finding(self, cell: Cell, share: float, ratio: float) -> Finding | None:
        """None where there are no runs, or no plain group reaches it."""
        own, rival = self.results.costs(cell, share, ratio), self.rival(cell, share, ratio)
        if own is None or not rival or np.isinf(rival).any():
            return None
        whole = whole_cost(cell, own[1][1], ratio)
        reaches = not np.isinf(own[0]).any()
        own = [min(cost, whole) for cost in own[0]], own[1]
        speed, low, high = compared(rival, own[0])
        predicted = self._over_plain(cell, ratio, self.signal)
        promised = self._over_plain(cell, ratio, self.promise) if self.promise(cell) else None
        return Finding(speed, low, high, reaches, len(own[0]), own[1], predicted, promised)

    def promise(self, cell: Cell) -> float:
        """The signal of a prompt that `plan/value` rests on, in the units of k V; 0 where its noise was not measured.

        It knows the noise of prompts' own directions (benchmarks/member_noise.py), as far as the smooth reward has it.
        """
        noise = self._noise.get(cell.objective)
        known = noise is not None and cell.shape == "smooth"
        return prompt_signal(self.signal(cell), noise["share"] / (GROUP - 1)) if noise and known else 0.0

    def _over_plain(self, cell: Cell, ratio: float, signal: Callable[[Cell], float]) -> float:
        """A signal per cost over the best of plain groups."""
        plain = max(signal(replace(cell, choice=name)) / CHOICES[name].cost(ratio) for name in PLAIN)
        return signal(cell) / CHOICES[cell.choice].cost(ratio) / plain


def table(survey: Map, objective: str, shape: str, share: float) -> list[str]:
    """A row per choice: how many times faster than the best plain group, by ratio, and the prediction."""
    names = [name for name in FIXED if survey.results.of(Cell(objective, name, shape))]
    heads = [f"R = {ratio:g}" for ratio in RATIOS]
    lines = [f"| choice | {' | '.join(heads)} | lr, prompts (R = 1) | seeds |", "|" + "---|" * (len(RATIOS) + 3)]
    for name in names:
        cells = [survey.finding(Cell(objective, name, shape), share, ratio) for ratio in RATIOS]
        words = ["-" if f is None else _words(f) for f in cells]
        middle = cells[1]
        settings = "-" if middle is None else f"{middle.settings[0]:g}, {middle.settings[1]}"
        lines.append(f"| {name} | {' | '.join(words)} | {settings} | {0 if middle is None else middle.seeds} |")
    cells = [survey.finding(Cell(objective, AUTO[ratio], shape), share, ratio) for ratio in RATIOS]
    if any(cells):
        words = ["-" if f is None else _words(replace(f, predicted=float("nan"))) for f in cells]
        seeds = min(f.seeds for f in cells if f is not None)
        lines.append(f"| auto | {' | '.join(words)} | | {seeds} |".replace(" (nan)", ""))
    return lines


def _words(f: Finding) -> str:
    return f"{_measured(f)} ({f.predicted:.2f})"


def _measured(f: Finding | None) -> str:
    if f is None:
        return "-"
    if not f.reaches:
        return f"< {f.speed:.2f}"
    speed = f"**{f.speed:.2f}**" if f.low > 1 else f"{f.speed:.2f}"
    return f"{speed} ± {(f.high - f.low) / 2:.2f}"


def groups_table(survey: Map) -> list[str]:
    """A row per choice whose survivors are allotted over groups, or whose groups stop: beside the same without it."""
    heads = [
        "reward",
        "choice",
        *(f"R = {ratio:g}" for ratio in RATIOS[1:]),
        "over the row above: to 50 %",
        "to 90 %",
        "seeds",
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for cell in more_cells():
        rivals = [name for name, other in (*OVER_GROUPS.items(), *HALVED.items()) if other == cell.choice]
        for each in (replace(cell, choice=name) for name in rivals if survey.results.of(cell)):
            for one in (each, cell):
                speeds = [_measured(survey.finding(one, 0.9, ratio)) for ratio in RATIOS[1:]]
                over = [_over(survey.results, cell, each, share)[0] if one is cell else "" for share in (0.5, 0.9)]
                title, seeds = (
                    one.shape if one.objective == "grpo" else f"{one.objective}, {one.shape}",
                    survey.results.most_seeds(one),
                )
                lines.append(f"| {title} | {one.choice} | {' | '.join((*speeds, *over))} | {seeds} |")
    return lines


def norms_table(survey: Map) -> list[str]:
    """A row per choice: the norm of its updates over that of plain groups of 12 at the same rate and prompts.

    Speeds under GRPO are at these settings and at the same norm, which plain groups of 12 have at another rate.
    """
    heads = ["choice", *OBJECTIVES, "GRPO to 90 %: R = 1", "R = 4", "at equal norm: R = 1", "R = 4"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in (
        "plain 6",
        "plain 12",
        "plain 24",
        "posthoc 12",
        "12 after 8",
        "posthoc 6",
        "6 after 8",
        "6 of 12 after 8",
    ):
        cells = [Cell(objective, name, "smooth") for objective in OBJECTIVES]
        norms = [f"{_norm(survey.results, cell) / _norm(survey.results, _plain_12(cell)):.2f}" for cell in cells]
        speeds = [_at_equal_settings(survey.results, cells[0], ratio) for ratio in RATIOS[1:]]
        equal_rate, equal_norm = zip(*speeds, strict=True)
        lines.append(f"| {name} | {' | '.join((*norms, *equal_rate, *equal_norm))} |")
    return lines


def _plain_12(cell: Cell) -> Cell:
    return replace(cell, choice="plain 12")


def _norm(results: Results, cell: Cell, lr: float = AT[0]) -> float:
    """The mean norm of the updates of seed 0 at `AT`, or at another rate with as many prompts."""
    (entry,) = (r for r in results.of(cell) if (r["lr"], r["prompts"], r["seed"]) == (lr, AT[1], 0))
    return entry["norm"]


def _at_equal_settings(results: Results, cell: Cell, ratio: float) -> tuple[str, str]:
    """The speed over plain groups of 12 at `AT`, with its 90 % interval, and that at equal norm of the updates.

    What another norm is worth to plain groups is interpolated between their own rates, by seed 0.
    """
    ends = results.ends(cell.objective, cell.shape)
    assert ends is not None
    level = level_of(ends, 0.9)

    def costs(one: Cell, lr: float) -> list[float]:
        runs = [r for r in results.of(one) if (r["lr"], r["prompts"]) == (lr, AT[1])]
        return [cost_to(r, level, ratio) for r in sorted(runs, key=lambda r: r["seed"])]

    own, rival = costs(cell, AT[0]), costs(_plain_12(cell), AT[0])
    if len(own) < SEEDS:
        return "", ""
    speed, low, high = compared(rival, own)
    rates = OBJECTIVES[cell.objective]
    norms = [np.log(_norm(results, _plain_12(cell), lr)) for lr in rates]
    by_norm = [np.log(costs(_plain_12(cell), lr)[0]) for lr in rates]
    moved = np.interp(np.log(_norm(results, cell)), norms, by_norm) - by_norm[rates.index(AT[0])]
    return f"{speed:.2f} ± {(high - low) / 2:.2f}", f"{speed * np.exp(moved):.2f}"


def gradients_table(rows: Sequence[Gradient]) -> list[str]:
    """A row per choice: its gradient before and after some training."""
    heads = ["choice", "bearing", "signal", "k V", "bearing after 40", "signal after 40", "k V after 40"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    by_place = {(row["choice"], row["after"]): row for row in rows}
    for name in FIXED:
        parts = [by_place[name, after] for after in (0, 40)]
        figures = [f"{row[key]:.2f}" for row in parts for key in ("bearing", "signal", "predicted")]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return lines


def promise_table(survey: Map, gradients: Sequence[Gradient], previews: Previews) -> list[str]:
    """A row per choice under GRPO: agreement of previews and V, and both promises beside the speed."""
    heads = ["choice", "agreement", "after 40", "V", "after 40"]
    heads += [head for ratio in RATIOS[1:] for head in (f"R = {ratio:g}: k V", "promise", "speed")]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    agreement = {(r["choice"], r["after"]): r["agreement"] for r in previews["previews"] if r["ode_steps"] == 1}
    kept = {(row["choice"], row["after"]): row["kept_variance"] for row in gradients}
    for name in ("plain 6", "plain 12", "posthoc 12", "posthoc 6", *AGREEING):
        facts = [f"{agreement[name, after]:.2f}" if name in AGREEING else "" for after in (0, 40)]
        facts += [f"{kept[name, after]:.2f}" for after in (0, 40)]
        for ratio in RATIOS[1:]:
            finding = survey.finding(Cell("grpo", name, "smooth"), 0.9, ratio)
            assert finding is not None
            facts += [f"{finding.predicted:.2f}", f"{finding.promised:.2f}", _measured(finding)]
        lines.append(f"| {name} | {' | '.join(facts)} |")
    return lines


def promises_table(survey: Map) -> list[str]:
    """A row per objective: the promises of choices for R = 4 beside their speed to 90 %."""
    names = ("6 of 12 after 8", "6 after 8", "12 after 8")
    heads = ["objective", *(head for name in ("`late`", *names[1:]) for head in (f"{name}: k V", "promise", "speed"))]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for objective in OBJECTIVES:
        findings = [survey.finding(Cell(objective, name, "smooth"), 0.9, RATIOS[-1]) for name in names]
        facts = []
        for one in findings:
            assert one is not None
            facts += [f"{one.predicted:.2f}", "-" if one.promised is None else f"{one.promised:.2f}", _measured(one)]
        lines.append(f"| {objective} | {' | '.join(facts)} |")
    return lines


def previews_table(survey: Map, previews: Previews) -> list[str]:
    """A row per choice and number of ODE steps of its previews: agreement, V, and speed to 90 % under GRPO."""
    heads = ["choice", "ODE steps", "agreement", "after 40", "V", "after 40", *(f"R = {ratio:g}" for ratio in RATIOS)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    known = {(r["choice"], r["ode_steps"], r["after"]): r for r in previews["previews"]}
    for name in AGREEING:
        for count in ODE_STEPS:
            rows = [known[name, count, after] for after in (0, 40)]
            facts = [f"{row['agreement']:.2f}" for row in rows] + [f"{row['kept_variance']:.2f}" for row in rows]
            cell = Cell("grpo", name if count == 1 else f"{name}, {count} ODE steps", "smooth")
            ran = cell.choice in CHOICES and survey.results.of(cell)
            facts += [_measured(survey.finding(cell, 0.9, ratio)) if ran else "" for ratio in RATIOS]
            lines.append(f"| {name} | {count} | {' | '.join(facts)} |")
    return lines


def preview_costs_table(survey: Map) -> list[str]:
    """A row per choice by previews: its speed to 90 % under GRPO where a preview costs more or less."""
    heads = ["choice", *(f"R = {ratio:g}: {cost:g}" for ratio in RATIOS[1:] for cost in PREVIEW_COSTS)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in ("6 of 12 after 8", "6 after 8", "12 after 8", "12 after 6", "standard", "flash"):
        facts = []
        for ratio, cost in itertools.product(RATIOS[1:], PREVIEW_COSTS):
            finding = survey.finding(Cell("grpo", name, "smooth"), 0.9, ratio)
            assert finding is not None
            choice = CHOICES[name]
            facts.append(f"{finding.speed * choice.cost(ratio) / choice.cost(ratio, cost):.2f}")
        lines.append(f"| {name} | {' | '.join(facts)} |")
    return lines


def negatives_table(results: Results) -> list[str]:
    """A row per objective, choice and weight of negative advantages: the speed over that of weight 1.

    Members whose weight is 0 are not trained on, which is not credited.
    """
    lines = ["| objective | choice | weight | to 50 % | to 90 % | seeds |", "|---|---|---|---|---|---|"]
    for objective in OBJECTIVES:
        for name in ("plain 12", "posthoc 6"):
            for weights in WEIGHTS:
                cell = Cell(objective, f"{name}, negatives {weights}", "smooth")
                rival = replace(cell, choice=f"{name}, negatives 1")
                speeds, seeds = zip(*(_over(results, cell, rival, share) for share in (0.5, 0.9)), strict=True)
                if any(seeds):
                    lines.append(f"| {objective} | {name} | {weights} | {' | '.join(speeds)} | {min(seeds)} |")
    return lines


def _over(results: Results, cell: Cell, rival: Cell, share: float) -> tuple[str, int]:
    """The speed to a share of the goal over that of a rival, with its 90 % interval, and the number of seeds."""
    own, other = (results.costs(one, share, 1.0) for one in (cell, rival))
    if own is None or other is None:
        return "-", 0
    if np.isinf(own[0]).any():
        return "not reached", len(own[0])
    if np.isinf(other[0]).any():
        return "reached so alone", len(own[0])
    speed, low, high = compared(other[0], own[0])
    return f"{speed:.2f} ± {(high - low) / 2:.2f}", len(own[0])


def prompts_table(results: Results) -> list[str]:
    """A row for each way to take fewer prompts: the speed over that of the same cell with more prompts, by one seed.

    Runs that do not reach it are counted, and not in the mean.
    """
    lines = ["| prompts | learning rate | to 50 % | to 90 % | pairs | no longer reach it | reach it only so |"]
    lines.append("|" + "---|" * 7)
    for many, few in ((8, 4), (8, 2), (4, 2)):
        for name, power in (("kept", 0.0), ("by the square root", 0.5), ("in proportion", 1.0)):
            half, most = (_pairs(results, many, few, power, share) for share in (0.5, 0.9))
            if most:
                lost = sum(np.isfinite(a) and np.isinf(b) for a, b in most)
                won = sum(np.isinf(a) and np.isfinite(b) for a, b in most)
                speeds = f"{_mean_speed(half)} | {_mean_speed(most)}"
                lines.append(f"| {many} -> {few} | {name} | {speeds} | {len(most)} | {lost} | {won} |")
    return lines


def _pairs(results: Results, many: int, few: int, power: float, share: float) -> list[tuple[float, float]]:
    """The costs to a share of the goal with many and with few prompts, at rates in proportion to a power of them."""
    costs: dict[tuple[Cell, int, float], float] = {}
    for objective, shape in dict.fromkeys((run["objective"], run["shape"]) for run in results.runs):
        ends = results.ends(objective, shape)
        if ends is None:
            continue
        level = level_of(ends, share)
        for cell in (Cell(objective, choice, shape) for choice in FIXED):
            of_one = [entry for entry in results.of(cell) if entry["seed"] == 0]
            costs |= {(cell, entry["prompts"], entry["lr"]): cost_to(entry, level, 1.0) for entry in of_one}
    pairs = []
    for (cell, prompts, lr), cost in costs.items():
        other = (cell, few, round(lr * (few / many) ** power, 9))
        if prompts == many and other in costs:
            pairs.append((cost, costs[other]))
    return pairs


def _mean_speed(pairs: Sequence[tuple[float, float]]) -> str:
    """The geometric mean of speeds of few prompts over many, and its standard error, where both reach the level."""
    logs = [float(np.log(a / b)) for a, b in pairs if np.isfinite(a) and np.isfinite(b)]
    middle = float(np.exp(mean(logs)))
    return f"{middle:.2f} ± {middle * float(np.std(logs)) / len(logs) ** 0.5:.2f}"


def write_page(survey: Map) -> None:
    """Write the tables between the page's marks, and the picture."""
    parts: list[str] = []
    for objective, shape in dict.fromkeys((cell.objective, cell.shape) for cell in cells()):
        if len({r["choice"] for r in survey.results.runs if (r["objective"], r["shape"]) == (objective, shape)}) > 2:
            for share in (0.5, 0.9):
                title = f"### {objective}, {shape} reward: to {share:.0%} of the gain"
                parts += [title, "", *table(survey, objective, shape, share), ""]
    page = _between(PAGE.read_text(encoding="utf-8"), "map", parts)
    rows, previews = json.loads(GRADIENTS.read_text()), json.loads(PREVIEWS.read_text())
    by_mark = {
        "prompts": prompts_table(survey.results),
        "norms": norms_table(survey),
        "groups": groups_table(survey),
        "promise": promise_table(survey, rows, previews),
        "promises": promises_table(survey),
        "gradients": gradients_table(rows),
        "previews": previews_table(survey, previews),
        "preview costs": preview_costs_table(survey),
        "negatives": negatives_table(Results(NEGATIVES)),
    }
    for mark, lines in by_mark.items():
        page = _between(page, mark, lines)
    write_text(PAGE, page)
    save(picture(survey), PICTURE)


def _between(page: str, mark: str, lines: Sequence[str]) -> str:
    """The page with these lines between its marks."""
    begin, end = f"<!-- {mark}:begin -->\n", f"<!-- {mark}:end -->"
    before, _, rest = page.partition(begin)
    return before + begin + "\n" + "\n".join(lines).rstrip("\n") + "\n\n" + end + rest.partition(end)[2]


def picture(survey: Map) -> Figure:
    """A box for each choice (row), objective or reward (column block) and ratio: green where selection is faster."""
    blocks = list(dict.fromkeys((cell.objective, cell.shape) for cell in cells()))
    blocks = [b for b in blocks if survey.results.of(Cell(b[0], "plain 24", b[1]))]
    names = [*FIXED, "auto"]
    block = len(RATIOS) + 0.2
    figure, [[field]] = drawn(1.5 + 0.45 * block * len(blocks), 1 + 0.24 * len(names))
    for column, (objective, shape) in enumerate(blocks):
        title = objective if shape == "smooth" else f"{objective}, {shape}"
        field.text(column * block, -0.95, title, color=INK, size=10)
        for i, ratio in enumerate(RATIOS):
            x = column * block + i
            field.text(x + 0.5, -0.3, f"R {ratio:g}", color=QUIET, ha="center")
            for y, name in enumerate(names):
                f = survey.finding(Cell(objective, AUTO[ratio] if name == "auto" else name, shape), 0.9, ratio)
                if f is not None:
                    field.add_patch(Rectangle((x, y), 0.96, 0.92, color=_colour(f.speed)))
                    text = f"{'' if f.reaches else '<'}{f.speed:.2f}"
                    field.text(x + 0.48, y + 0.48, text, color=INK, size=8, ha="center", va="center")
    field.set_xlim(0, block * len(blocks))
    field.set_ylim(len(names), -1.6)
    field.set_xticks([])
    field.set_yticks([y + 0.46 for y in range(len(names))], names, color=INK)
    field.grid(False)
    for edge in field.spines.values():
        edge.set_visible(False)
    field.set_xlabel("speed to 90 % of plain GRPO's gain, over the best plain group at equal cost; 1 is no gain")
    return figure


def _colour(speed: float) -> tuple[float, float, float]:
    """From orange (0.5) over white (1) to green (2)."""
    share = max(-1.0, min(1.0, float(np.log2(speed))))
    towards = (120, 200, 140) if share > 0 else (240, 170, 120)
    red, green, blue = (1 + abs(share) * (c / 255 - 1) for c in towards)
    return red, green, blue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/when_pruning_pays.json"))
    torch.set_num_threads(1)
    write_page(Map(Results(parser.parse_args().out), pretrained(0)))


if __name__ == "__main__":
    main()
