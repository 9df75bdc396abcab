"""Charts: functions from numbers to Plotly figures as plain dicts, without files or HTML.

A colour is a variable of page.css, such as `var(--ink)`. page.js puts its value in, by the scheme, or for paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

import numpy as np

from progrpo.tracking.records import Metrics, iteration_of, metric
from progrpo.tracking.statistics import Mean

Trace = dict[str, object]


class Figure(TypedDict):
    """A Plotly figure."""

    data: list[Trace]
    layout: dict[str, object]


INK, MUTED, GRID, GHOST, PAPER = "var(--ink)", "var(--muted)", "var(--grid)", "var(--ghost)", "var(--paper)"
ACCENT, GREY, AMBER, TEAL = "var(--accent)", "var(--grey)", "var(--amber)", "var(--teal)"
VIOLET, ROSE = "var(--violet)", "var(--rose)"
_BAND = "var(--band)"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
AXES = {"iteration": "iteration", "seconds": "seconds", "nfe": "training NFE"}
BINS = np.arange(-3.0, 3.01, 0.5)
BUCKETS = 500
"""The most buckets of a curve, each drawn by its lowest and its highest point: a chart is about as many pixels wide."""


def _axis(title: str = "", changes: Mapping[str, object] | None = None) -> dict[str, object]:
    base: dict[str, object] = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": GHOST,
        "ticks": "",
        "automargin": True,
    }
    named: dict[str, object] = {"title": {"text": title, "font": {"size": 12}, "standoff": 8}} if title else {}
    return base | named | dict(changes or {})


def _figure(data: Sequence[Trace], x: Mapping[str, object], y: Mapping[str, object], height: int) -> Figure:
    layout: dict[str, object] = {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "font": {"family": _FONT, "size": 12, "color": MUTED},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": GHOST, "font": {"color": INK, "family": _FONT}},
        "showlegend": len([trace for trace in data if trace.get("showlegend", True)]) > 1,
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "traceorder": "normal",
            "font": {"color": INK},
        },
        "dragmode": False,
        "xaxis": dict(x),
        "yaxis": dict(y),
    }
    return {"data": list(data), "layout": layout}


# --- curves over the run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A metric to draw, with `points` if only some iterations have it."""

    key: str
    name: str
    colour: str = ACCENT
    points: bool = False


def positions(metrics: Sequence[Metrics]) -> dict[str, list[float]]:
    """The position of each record on each of AXES. Seconds and NFE are sums up to and including the record."""
    seconds = np.cumsum([metric(record, "seconds") or 0.0 for record in metrics])
    nfe = np.cumsum([metric(record, "rollout/nfe") or 0 for record in metrics])
    return {"iteration": [iteration_of(r) for r in metrics], "seconds": seconds.tolist(), "nfe": nfe.tolist()}


def thinned(values: Sequence[float], buckets: int = BUCKETS) -> list[int]:
    """The indices of the values to draw: all of 2 * `buckets`, and else the two extremes of each bucket and both ends.

    Buckets are of consecutive values, and as many as each other up to one. No extreme of the whole is lost.
    """
    if len(values) <= 2 * buckets:
        return list(range(len(values)))
    parts = np.array_split(np.array(values, dtype=np.float64), buckets)
    starts = np.cumsum([0, *map(len, parts[:-1])])
    extremes = {
        int(start + at) for start, part in zip(starts, parts, strict=True) for at in (part.argmin(), part.argmax())
    }
    return sorted(extremes | {0, len(values) - 1})


def is_thinned(metrics: Sequence[Metrics]) -> bool:
    """Whether a curve over so many records may be drawn by fewer points."""
    return len(metrics) > 2 * BUCKETS


def _trace(metrics: Sequence[Metrics], curve: Curve) -> Trace | None:
    recorded = {
        i: float(value)  # Plotly would show a text as a label, and read it as HTML
        for i, record in enumerate(metrics)
        if (value := metric(record, curve.key)) is not None
    }
    if not recorded:
        return None
    places, values = list(recorded), list(recorded.values())
    present = {places[i]: values[i] for i in thinned(values)}
    x = {axis: [values[i] for i in present] for axis, values in positions(metrics).items()}
    marker = {"size": 8, "line": {"color": PAPER, "width": 1.5}} if curve.points else {"size": 5}
    width, dash = (1.5, "dot") if curve.points else (2, "solid")
    return {
        "type": "scatter",
        "name": curve.name,
        "mode": "lines+markers" if curve.points or len(present) < 3 else "lines",
        "line": {"color": curve.colour, "width": width, "dash": dash},
        "marker": marker,
        "x": x["iteration"],
        "y": list(present.values()),
        "meta": x,  # the page's buttons for the x axis take the other positions from here
        "hovertemplate": "%{y:.4g}",
    }


