"""The charts of pruning: what a plan keeps of a group by step, and what its choice is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from progrpo.pages.charts import (
    ACCENT,
    AMBER,
    AXES,
    BAND,
    GHOST,
    GREY,
    MUTED,
    PAPER,
    Figure,
    Trace,
    axis_of,
    figure_of,
    thinned,
)

BINS = np.arange(-3.0, 3.01, 0.5)


def histogram(values: np.ndarray, colour: str, top: float) -> Figure:
    """The distribution of standardised rewards of a subset. `top` is the y range that all charts of the row share."""
    shares = histogram_shares(values)
    centres = (BINS[:-1] + BINS[1:]) / 2
    bars: Trace = {
        "type": "bar",
        "x": centres.tolist(),
        "y": shares.tolist(),
        "marker": {"color": colour, "cornerradius": 2},
    }
    x = axis_of("(reward − mean) / std", {"range": [-3, 3], "showgrid": False, "dtick": 1})
    y = axis_of("", {"range": [0, top * 1.05], "tickformat": ".0%", "nticks": 4})
    figure = figure_of([bars | {"hovertemplate": "%{y:.0%}<extra></extra>"}], x, y, 180)
    figure["layout"]["bargap"] = 0.08
    return figure


def histogram_shares(values: np.ndarray) -> np.ndarray:
    """The share of values in each of BINS. The outermost bins include what lies beyond them."""
    counts, _ = np.histogram(np.clip(values, BINS[0], BINS[-1]), BINS)
    return counts / max(len(values), 1)


def alive_by_step(path: Sequence[int], prune_steps: Sequence[int], steps: int) -> list[int]:
    """The members of a group that take part in each step's network call. A prune point follows its step's call."""
    return [path[sum(prune < step for prune in prune_steps)] for step in range(steps)]


def funnel(path: Sequence[int], prune_steps: Sequence[int], steps: int) -> Figure:
    """The members of a group by step, and the network calls that pruning saves."""
    alive = alive_by_step(path, prune_steps, steps)
    x = list(range(steps))
    bar: Trace = {"type": "bar", "x": x, "hovertemplate": "step %{x}: %{y}<extra>%{fullData.name}</extra>"}
    data = [
        bar | {"name": "network calls made", "y": alive, "marker": {"color": ACCENT}},
        bar | {"name": "saved by pruning", "y": [path[0] - n for n in alive], "marker": {"color": GHOST}},
    ]
    figure = figure_of(data, axis_of("step", {"dtick": 1, "showgrid": False}), axis_of("members of a group"), 240)
    figure["layout"] |= {"barmode": "stack", "bargap": 0.12}
    return figure


def agreement(
    steps: Sequence[int], correlations_AT: np.ndarray, path: Sequence[int], prune_steps: Sequence[int]
) -> Figure:
    """Spearman's correlation of previews with final rewards by step, over A audits, with the prune points.

    An audit may lack a step (NaN), but each step is in one of them.
    """
    data = [*_band(steps, correlations_AT), _mean_line(steps, correlations_AT)]
    low = min(0.0, float(np.nanmin(correlations_AT)) - 0.05)
    return _by_step(data, {"range": [low, 1.09], "tickformat": ".1f"}, path, prune_steps)


def variance(
    steps: Sequence[int],
    variance_AT: np.ndarray,
    variance_final_AT: np.ndarray,
    path: Sequence[int],
    prune_steps: Sequence[int],
) -> Figure:
    """V of the choice by previews and of the best choice by step, over A audits, with V = 1 and the prune points."""
    line = {"showlegend": True, "hovertemplate": "step %{x}: %{y:.2f}<extra>%{fullData.name}</extra>"}
    best = _mean_line(steps, variance_final_AT) | line | {"name": "by final rewards", "mode": "lines"}
    data = [
        *_band(steps, variance_AT),
        best | {"line": {"color": GREY, "width": 2}},
        _mean_line(steps, variance_AT) | line | {"name": "by previews"},
    ]
    low, high = min(0.95, float(np.min(variance_AT))), max(1.05, float(np.max(variance_final_AT)))
    figure = _by_step(data, {"range": [low - 0.05, high + 0.05], "tickformat": ".1f"}, path, prune_steps)
    rule = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "line": {"color": MUTED, "width": 1}}
    figure["layout"]["shapes"] = [*cast("list[object]", figure["layout"]["shapes"]), rule]
    return figure


@dataclass(frozen=True)
class Judged:
    """The expected progress of a plan in an iteration, from 1 on, over plain GRPO's, and the plan in words (HTML)."""

    iteration: int
    value: float
    plan: str


