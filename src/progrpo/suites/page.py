"""The files of a result: results.json, table.md, and report.html, which needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from progrpo.pages import charts, page
from progrpo.suites.formats import SuitePrompt, spread_over_kinds
from progrpo.suites.markdown import change_in_words, headline, p_value, short, tables, with_interval
from progrpo.suites.records import picture_name
from progrpo.suites.results import ACCURACY, KL, SHARES, Figure, Grid, ModelRecords, ModelResult, SuiteResults
from progrpo.tracking.files import Folder, encode
from progrpo.tracking.wording import MISSING, count, duration

_SHOWN = 24
"""The prompts whose pictures the report shows."""
_TITLES = {
    ACCURACY: ("Accuracy", "the share of pictures that pass the strict verdict of the suite’s reward"),
    "judge": ("Judge", "the share that a second network passes, which no run is trained on"),
    "diversity": ("Pixel distance", "root mean square difference of two pictures of a prompt"),
    "lpips": ("LPIPS", "perceptual distance of two pictures of a prompt"),
    "distance": ("Feature distance", "1 − cosine of the features of two pictures of a prompt"),
    "vendi": ("Vendi score", "the effective number of different pictures of a prompt"),
    "vendi of all": ("Vendi of all", "the same of all pictures together"),
    KL: ("KL to the base", "mean square distance of velocities, in squared latent units"),
}


def write_results(out: Path, result: SuiteResults, grid: Grid, models: Sequence[ModelRecords]) -> None:
    """Write the result as JSON, as Markdown and as a page."""
    folder = Folder(out)
    folder.write_text("results.json", encode(result, indent=1))
    folder.write_text("table.md", tables(result))
    folder.write_text("report.html", report(out, result, grid, models))


def report(out: Path, result: SuiteResults, grid: Grid, models: Sequence[ModelRecords]) -> str:
    """The page as HTML. Texts of prompts and models may be a stranger's, and are escaped."""
    style = (files("progrpo.suites") / "page.css").read_text(encoding="utf-8")
    body = f"<style>\n{style}</style>" + _head(result) + _figures(result) + _by_kind(result) + _frontier(result)
    body += _pictures(out, grid, models) + _settings(result)
    return page.document(f"{result['suite']}: progrpo evaluation", body)


# --- the head ---------------------------------------------------------------------------------------------------------


def _head(result: SuiteResults) -> str:
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in _links(result).items())
    return (
        '<header><div class="eyebrow"><span>progrpo evaluation</span>'
        f"<span>{page.escape(result['device'])}</span></div><h1>{page.escape(result['suite'])}</h1>"
        f'<p class="verdict">{_verdict(result)}</p><div class="tiles">{_tiles(result)}</div><nav>{links}</nav>'
        f"{''.join(page.note(page.escape(note)) for note in result['notes'])}</header>\n"
    )


def _links(result: SuiteResults) -> dict[str, str]:
    links = {"figures": "Figures", "kinds": "By kind", "frontier": "Score against KL", "pictures": "Pictures"}
    missing = {
        "kinds": not result["kinds"],
        "frontier": not any(KL in model["figures"] for model in result["models"]),
    }
    return {anchor: title for anchor, title in links.items() if not missing.get(anchor)} | {"settings": "Settings"}


def _verdict(result: SuiteResults) -> str:
    """A sentence on each model's score."""
    score = result["score"]
    sentences = []
    for model in result["models"]:
        if model["is_base"] and len(result["models"]) > 1:
            continue
        interval = with_interval(score, model["figures"].get(score))
        value = f"{page.escape(model['name'])}: {_name(score).lower()} {interval}"
        change = model["against"].get(score)
        if change is not None:
            base = next(other["name"] for other in result["models"] if other["is_base"])
            value += f", {change_in_words(score, change)} against {page.escape(base)} (p&nbsp;{_equals(change['p'])})"
        sentences.append(f"{value}.")
    return " ".join(sentences)