def curves(
    metrics: Sequence[Metrics], chosen: Sequence[Curve], y: Mapping[str, object] | None = None, height: int = 250
) -> Figure | None:
    """The chosen metrics over the run. None if none of them was recorded."""
    traces = [trace for curve in chosen if (trace := _trace(metrics, curve)) is not None]
    if not traces:
        return None
    figure = _figure(traces, _axis(AXES["iteration"]), _axis("", y), height)
    figure["layout"]["hovermode"] = "x unified"
    return figure


# --- evaluation -------------------------------------------------------------------------------------------------------


def accuracy_bars(before: Mapping[str, Mean], after: Mapping[str, Mean]) -> Figure:
    """The share of pictures that pass, by kind of prompt, before and after, with standard errors."""
    sides = [(before, "before", GREY), (after, "after", ACCENT)]
    data: list[Trace] = [
        {
            "type": "bar",
            "name": name,
            "x": list(shares),
            "y": [share.value for share in shares.values()],
            "customdata": [share.count for share in shares.values()],
            "error_y": {"array": [s.error for s in shares.values()], "color": MUTED, "thickness": 1, "width": 3},
            "marker": {"color": colour, "cornerradius": 3},
            "hovertemplate": "%{y:.1%} of %{customdata}",
        }
        for shares, name, colour in sides
        if shares
    ]
    x = _axis("", {"showgrid": False, "type": "category"})  # kinds that look like numbers or dates are names
    figure = _figure(data, x, _axis("", {"range": [0, 1.04], "tickformat": ".0%"}), 270)
    figure["layout"] |= {"bargap": 0.42, "bargroupgap": 0.06}
    return figure


@dataclass(frozen=True)
class Bounded:
    """A value with the ends of its interval, which are the value itself where it is not known."""

    value: float
    low: float
    high: float


def interval_bars(sides: Mapping[str, tuple[str, Mapping[str, Bounded]]], share: bool, height: int = 300) -> Figure:
    """Values by kind with their intervals, a bar for each side. `sides` has the colour and the values by its name."""
    form = ".1%" if share else ".4g"
    data: list[Trace] = [
        {
            "type": "bar",
            "name": name,
            "x": list(values),
            "y": [bounded.value for bounded in values.values()],
            "error_y": _ends(list(values.values())),
            "marker": {"color": colour, "cornerradius": 3},
            "hovertemplate": f"%{{x}}: %{{y:{form}}}<extra>%{{fullData.name}}</extra>",
        }
        for name, (colour, values) in sides.items()
    ]
    x = _axis("", {"showgrid": False, "type": "category"})
    y = _axis("", {"range": [0, 1.04], "tickformat": ".0%"} if share else {"rangemode": "tozero"})
    figure = _figure(data, x, y, height)
    figure["layout"] |= {"bargap": 0.32, "bargroupgap": 0.06}
    return figure


def interval_points(
    points: Mapping[str, tuple[str, Bounded, Bounded]], x_title: str, y_title: str, share: bool, height: int = 320
) -> Figure:
    """A point per name with its colour and its two values, and their intervals."""
    data: list[Trace] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": [x.value],
            "y": [y.value],
            "error_x": _ends([x]),
            "error_y": _ends([y]),
            "marker": {"color": colour, "size": 11, "line": {"color": PAPER, "width": 1.5}},
            "hovertemplate": f"%{{x:.4g}}, %{{y:{'.1%' if share else '.4g'}}}<extra>%{{fullData.name}}</extra>",
        }
        for name, (colour, x, y) in points.items()
    ]
    farthest = max(x.high for _, x, _ in points.values())
    form: dict[str, object] = {"tickformat": ".0%"} if share else {}
    # beyond both ends, or a point at 0 would be cut in half
    x_axis = _axis(x_title, {"range": [-0.04 * farthest, 1.06 * farthest]} if farthest > 0 else {})
    return _figure(data, x_axis, _axis(y_title, form), height)