def plan_value(judged: Sequence[Judged], rules: Mapping[int, int]) -> Figure:
    """The expected progress of plans over the run, with a line at 1 and numbered rules at iterations."""
    drawn = [judged[i] for i in thinned([one.value for one in judged])]
    values = [one.value for one in drawn]
    line: Trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [one.iteration for one in drawn],
        "y": values,
        "customdata": [one.plan for one in drawn],
        "line": {"color": ACCENT, "width": 2},
        "marker": {"size": 7, "line": {"color": PAPER, "width": 1.5}},
        "hovertemplate": "iteration %{x}: %{y:.2f} ×<br>%{customdata}<extra></extra>",
    }
    low, high = min(0.95, *values), max(1.05, *values)
    margin = 0.08 * (high - low)
    y = axis_of("", {"range": [low - margin, high + 2 * margin], "tickformat": ".2f"})
    figure = figure_of([line], axis_of(AXES["iteration"]), y, 260)
    below = {"type": "line", "layer": "below"}
    plain = below | {"xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "line": {"color": MUTED, "width": 1}}
    rule = below | {"yref": "paper", "y0": 0, "y1": 1, "line": {"color": AMBER, "width": 1.5, "dash": "dot"}}
    figure["layout"]["shapes"] = [plain, *(rule | {"x0": i, "x1": i} for i in rules)]
    label = {"yref": "paper", "y": 1, "yanchor": "top", "xanchor": "left", "xshift": 4, "showarrow": False}
    figure["layout"]["annotations"] = [
        label | {"x": i, "text": str(number), "font": {"color": AMBER, "size": 12}} for i, number in rules.items()
    ]
    return figure


def _by_step(data: Sequence[Trace], y: Mapping[str, object], path: Sequence[int], prune_steps: Sequence[int]) -> Figure:
    """A figure over steps, with a rule at each prune point."""
    figure = figure_of(data, axis_of("step", {"dtick": 1}), axis_of("", y), 240)
    rule = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": AMBER, "width": 1.5, "dash": "dot"}}
    figure["layout"]["shapes"] = [rule | {"x0": step, "x1": step} for step in prune_steps]
    figure["layout"]["annotations"] = [
        {"x": step, "y": 0.03, "yref": "paper", "yanchor": "bottom", "xanchor": "left", "xshift": 4, "showarrow": False}
        | {"text": f"{path[i]} → {path[i + 1]}", "font": {"color": AMBER, "size": 12}}
        for i, step in enumerate(prune_steps)
    ]
    return figure


def _mean_line(steps: Sequence[int], values_AT: np.ndarray) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(steps),
        "y": np.nanmean(values_AT, axis=0).tolist(),
        "line": {"color": ACCENT, "width": 2},
        "marker": {"size": 7, "line": {"color": PAPER, "width": 1.5}},
        "hovertemplate": "step %{x}: %{y:.2f}<extra></extra>",
    }


def _band(steps: Sequence[int], values_AT: np.ndarray) -> list[Trace]:
    edge: Trace = {"type": "scatter", "mode": "lines", "x": list(steps), "line": {"width": 0}, "hoverinfo": "skip"}
    lowest, highest = np.nanmin(values_AT, axis=0), np.nanmax(values_AT, axis=0)
    return [
        edge | {"showlegend": False, "y": lowest.tolist()},
        edge | {"showlegend": False, "y": highest.tolist(), "fill": "tonexty", "fillcolor": BAND},
    ]
