"""Before and after: the same prompts on the same noise, and the accuracy by kind of prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from progrpo.tracking.report import charts
from progrpo.tracking.report.page import chart, escape, note, pairs, picture_uri, read_picture, section
from progrpo.tracking.report.run import Records, Run, accuracy
from progrpo.tracking.statistics import Mean
from progrpo.tracking.wording import count, number

_OUTCOMES = {  # (passes before, passes after) -> (name, words)
    (False, True): ("mended", "failed, then passed"),
    (True, False): ("broken", "passed, then failed"),
    (True, True): ("passing", "passed both times"),
    (False, False): ("failing", "failed both times"),
}
_MARKS = {True: ("pass", "✓"), False: ("fail", "✕")}
_LEAD = (
    "Each pair is one test prompt from the same starting noise: before training on the left, after it on the right. "
    "The mark is the strict verdict, where the reward gives one."
)


def write(run: Run) -> str:
    if not run.before:
        return section("evaluation", "Before and after", "", note("No evaluation is written yet."))
    missing = "" if run.after else note("There is no evaluation after training yet; what was measured before is shown.")
    return section("evaluation", "Before and after", _LEAD, missing + _gallery(run) + _kinds(run) + _rewards(run))


def _gallery(run: Run) -> str:
    shown = [i for i, record in enumerate(run.before) if record.get("picture")]
    if not shown:
        return note("No pictures were saved.")
    pairs = "".join(_pair(run, i) for i in shown)
    return f'{_filters(run, shown)}<div class="gallery">{pairs}</div>{_totals(run)}'


def _outcome(run: Run, i: int) -> str:
    if not run.paired:
        return "unpaired"
    verdicts = run.before[i]["strict"], run.after[i]["strict"]
    return _OUTCOMES[verdicts][0] if None not in verdicts else "unjudged"


def _filters(run: Run, shown: Sequence[int]) -> str:
    """Buttons that choose among the shown pairs, each with their number."""
    if run.accuracy_change() is None:
        return ""
    outcomes = [_outcome(run, i) for i in shown]
    names = {"all": f"All <small>{len(shown)}</small>"}
    names |= {name: f"{words.capitalize()} <small>{outcomes.count(name)}</small>" for name, words in _OUTCOMES.values()}
    buttons = (
        f'<button data-show="{name}" aria-pressed="{"true" if name == "all" else "false"}">{words}</button>'
        for name, words in names.items()
    )
    return f'<div class="controls">{"".join(buttons)}</div>'


def _totals(run: Run) -> str:
    if run.accuracy_change() is None:
        return ""
    outcomes = [outcome for i in range(len(run.before)) if (outcome := _outcome(run, i)) != "unjudged"]
    totals = ", ".join(f"<b>{outcomes.count(name)}</b> {words}" for name, words in _OUTCOMES.values())
    return f'<p class="after">Of all {len(outcomes)} evaluated pairs, {totals}.</p>'


def _pair(run: Run, i: int) -> str:
    before, prompt = run.before[i], escape(run.before[i]["prompt"])
    shots = _shot(run, before, "before") + (_shot(run, run.after[i], "after") if run.paired else "")
    body = f"<div>{shots}</div><figcaption>{prompt}</figcaption>"
    return f'<figure class="pair" data-outcome="{_outcome(run, i)}">{body}</figure>'


def _shot(run: Run, record: Mapping[str, Any], when: str) -> str:
    name = record.get("picture")
    picture = read_picture(run.path, name) if name else None
    if picture is None:
        return "<div></div>"
    word, mark = _MARKS.get(record["strict"], ("no verdict", ""))
    title = f"{when} training: {word}, graded {number(record.get('graded'))}"
    image = f'<img src="{picture_uri(picture)}" alt="{when} training">'
    verdict = f'<span class="mark {word}">{mark}</span>' if mark else ""
    return f'<div class="shot" title="{title}">{image}{verdict}</div>'


def _kinds(run: Run) -> str:
    before, after = _by_kind(run.before), _by_kind(run.after)
    if len(before) < 2:
        return ""
    about = "share of the test pictures that pass; whiskers: one standard error"
    return chart(charts.accuracy_bars(before, after), "kinds", "Strict accuracy by kind of prompt", about)


def _rewards(run: Run) -> str:
    """Rewards that were not trained on, before and after; what the trained one is made of; and scores that are missing."""
    then, now = (run.summary.get(f"held_out_{when}") or {} for when in ("before", "after"))
    rows = {f"{name}, held out": f"{number(then.get(name))} → {number(now.get(name))}" for name in {**then, **now}}
    about = run.summary.get("rewards") or {}
    weights, asked, missing = (about.get(name) or {} for name in ("weights", "asked", "missing"))
    if len(weights) > 1:
        rows["trained on"] = " + ".join(f"{weight:g} × {name}" for name, weight in weights.items())
        rows["groups are pruned on"] = f"the {about['selected_on']}"
    rows |= {f"{name}, scores missing": f"{count(n)} of {count(asked[name])}" for name, n in missing.items() if n}
    if any(missing.values()):
        rows["last error of a reward"] = about.get("last_error") or "none was given"
    said = "".join(note(f"Warning: {escape(w)}.") for w in _warnings(run))
    return said + (f"<h3>Rewards</h3>{pairs(rows)}" if rows else "")


def _warnings(run: Run) -> list[object]:
    found = run.summary.get("warnings")
    return found if isinstance(found, list) else []


def _by_kind(records: Records) -> dict[str, Mean]:
    kinds = dict.fromkeys(record["kind"] for record in records if record["kind"])
    found = {kind: accuracy([r for r in records if r["kind"] == kind]) for kind in kinds}
    return {escape(kind): mean for kind, mean in found.items() if mean is not None}
