"""Charts: functions from numbers to Plotly figures as plain dicts, without files or HTML.

A colour is a variable of page.css, such as `var(--ink)`. page.js puts its value in, by the scheme, or for paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from progrpo.tracking.records import Metrics, metric, number_of
from progrpo.tracking.statistics import Mean

Trace = dict[str, object]


class Figure(TypedDict):
    """A Plotly figure."""

    data: list[Trace]
    layout: dict[str, object]


INK, MUTED, GRID, GHOST, PAPER = "var(--ink)", "var(--muted)", "var(--grid)", "var(--ghost)", "var(--paper)"
ACCENT, GREY, AMBER, TEAL = "var(--accent)", "var(--grey)", "var(--amber)", "var(--teal)"
VIOLET, ROSE = "var(--violet)", "var(--rose)"
COLOURS = (ACCENT, AMBER, TEAL, VIOLET, ROSE, GREY)
BAND = "var(--band)"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
AXES = {"iteration": "iteration", "seconds": "seconds", "nfe": "training NFE"}
BUCKETS = 500
"""The most buckets of a curve, each drawn by its lowest and its highest point: a chart is about as many pixels wide."""


def axis_of(title: str = "", changes: Mapping[str, object] | None = None) -> dict[str, object]:
    """A Plotly axis in the page's look, with `changes`."""
    base: dict[str, object] = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": GHOST,
        "ticks": "",
        "automargin": True,
    }
    named: dict[str, object] = {"title": {"text": title, "font": {"size": 12}, "standoff": 8}} if title else {}
    return base | named | dict(changes or {})


def figure_of(data: Sequence[Trace], x: Mapping[str, object], y: Mapping[str, object], height: int) -> Figure:
    """The traces on two axes in the page's look. `height` is in pixels."""
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
    """The position of each record on each of AXES: the iterations, seconds and NFE up to and including it."""
    seconds = np.cumsum([metric(record, "seconds") or 0.0 for record in metrics])
    nfe = np.cumsum([metric(record, "rollout/nfe") or 0 for record in metrics])
    return {"iteration": [number_of(r) for r in metrics], "seconds": seconds.tolist(), "nfe": nfe.tolist()}


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
    figure = figure_of(traces, axis_of(AXES["iteration"]), axis_of("", y), height)
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
    x = axis_of("", {"showgrid": False, "type": "category"})  # kinds that look like numbers or dates are names
    figure = figure_of(data, x, axis_of("", {"range": [0, 1.04], "tickformat": ".0%"}), 270)
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
    x = axis_of("", {"showgrid": False, "type": "category"})
    y = axis_of("", {"range": [0, 1.04], "tickformat": ".0%"} if share else {"rangemode": "tozero"})
    figure = figure_of(data, x, y, height)
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
    x_axis = axis_of(x_title, {"range": [-0.04 * farthest, 1.06 * farthest]} if farthest > 0 else {})
    return figure_of(data, x_axis, axis_of(y_title, form), height)


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
