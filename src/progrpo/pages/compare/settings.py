"""The settings that differ between the recipes, and the runs."""

from __future__ import annotations

from collections.abc import Sequence

from progrpo.pages.compare.head import dot
from progrpo.pages.compare.recipes import Recipe, differences, seed_of
from progrpo.pages.page import escape, note, section, table
from progrpo.pages.run_data import RunData
from progrpo.tracking.wording import MISSING, duration

_LEAD = (
    "Only what differs. Runs that differ in the seed, in what the machine chose (dtype, microbatches), in checkpoints"
    " or in trackers are one recipe."
)


def write(recipes: Sequence[Recipe]) -> str:
    unlike = differences(recipes)
    rows = [[f"<code>{escape(name)}</code>", *map(_value, of_each)] for name, of_each in unlike.items()]
    heads = ("", *(dot(recipes, recipe) for recipe in recipes))
    body = table(heads, rows) if rows else note("No setting differs: these runs are of one recipe.")
    return section("settings", "Settings that differ", _LEAD, body + _runs(recipes))


def _value(text: str) -> str:
    return f'<span class="value">{escape(text)}</span>'


def _runs(recipes: Sequence[Recipe]) -> str:
    rows = [[dot(recipes, recipe), *_cells(run)] for recipe in recipes for run in recipe.runs]
    return f"<h3>Runs</h3>{table(('', 'Folder', 'Seed', 'Status', 'Wall time', 'Device'), rows)}"


def _cells(run: RunData) -> list[str]:
    status = escape(run.status.partition(":")[0])
    device = escape(run.summary.get("device") or MISSING)
    return [
        f"<code>{escape(run.path)}</code>",
        escape(seed_of(run)),
        f'<span class="status {status}">{status}</span>',
        duration(run.wall_seconds),
        device,
    ]
