"""The result as Markdown tables, for a paper, a model card or a terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from progrpo.suites.results import ACCURACY, KL, SHARES, Change, Figure, ModelResult, SuiteResults
from progrpo.tracking.wording import MISSING, number, percent

_SPECIAL = re.compile(r"([\\|`*_\[\]<>])")


def tables(result: SuiteResults) -> str:
    """Format the headline and the tables: all figures, the score by kind, and the differences to the base."""
    parts = [headline(result), all_figures(result)]
    if result["kinds"] and any(_by_kind(result, model) for model in result["models"]):
        parts.append(f"{_title(result['score'])} by kind:\n\n{score_by_kind(result)}")
    parts += [against_base(result, model) for model in result["models"] if model["against"]]
    return "\n\n".join(parts) + "\n"


def headline(result: SuiteResults) -> str:
    part = "" if result["prompts"] == result["of_prompts"] else f" of {result['of_prompts']:,}"
    each = result["pictures_per_prompt"]
    pictures = "1 picture" if each == 1 else f"{each} pictures"
    mean = "; scores are means over kinds" if result["mean_of_kinds"] else ""
    return (
        f"{result['suite']} ({result['paper']}): {result['prompts']:,}{part} prompts, {pictures} each,"
        f" {result['num_inference_steps']} steps, guidance {result['guidance_scale']:g}, seed {result['seed']};"
        f" 95 % intervals by a bootstrap over prompts{mean}."
    )


def all_figures(result: SuiteResults) -> str:
    names = list(dict.fromkeys(name for model in result["models"] for name in model["figures"]))
    rows = [[_shown(model), *(with_interval(n, model["figures"].get(n)) for n in names)] for model in result["models"]]
    return _table(["model", *map(_title, names)], rows)


def score_by_kind(result: SuiteResults) -> str:
    score, kinds = result["score"], result["kinds"]
    rows = [
        [
            _shown(model),
            *(short(score, _by_kind(result, model).get(kind)) for kind in kinds),
            short(score, model["figures"].get(score)),
        ]
        for model in result["models"]
    ]
    return _table(["model", *map(_escaped, kinds), "all"], rows)


def against_base(result: SuiteResults, model: ModelResult) -> str:
    base = next(other["name"] for other in result["models"] if other["is_base"])
    rows = [
        [_title(name), change_in_words(name, change), p_value(change["p"]), p_value(change["p_holm"])]
        for name, change in model["against"].items()
    ]
    table = _table(["figure", "difference", "p", "p (Holm)"], rows)
    return f"{_escaped(model['name'])} less {_escaped(base)}, on the same noise:\n\n{table}"


def with_interval(name: str, figure: Figure | None) -> str:
    """A figure with its interval, such as `71.3 % [69.0, 73.5]`."""
    if figure is None:
        return MISSING
    low, high = figure["low"], figure["high"]
    value = short(name, figure)
    return value if low is None or high is None else f"{value} [{_bare(name, low)}, {_bare(name, high)}]"


def short(name: str, figure: Figure | None) -> str:
    """A figure without its interval."""
    if figure is None:
        return MISSING
    return percent(figure["value"]) if name in SHARES else number(figure["value"], digits_of(name))


def change_in_words(name: str, change: Change) -> str:
    """A difference with its interval: percentage points of a share."""
    low, high = change["low"], change["high"]
    sign = "+" if change["value"] >= 0 else ""
    interval = "" if low is None or high is None else f" [{_bare(name, low)}, {_bare(name, high)}]"
    return f"{sign}{_bare(name, change['value'])}{' points' if name in SHARES else ''}{interval}"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def digits_of(name: str) -> int:
    return 5 if name == KL else 3


def _bare(name: str, value: float) -> str:
    return f"{100 * value:.1f}" if name in SHARES else number(value, digits_of(name))


def _title(name: str) -> str:
    return {"distance": "feature distance", "lpips": "LPIPS", KL: "KL to the base", ACCURACY: "accuracy"}.get(
        name, _escaped(name)
    )


def _shown(model: ModelResult) -> str:
    return _escaped(model["name"]) + (" (base)" if model["is_base"] else "")


def _by_kind(result: SuiteResults, model: ModelResult) -> Mapping[str, Figure]:
    return model["by_kind"].get(result["score"], {})


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are as wide as their longest cell. All but the first are aligned to the right."""
    widths = [max(3, *(len(row[i]) for row in [head, *rows])) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])
