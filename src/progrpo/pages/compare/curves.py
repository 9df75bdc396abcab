"""The curves of all recipes over time and cost, the time to equal reward, and reward against KL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from progrpo.pages.compare.figures import (
    AXES,
    EVALUATED,
    HOURS,
    SHARES,
    Arrival,
    Point,
    curve,
    levels,
    metric_names,
    spread,
)
from progrpo.pages.compare.head import colour_of, dot
from progrpo.pages.compare.lines import Line, compared
from progrpo.pages.compare.recipes import Recipe, measures_that_differ
from progrpo.pages.compare.results import hours_name
from progrpo.pages.page import anchor_of, chart, escape, note, section, table
from progrpo.tracking.wording import MISSING, count, duration, number

_KL, _HELD_OUT = "eval/kl", "eval/held_out@"


@dataclass(frozen=True)
class _Card:
    key: str
    title: str
    about: str
    y: Mapping[str, object] = field(default_factory=dict)


_CARDS = (
    _Card(EVALUATED, "Reward, evaluations", "mean over the validation prompts"),
    _Card("reward/mean", "Reward, training samples", "mean over finished members, which pruning chooses"),
    _Card("eval/strict", "Strict accuracy", "share of the validation prompts that passes", {"tickformat": ".0%"}),
    _Card("eval/judge", "Judge", "share passed by a judge never trained on", {"tickformat": ".0%"}),
    _Card(_KL, "Distance to the reference", "mean square distance of velocities, in evaluations"),
    _Card("rollout/diversity", "Diversity", "pixel difference of survivors of one prompt"),
    _Card("plan/value", "Expected gain of the plan", "progress per second over plain GRPO’s, estimated after audits"),
)


def write(recipes: Sequence[Recipe]) -> str:
    lead = (
        "A line is the mean over a recipe’s seeds, as far as all of them are. The band goes from the lowest seed to the"
        " highest, and thin lines are the seeds. Seconds are those of training, without evaluations."
    )
    names = metrics_of(recipes)
    cards = [card for card in (*_CARDS, *_held_out(recipes)) if card.key in names]
    drawn = "".join(_chart(recipes, card) for card in cards)
    body = _axes(recipes) + legend(recipes) + f'<div class="grid">{drawn}</div>' if drawn else _NOTHING
    return section("curves", "Curves", lead if drawn else "", body) + _equal(recipes) + _distance(recipes)


_NOTHING = note("No iteration is finished yet.")


def metrics_of(recipes: Sequence[Recipe]) -> list[str]:
    """The metrics that are compared and that any run has."""
    runs = [run for recipe in recipes for run in recipe.runs]
    recorded = set(metric_names(runs, ""))
    return [card.key for card in (*_CARDS, *_held_out(recipes)) if card.key in recorded]


def _held_out(recipes: Sequence[Recipe]) -> list[_Card]:
    runs = [run for recipe in recipes for run in recipe.runs]
    names = [name.removeprefix(_HELD_OUT) for name in metric_names(runs, _HELD_OUT)]
    about = "held out, never trained on, over the validation prompts"
    return [_Card(_HELD_OUT + name, f"Reward {escape(name)}", about) for name in names]


def legend(recipes: Sequence[Recipe]) -> str:
    return f'<p class="legend">{"".join(dot(recipes, recipe) for recipe in recipes)}</p>'


def _titles(recipes: Sequence[Recipe]) -> dict[str, str]:
    return {"seconds": "seconds", "nfe": "training NFE", "iteration": "iteration", HOURS: hours_name(recipes)}


def _axes(recipes: Sequence[Recipe]) -> str:
    labels = ("Seconds", "NFE", "Iteration", hours_name(recipes))
    buttons = "".join(
        f'<button data-axis="{axis}" data-title="{title}" aria-pressed="{"true" if axis == AXES[0] else "false"}">'
        f"{label}</button>"
        for (axis, title), label in zip(_titles(recipes).items(), labels, strict=True)
    )
    return f'<div class="controls"><span>Horizontal axis</span>{buttons}</div>'


def _chart(recipes: Sequence[Recipe], card: _Card) -> str:
    lines = [_line(recipes, recipe, [curve(run, card.key) for run in recipe.runs]) for recipe in recipes]
    figure = compared(lines, AXES[0], _titles(recipes)[AXES[0]], card.y)
    return chart(figure, f"curve-{anchor_of(card.key)}-{len(card.key)}", card.title, card.about)


def _line(recipes: Sequence[Recipe], recipe: Recipe, curves: Sequence[Sequence[Point]]) -> Line:
    over = spread(curves)
    seeds = [
        ({axis: [point.at[axis] for point in points] for axis in AXES}, [point.value for point in points])
        for points in curves
        if points
    ]
    return Line(escape(recipe.label), colour_of(recipes, recipe), over.at, over.mean, over.low, over.high, seeds)


# --- time to equal reward ---------------------------------------------------------------------------------------------


def _equal(recipes: Sequence[Recipe]) -> str:
    title = "Time to equal reward"
    if measures_that_differ(recipes):
        return section("equal", title, "", note("Not given: the recipes are not measured by the same reward."))
    reached = levels(recipes)
    if reached is None:
        why = (
            "it needs two evaluations of a run on the way (eval.every), and the lowest last one above the lowest first"
        )
        return section("equal", title, "", note(f"Not given: {why}."))
    lead = (
        f"Levels are shares of the smallest final gain: from the lowest first evaluation on the way,"
        f" {number(reached.start)}, to the lowest last one, {number(reached.end)}, each the mean over a recipe’s seeds."
        " A run is at a level where the straight line between two evaluations first passes it. A cell is the mean over"
        " the runs that are; ≤ is a level that the first evaluation had passed."
    )
    heads = [f"{share:.0%} · {number(reward)}" for share, reward in zip(SHARES, reached.rewards, strict=True)]
    units: dict[str, tuple[str, Callable[[float], str]]] = {
        "seconds": ("Training time", duration),
        "nfe": ("Training NFE", count),
        HOURS: (hours_name(recipes), lambda hours: f"{hours:.3g}"),
    }
    shown = [recipe for recipe in recipes if recipe.label in reached.arrivals]
    tables = "".join(
        table(
            (name, *heads),
            [[dot(recipes, r), *(_cell(a, axis, write) for a in reached.arrivals[r.label])] for r in shown],
        )
        for axis, (name, write) in units.items()
    )
    absent = [escape(recipe.label) for recipe in recipes if recipe not in shown]
    without = note(f"Not evaluated twice on the way: {', '.join(absent)}.") if absent else ""
    return section("equal", title, lead, tables + without)


def _cell(arrivals: Sequence[Arrival | None], axis: str, write: Callable[[float], str]) -> str:
    """The mean of the runs that are at the level, and how many are if not all."""
    there = [place for place in arrivals if place is not None]
    if not there:
        return f"{MISSING}<small>0 of {len(arrivals)} runs</small>"
    bound = "≤ " if any(place.at_first for place in there) else ""
    of_all = f"<small>{len(there)} of {len(arrivals)} runs</small>" if len(there) < len(arrivals) else ""
    return f"{bound}{write(float(np.mean([place.at[axis] for place in there])))}{of_all}"


# --- reward against distance ------------------------------------------------------------------------------------------


def _distance(recipes: Sequence[Recipe]) -> str:
    title = "Reward and KL"
    lines = [_path(recipes, recipe) for recipe in recipes]
    if not any(line.mean for line in lines):
        return section("distance", title, "", note("No distance to the reference model was recorded (eval/kl)."))
    lead = (
        "Each evaluation on the way: its reward over the distance that the model has gone from its reference, to which"
        " an SDE’s KL divergence is proportional. Higher at the same distance is better."
    )
    figure = compared(lines, "kl", "mean square distance of velocities", height=320)
    about = "the mean over seeds at each evaluation; thin: each seed"
    return section("distance", title, lead, legend(recipes) + chart(figure, "reward-kl", "Reward by distance", about))


def _path(recipes: Sequence[Recipe], recipe: Recipe) -> Line:
    """The evaluations of a recipe by distance and reward. There is no band, since both are measured."""
    pairs = [p for run in recipe.runs if (p := _evaluations(curve(run, _KL), curve(run, EVALUATED)))]
    shared = sorted(set.intersection(*map(set, pairs))) if pairs else []
    means = np.array([np.mean([by_iteration[i] for by_iteration in pairs], axis=0) for i in shared]).reshape(-1, 2)
    seeds = [([kl for kl, _ in p.values()], [reward for _, reward in p.values()]) for p in pairs]
    return Line(
        escape(recipe.label),
        colour_of(recipes, recipe),
        {"kl": means[:, 0].tolist()},
        means[:, 1].tolist(),
        low=[],
        high=[],
        seeds=[({"kl": kl}, rewards) for kl, rewards in seeds],
        points=True,
    )


def _evaluations(kl: Sequence[Point], reward: Sequence[Point]) -> dict[float, tuple[float, float]]:
    rewards = {point.at["iteration"]: point.value for point in reward}
    return {
        point.at["iteration"]: (point.value, rewards[point.at["iteration"]])
        for point in kl
        if point.at["iteration"] in rewards
    }
