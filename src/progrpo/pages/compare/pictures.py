"""Pictures of the same prompts from the same noise, a column per run."""

from __future__ import annotations

from collections.abc import Sequence

from progrpo.pages.compare.head import colour_of
from progrpo.pages.compare.recipes import Recipe, differences, seed_of
from progrpo.pages.page import escape, note, read_picture, section, shot
from progrpo.pages.run_data import RunData
from progrpo.tracking.records import EvaluationRecord
from progrpo.tracking.wording import number

_COLUMNS, _ROWS = 6, 12
_NOISE = ("model.path", "model.resolution", "model.frames", "eval.seed")
_TITLE = "The same prompts"


def write(recipes: Sequence[Recipe]) -> str:
    shown = _chosen(recipes)
    if not shown:
        return section("pictures", _TITLE, "", note("No run has pictures of after training yet."))
    prompts = [[record["prompt"] for record in run.after] for _, run in shown]
    if any(others != prompts[0] for others in prompts):
        others = "Not shown side by side: the runs were evaluated on different prompts."
        return section("pictures", _TITLE, "", note(others))
    return section("pictures", _TITLE, _lead(recipes, shown), _sheet(recipes, shown))


def _chosen(recipes: Sequence[Recipe]) -> list[tuple[Recipe, RunData]]:
    """The runs with pictures, at most a few: the first of each recipe, then the second, and in order of recipes."""
    by_rank = [
        (rank, place, recipe, run)
        for place, recipe in enumerate(recipes)
        for rank, run in enumerate(run for run in recipe.runs if any(record.get("picture") for record in run.after))
    ]
    by_rank.sort(key=lambda item: item[:2])
    chosen = sorted(by_rank[:_COLUMNS], key=lambda item: (item[1], item[0]))
    return [(recipe, run) for _, _, recipe, run in chosen]


def _lead(recipes: Sequence[Recipe], shown: Sequence[tuple[Recipe, RunData]]) -> str:
    unlike = [name for name in differences(recipes) if name in _NOISE]
    noise = f"not from the same noise ({', '.join(unlike)} differ)" if unlike else "from the same noise"
    runs = sum(len(recipe.runs) for recipe in recipes)
    some = f" {len(shown)} of {runs} runs are shown." if len(shown) < runs else ""
    return (
        f"Each row is one test prompt, {noise}: before training, as the first run has it, and after that of each run."
        f" The mark is the strict verdict, if the reward gives one.{some}"
    )


def _sheet(recipes: Sequence[Recipe], shown: Sequence[tuple[Recipe, RunData]]) -> str:
    first = shown[0][1]
    with_before = first.paired
    heads = ["<th>before</th>"] if with_before else []
    heads += [_head(recipes, recipe, run) for recipe, run in shown]
    rows = [i for i, record in enumerate(first.after) if record.get("picture")][:_ROWS]
    body = "".join(_row(first, shown, i, with_before) for i in rows)
    columns = len(heads)
    return (
        f'<div class="scroll"><table class="side" style="--columns:{columns}"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _head(recipes: Sequence[Recipe], recipe: Recipe, run: RunData) -> str:
    colour = colour_of(recipes, recipe)
    return f'<th style="border-color:{colour}">{escape(recipe.label)}<small>seed {escape(seed_of(run))}</small></th>'


def _row(first: RunData, shown: Sequence[tuple[Recipe, RunData]], i: int, with_before: bool) -> str:
    cells = [_shot(first, first.before[i], "before training")] if with_before else []
    cells += [_shot(run, run.after[i], recipe.label) for recipe, run in shown]
    prompt = (
        f'<tr class="prompt-row"><th colspan="{len(cells)}" dir="auto">{escape(first.after[i]["prompt"])}</th></tr>'
    )
    return prompt + "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _shot(run: RunData, record: EvaluationRecord, whose: str) -> str:
    name = record.get("picture")
    picture = read_picture(run.path, name) if name else None
    if picture is None:
        return "–"
    title = f"{escape(whose)}: graded {number(record.get('graded'))}"
    return shot(picture, title, title, record["strict"])