def _equals(p: float) -> str:
    """A p-value after the letter p, as HTML on one line."""
    text = p_value(p)
    return page.escape(text if text.startswith("<") else f"= {text}").replace(" ", "&nbsp;")


def _tiles(result: SuiteResults) -> str:
    score = result["score"]
    first = next((model for model in result["models"] if not model["is_base"]), result["models"][0])
    part = "" if result["prompts"] == result["of_prompts"] else f" of {count(result['of_prompts'])}"
    missing = sum(model["missing"] for model in result["models"])
    each = f"{result['pictures_per_prompt']} pictures each"
    tiles = {
        _name(score): (short(score, first["figures"].get(score)), page.escape(first["name"])),
        "Prompts": (count(result["prompts"]), f"{part.strip() or 'all'}, {each}"),
        "Pictures": (count(sum(model["pictures"] for model in result["models"])), f"{count(missing)} missing"),
    }
    return "".join(
        f'<div class="tile"><span>{name}</span><strong>{value}</strong><span>{about}</span></div>'
        for name, (value, about) in tiles.items()
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def _figures(result: SuiteResults) -> str:
    names = list(dict.fromkeys(name for model in result["models"] for name in model["figures"]))
    head = ["", *(f"{page.escape(model['name'])}{_base_mark(model)}" for model in result["models"])]
    rows = [[_row_head(name), *(_cell(name, model) for model in result["models"])] for name in names]
    lead = (
        "Means with 95 % intervals, by a bootstrap over prompts. Below each is the difference to the base on the same"
        " noise, with the p-value of a permutation test over prompts, and in brackets that after Holm’s correction for"
        " all figures of the model."
    )
    return page.section("figures", "Figures", lead, page.table(head, rows))


def _row_head(name: str) -> str:
    about = _TITLES[name][1] if name in _TITLES else ""
    return f"{_name(name)}{f'<small>{about}</small>' if about else ''}"


def _cell(name: str, model: ModelResult) -> str:
    change = model["against"].get(name)
    below = ""
    if change is not None:
        corrected = page.escape(p_value(change["p_holm"]))
        below = f"<small>{change_in_words(name, change)}, p&nbsp;{_equals(change['p'])} ({corrected})</small>"
    return with_interval(name, model["figures"].get(name)) + below


def _by_kind(result: SuiteResults) -> str:
    score = result["score"]
    sides = {
        page.escape(model["name"]): (colour, _bounded(model["by_kind"].get(score, {})))
        for model, colour in zip(result["models"], _colours(result), strict=True)
    }
    if not result["kinds"]:
        return ""
    figure = charts.interval_bars({n: side for n, side in sides.items() if side[1]}, score in SHARES)
    head = ["kind", *sides]
    by_model = [model["by_kind"].get(score, {}) for model in result["models"]]
    rows = [
        [page.escape(kind), *(with_interval(score, of_model.get(kind)) for of_model in by_model)]
        for kind in result["kinds"]
    ]
    body = page.chart(figure, "kinds-chart", f"{_name(score)} by kind of prompt", "bars: 95 % intervals")
    lead = "The score of each kind of prompt, with the interval that its own prompts give."
    return page.section("kinds", "By kind", lead, body + page.table(head, rows))


def _frontier(result: SuiteResults) -> str:
    """The score of each model against its distance to the base, where it is known."""
    score = result["score"]
    known = [(model, colour) for model, colour in zip(result["models"], _colours(result), strict=True)]
    points = {
        page.escape(model["name"]): (colour, kl, _one(model["figures"][score]))
        for model, colour in known
        if score in model["figures"] and (kl := _kl(model)) is not None
    }
    if len(points) < 2:
        return ""
    figure = charts.interval_points(points, "KL to the base", _name(score), score in SHARES)
    lead = (
        "A reward that is bought with a larger distance to the base is easier to get. The distance is the mean square"
        " difference of velocities at the latents that the model itself goes through."
    )
    return page.section("frontier", "Score against KL", lead, page.chart(figure, "frontier-chart"))


def _kl(model: ModelResult) -> charts.Bounded | None:
    """The distance to the base, which is 0 for the base itself."""
    if model["is_base"]:
        return charts.Bounded(0, 0, 0)
    return _one(model["figures"][KL]) if KL in model["figures"] else None


def _bounded(figures: dict[str, Figure]) -> dict[str, charts.Bounded]:
    return {page.escape(kind): _one(figure) for kind, figure in figures.items()}


def _one(figure: Figure) -> charts.Bounded:
    value, low, high = figure["value"], figure["low"], figure["high"]
    return charts.Bounded(value, value if low is None else low, value if high is None else high)


def _colours(result: SuiteResults) -> list[str]:
    """A colour per model. The base is grey, so that it is the same on every page."""
    others = iter(charts.COLOURS[:-1] * len(result["models"]))
    return [charts.GREY if model["is_base"] else next(others) for model in result["models"]]


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(out: Path, grid: Grid, models: Sequence[ModelRecords]) -> str:
    shown = _in_turn(grid.prompts)
    columns = min(6, max(2, 12 // (1 + len(models))))
    figures = "".join(_prompt(out, item, models) for item in shown)
    names = ", then ".join(page.escape(model.name) for model in models)
    lead = (
        f"The first picture of {len(shown)} prompts, from the same noise: {names}. The mark is the strict verdict, if"
        " there is one."
    )
    style = f"--columns:{columns};--models:{len(models)}"
    return page.section("pictures", "Pictures", lead, f'<div class="gallery suite" style="{style}">{figures}</div>')


def _in_turn(prompts: Sequence[SuitePrompt]) -> list[SuitePrompt]:
    """Some of the prompts, with their places, spread over the kinds."""
    chosen = spread_over_kinds([item.prompt for item in prompts], _SHOWN)
    return [prompts[item.place] for item in chosen]


def _prompt(out: Path, item: SuitePrompt, models: Sequence[ModelRecords]) -> str:
    shots = "".join(_shot(out, item, model) for model in models)
    kind = f"<small>{page.escape(item.kind)}</small>" if item.kind else ""
    caption = f'<figcaption dir="auto">{page.escape(item.prompt.text)}{kind}</figcaption>'
    return f'<figure class="pair"><div>{shots}</div>{caption}</figure>'


def _shot(out: Path, item: SuitePrompt, model: ModelRecords) -> str:
    key = (item.place, 0)
    record = model.records.get(key)
    picture = page.read_picture(out / model.folder, picture_name(key)) if record and record["there"] else None
    if record is None or picture is None:
        return f'<div class="shot">{MISSING}</div>'
    title = page.escape(model.name)
    return page.shot(picture, title, title, record.get("strict"))


# --- settings ---------------------------------------------------------------------------------------------------------


def _settings(result: SuiteResults) -> str:
    facts: dict[str, object] = {
        "paper": result["paper"],
        "prompts": result["prompts_digest"][:12],
        "steps": result["num_inference_steps"],
        "guidance scale": f"{result['guidance_scale']:g}",
        "negative prompt": result["negative_prompt"] or MISSING,
        "seed": result["seed"],
        "features": result["features"],
        "score": "mean of kinds" if result["mean_of_kinds"] else "mean of pictures",
        "this command took": duration(result["seconds"]),
    }
    command = f"<pre>{page.escape(result['command'])}</pre>"
    table = '<h3>As Markdown</h3><p class="lead">For a paper or a model card; it is also in table.md.</p>'
    body = page.pairs(facts) + f'<h3>Command</h3>{command}{table}<pre class="wide">{page.escape(tables(result))}</pre>'
    return page.section("settings", "Settings", page.escape(headline(result)), body)


def _name(name: str) -> str:
    return _TITLES[name][0] if name in _TITLES else page.escape(name)


def _base_mark(model: ModelResult) -> str:
    return "<small>base</small>" if model["is_base"] else ""
