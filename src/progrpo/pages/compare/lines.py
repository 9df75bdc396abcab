"""The charts of the comparison: a line for each recipe, with its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from progrpo.pages.charts import Figure, Trace, axis_of, figure_of, thinned


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
    figure = figure_of([t for line in lines for t in line.traces(axis)], axis_of(title, x), axis_of("", y), height)
    figure["layout"] |= {"showlegend": False, "hovermode": "closest"}
    return figure
