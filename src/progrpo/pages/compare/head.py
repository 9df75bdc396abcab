"""The head of the comparison: which recipes are compared, how each ends, and what to be careful about."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from progrpo.pages import charts
from progrpo.pages.compare.cautions import cautions
from progrpo.pages.compare.figures import finals
from progrpo.pages.compare.recipes import Recipe
from progrpo.pages.page import escape, note
from progrpo.tracking.statistics import Interval
from progrpo.tracking.wording import MISSING, number, percent

_LINKS = {
    "results": "Final figures",
    "curves": "Curves",
    "equal": "Equal reward",
    "distance": "Reward and KL",
    "pictures": "Pictures",
    "settings": "Settings",
}
_MOST_NAMED = 4


def write(recipes: Sequence[Recipe]) -> str:
    runs = sum(len(recipe.runs) for recipe in recipes)
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in _LINKS.items())
    notes = "".join(note(escape(sentence)) for sentence in cautions(recipes))
    names = " <em>and</em> ".join(escape(recipe.label) for recipe in recipes[:_MOST_NAMED])
    more = f" <em>and {len(recipes) - _MOST_NAMED} more</em>" if len(recipes) > _MOST_NAMED else ""
    return (
        f'<header class="compared"><div class="eyebrow"><span>progrpo comparison</span><span>{runs} runs</span></div>'
        f'<h1>{names}{more}</h1><p class="verdict">{_verdict(recipes)}</p>{notes}<nav>{links}</nav></header>\n'
    )


def _verdict(recipes: Sequence[Recipe]) -> str:
    """A sentence with the end of each recipe, by the figure that they share: strict accuracy, or the reward."""
    figures = finals(recipes)
    name = next((name for name in ("accuracy", "reward") if any(f.after for f in figures.get(name, []))), None)
    if name is None:
        return "None of these runs has been evaluated after training yet."
    ends = [
        f"{escape(recipe.label)} ends at {in_figures(name, final.after)}"
        for recipe, final in list(zip(recipes, figures[name], strict=True))[:_MOST_NAMED]
        if final.after
    ]
    words = {"accuracy": "strict accuracy", "reward": "a mean reward"}[name]
    return f"By {words} on the test prompts, {'; '.join(ends)}."


def in_figures(name: str, value: Interval | None, sign: bool = False) -> str:
    """A figure with its 95 % interval, shares in per cent."""
    if value is None:
        return MISSING
    share = name in ("accuracy", "judge")
    shown = percent(value.value) if share else number(value.value)
    plus = "+" if sign and value.value >= 0 else ""
    if not isfinite(value.half):
        return plus + shown
    half = f"{100 * value.half:.1f}" if share else number(value.half)
    return f"{plus}{shown.removesuffix(' %')} ± {half}{' %' if share else ''}"


def colour_of(recipes: Sequence[Recipe], recipe: Recipe) -> str:
    return charts.COLOURS[list(recipes).index(recipe) % len(charts.COLOURS)]


def dot(recipes: Sequence[Recipe], recipe: Recipe) -> str:
    """A recipe's label after a dot of its colour."""
    return f'<span class="recipe"><i style="background:{colour_of(recipes, recipe)}"></i>{escape(recipe.label)}</span>'
