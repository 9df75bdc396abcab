"""The final figures of each recipe, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from progrpo.pages.compare.figures import Final, finals, processes_of
from progrpo.pages.compare.head import dot, in_figures
from progrpo.pages.compare.recipes import Recipe, measures_that_differ
from progrpo.pages.page import escape, note, section, table
from progrpo.pages.run_data import RunData, total
from progrpo.tracking.wording import MISSING, count, duration, number, percent

_NAMES = {"reward": "Reward", "accuracy": "Strict accuracy", "judge": "Judge", "diversity": "Diversity"}
_LEAD = (
    "Measured on the test prompts before and after training. ± is half of a 95 % interval: by Student’s t over seeds,"
    " or over the pictures of a recipe’s single run, which says nothing about other seeds. Differences from the first"
    " recipe are by Welch’s t over seeds, or picture by picture of two single runs."
)


def write(recipes: Sequence[Recipe]) -> str:
    figures = finals(recipes)
    if not figures:
        return section("results", "Final figures", "", note("No run has been evaluated yet.") + _cost(recipes))
    alike = not measures_that_differ(recipes)
    tables = "".join(_table(recipes, name, of_each, alike) for name, of_each in figures.items())
    return section("results", "Final figures", _LEAD, tables + _cost(recipes))


def _table(recipes: Sequence[Recipe], name: str, of_each: Sequence[Final], alike: bool) -> str:
    against = alike and any(final.against_first for final in of_each)
    head = [_title(name), "Runs", "Before", "After", "Change", *(["From the first"] if against else [])]
    rows = [
        [
            dot(recipes, recipe),
            str(len(recipe.runs)),
            percent(final.before) if name in ("accuracy", "judge") else number(final.before),
            in_figures(name, final.after),
            in_figures(name, final.change, sign=True),
            *([in_figures(name, final.against_first, sign=True)] if against else []),
        ]
        for recipe, final in zip(recipes, of_each, strict=True)
    ]
    return table(head, rows)


def _title(name: str) -> str:
    return _NAMES.get(name) or f"{escape(name.removeprefix('held_out@'))}, held out"


def _cost(recipes: Sequence[Recipe]) -> str:
    """The cost of each recipe so far: means over its runs."""
    rows = [
        [
            dot(recipes, recipe),
            _mean_count([len(run.metrics) for run in recipe.runs]),
            _mean_count([total(run.metrics, "rollout/nfe") for run in recipe.runs]),
            duration(_mean([run.wall_seconds for run in recipe.runs])),
            _hours(recipe.runs),
        ]
        for recipe in recipes
    ]
    hours = hours_name(recipes)
    lead = f"<p>Means over runs, evaluations included. {hours} are wall time times processes.</p>"
    return f"<h3>Cost</h3>{lead}{table(('', 'Iterations', 'Training NFE', 'Wall time', hours), rows)}"


def _hours(runs: Sequence[RunData]) -> str:
    hours = [run.wall_seconds * processes_of(run) / 3600 for run in runs if run.wall_seconds]
    return f"{np.mean(hours):.3g}" if hours else MISSING


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _mean_count(values: Sequence[float]) -> str:
    return count(_mean(values))


def hours_name(recipes: Sequence[Recipe]) -> str:
    """The name of a process' hours: those of a GPU, unless all runs say that they had none."""
    devices = [str(run.summary.get("device") or "") for recipe in recipes for run in recipe.runs]
    return "Process-hours" if all(device.startswith("cpu") for device in devices) else "GPU-hours"
