"""The look of the benchmarks' pictures. matplotlib draws them (`pip install 'progrpo[dev]'`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    raise SystemExit(
        "benchmarks with pictures need matplotlib, which is not installed: pip install 'progrpo[dev]'"
    ) from None

__all__ = ["COLOURS", "INK", "QUIET", "Axes", "Figure", "add_legend", "drawn", "save"]

INK, QUIET, RULE = "#282c34", "#80868f", "#e1e4e8"
COLOURS = ("#1e6ec8", "#dc7814", "#1e8c50", "#965aaa", "#80868f", "#c83c32", "#1496aa", "#a07828", "#5a646e", "#e65aa0")
LOOK: dict[Any, Any] = {
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.color": RULE,
    "text.color": INK,
    "xtick.color": QUIET,
    "xtick.major.size": 0,
    "ytick.color": QUIET,
    "ytick.major.size": 0,
}


def drawn(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[list[Axes]]]:
    """A figure of so many inches, and its axes by row and column."""
    with rc_context(LOOK):
        figure = Figure((width, height), layout="constrained")
        fields = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in fields]


def add_legend(figure: Figure) -> None:
    """Add a legend of all axes' labels on the right, each label once."""
    by_label = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(by_label.values(), by_label.keys(), loc="outside right upper", frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, without the version of what drew it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None}, pil_kwargs={"optimize": True})