def _ends(values: Sequence[Bounded]) -> dict[str, object]:
    """Bars of errors from the lower to the upper ends."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [bounded.high - bounded.value for bounded in values],
        "arrayminus": [bounded.value - bounded.low for bounded in values],
        "color": MUTED,
        "thickness": 1,
        "width": 3,
    }


# --- pruning ----------------------------------------------------------------------------------------------------------


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
    x = _axis("(reward − mean) / std", {"range": [-3, 3], "showgrid": False, "dtick": 1})
    y = _axis("", {"range": [0, top * 1.05], "tickformat": ".0%", "nticks": 4})
    figure = _figure([bars | {"hovertemplate": "%{y:.0%}<extra></extra>"}], x, y, 180)
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
    figure = _figure(data, _axis("step", {"dtick": 1, "showgrid": False}), _axis("members of a group"), 240)
    figure["layout"] |= {"barmode": "stack", "bargap": 0.12}
    return figure


def agreement(
    steps: Sequence[int], correlations_AT: np.ndarray, path: Sequence[int], prune_steps: Sequence[int]
) -> Figure:
    """Spearman's correlation of previews with final rewards by step, over A audits, with the prune points."""
    data = [*_band(steps, correlations_AT), _mean_line(steps, correlations_AT)]
    low = min(0.0, float(np.min(correlations_AT)) - 0.05)
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
    """The expected progress of a plan in an iteration, over plain GRPO's, and the plan in words (HTML)."""

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
    y = _axis("", {"range": [low - margin, high + 2 * margin], "tickformat": ".2f"})
    figure = _figure([line], _axis(AXES["iteration"]), y, 260)
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
    figure = _figure(data, _axis("step", {"dtick": 1}), _axis("", y), 240)
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
        "y": np.mean(values_AT, axis=0).tolist(),
        "line": {"color": ACCENT, "width": 2},
        "marker": {"size": 7, "line": {"color": PAPER, "width": 1.5}},
        "hovertemplate": "step %{x}: %{y:.2f}<extra></extra>",
    }


def _band(steps: Sequence[int], values_AT: np.ndarray) -> list[Trace]:
    edge: Trace = {"type": "scatter", "mode": "lines", "x": list(steps), "line": {"width": 0}, "hoverinfo": "skip"}
    lowest, highest = np.min(values_AT, axis=0), np.max(values_AT, axis=0)
    return [
        edge | {"showlegend": False, "y": lowest.tolist()},
        edge | {"showlegend": False, "y": highest.tolist(), "fill": "tonexty", "fillcolor": _BAND},
    ]


# --- comparison -------------------------------------------------------------------------------------------------------

COLOURS = (ACCENT, AMBER, TEAL, VIOLET, ROSE, GREY)


@dataclass(frozen=True)
class Line:
    """A recipe's line: its mean over seeds, with the range of the seeds and each of them. `at` is by axis."""

    name: str
    colour: str
    at: Mapping[str, Sequence[float]]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    seeds: Sequence[tuple[Mapping[str, Sequence[float]], Sequence[float]]] = ()
    points: bool = False

    def traces(self, axis: str) -> list[Trace]:
        """The seeds as thin lines and their range as a band, if there are several, and the mean."""
        mode = "lines+markers" if self.points or len(self.mean) < 3 else "lines"
        look: Trace = {
            "type": "scatter",
            "line": {"color": self.colour, "width": 2},
            "marker": {"size": 7},
            "mode": mode,
        }
        mean = look | {"name": self.name, "hovertemplate": "%{y:.4g}"} | _over(self.at, self.mean, axis)
        if len(self.seeds) < 2:
            return [mean]
        quiet: Trace = {"hoverinfo": "skip", "showlegend": False}
        thin = look | quiet | {"line": {"color": self.colour, "width": 1}, "marker": {"size": 3}, "opacity": 0.35}
        there_and_back = {name: [*values, *reversed(values)] for name, values in self.at.items()}
        shape: Trace = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "fill": "toself", "opacity": 0.16}
        band = shape | quiet | {"fillcolor": self.colour}
        return [
            band | _over(there_and_back, [*self.low, *reversed(self.high)], axis),
            *(thin | _over(at, values, axis) for at, values in self.seeds),
            mean,
        ]


def _over(at: Mapping[str, Sequence[float]], y: Sequence[float], axis: str) -> Trace:
    """The places of a trace, with those on other axes for the page's buttons."""
    drawn = thinned(y)
    positions = {name: [values[i] for i in drawn] for name, values in at.items()}
    return {"x": positions[axis], "y": [y[i] for i in drawn], "meta": positions}


def compared(
    lines: Sequence[Line], axis: str, title: str, y: Mapping[str, object] | None = None, height: int = 250
) -> Figure:
    """The lines of recipes over an axis. Their names stand in the page's own legend."""
    x = {"rangemode": "tozero"}
    figure = _figure([t for line in lines for t in line.traces(axis)], _axis(title, x), _axis("", y), height)
    figure["layout"] |= {"showlegend": False, "hovermode": "closest"}
    return figure
