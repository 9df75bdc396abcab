"""The comparison of runs: one HTML file without dependencies, and the same figures as JSON.

Runs that differ in the seed and in what the machine chose alone are one recipe. The folders may be a stranger's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from progrpo.durable import write_file
from progrpo.messages import named
from progrpo.pages import page
from progrpo.pages.compare import curves, head, pictures, results, settings
from progrpo.pages.compare.cautions import cautions
from progrpo.pages.compare.figures import Arrival, curve, finals, levels, processes_of, spread
from progrpo.pages.compare.recipes import Recipe, differences, grouped, measures_that_differ, seed_of
from progrpo.pages.run_data import RunData, read_run_data, readable
from progrpo.tracking.files import in_bytes
from progrpo.tracking.wording import MISSING

_SECTIONS = (head, results, curves, pictures, settings)


def compare(folders: Sequence[Path]) -> list[Recipe]:
    """The recipes of the runs in these folders. ValueError for fewer than two, or one that is given twice."""
    real = [os.path.realpath(folder) for folder in folders]
    twice = next((folder for folder, path in zip(folders, real, strict=True) if real.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"{named(twice)} is given twice; name each run once")
    if len(folders) < 2:
        raise ValueError("a comparison needs two runs or more; name their folders one after another")
    runs = [read_run_data(folder) for folder in folders]
    with readable("the configuration of one of the runs"):
        return grouped(runs)


def comparison_page(recipes: Sequence[Recipe]) -> str:
    """The page as HTML."""
    style = (files("progrpo.pages.compare") / "compare.css").read_text(encoding="utf-8")
    body = f"<style>\n{style}</style>"
    for section in _SECTIONS:
        with readable(f"what the comparison shows as {section.__name__.rpartition('.')[2]}"):
            body += section.write(recipes)
    names = ", ".join(recipe.label for recipe in recipes)
    return page.document(f"{names}: progrpo comparison", body)


def write_comparison(recipes: Sequence[Recipe], out: Path) -> Path:
    """Write the page and return its path. ValueError if it cannot be written."""
    text = comparison_page(recipes)
    try:
        write_file(out, lambda file: file.write(in_bytes(text)))
    except OSError as error:
        raise ValueError(f"{named(out)} cannot be written: {error.strerror}; name another file as --out") from None
    return out


def figures_of(recipes: Sequence[Recipe]) -> dict[str, object]:
    """The figures of the comparison, ready for JSON. A value that is not known is None."""
    with readable("what the comparison gives as JSON"):
        figures = finals(recipes)
        result: dict[str, object] = {
            "cautions": cautions(recipes),
            "recipes": [
                {
                    "label": recipe.label,
                    "runs": [_run(run) for run in recipe.runs],
                    "final": {name: asdict(of_each[i]) for name, of_each in figures.items()},
                    "curves": {
                        name: asdict(spread([curve(run, name) for run in recipe.runs]))
                        for name in curves.metrics_of([recipe])
                    },
                }
                for i, recipe in enumerate(recipes)
            ],
            "differences": {
                name: {r.label: None if value == MISSING else value for r, value in zip(recipes, of_each, strict=True)}
                for name, of_each in differences(recipes).items()
            },
            "equal_reward": _equal_reward(recipes),
        }
        return {name: _known(value) for name, value in result.items()}


def _run(run: RunData) -> dict[str, object]:
    return {
        "folder": str(run.path),
        "seed": seed_of(run),
        "status": run.status,
        "iterations": len(run.metrics),
        "wall_seconds": run.wall_seconds,
        "processes": processes_of(run),
    }


def _equal_reward(recipes: Sequence[Recipe]) -> dict[str, object] | None:
    reached = None if measures_that_differ(recipes) else levels(recipes)
    if reached is None:
        return None
    return {
        "start": reached.start,
        "end": reached.end,
        "rewards": reached.rewards,
        "arrivals": {
            label: [[None if place is None else _arrival(place) for place in runs] for runs in of_levels]
            for label, of_levels in reached.arrivals.items()
        },
    }


def _arrival(place: Arrival) -> dict[str, object]:
    return {**place.at, "at_first_evaluation": place.at_first}


def _known(value: object) -> object:
    """The value with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _known(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_known(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
