"""The evaluations before and after training: pairs of pictures, the accuracy by kind of prompt, and the rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from progrpo.pages import charts
from progrpo.pages.page import chart, escape, note, pairs, read_picture, section, shot
from progrpo.pages.run_data import RunData, accuracy
from progrpo.tracking.records import EvaluationRecord, RewardSummary
from progrpo.tracking.statistics import Mean
from progrpo.tracking.wording import count, number

_OUTCOMES = {  # (passes before, passes after) -> (name, description)
    (False, True): ("mended", "failed, then passed"),
    (True, False): ("broken", "passed, then failed"),
    (True, True): ("passing", "passed both times"),
    (False, False): ("failing", "failed both times"),
}
_VERDICTS: dict[bool | None, str] = {True: "pass", False: "fail"}
_LEAD = (
    "Each pair is one test prompt, sampled from the same noise before training (left) and after it (right). "
    "The mark is the strict verdict, if the reward gives one."
)


def write(data: RunData) -> str:
    if not data.before:
        return section("evaluation", "Before and after", "", note("No evaluation is written yet."))
    missing = (
        ""
        if data.after
        else note("There is no evaluation after training yet, so only pictures from before it are shown.")
    )
    return section("evaluation", "Before and after", _LEAD, missing + _gallery(data) + _kinds(data) + _rewards(data))


def _gallery(data: RunData) -> str:
    shown = [i for i, record in enumerate(data.before) if record.get("picture")]
    if not shown:
        return note("No pictures were saved.")
    pairs = "".join(_pair(data, i) for i in shown)
    return f'{_filters(data, shown)}<div class="gallery">{pairs}</div>{_totals(data)}'


def _outcome(data: RunData, i: int) -> str:
    if not data.paired:
        return "unpaired"
    before, after = data.before[i]["strict"], data.after[i]["strict"]
    return "unjudged" if before is None or after is None else _OUTCOMES[before, after][0]


def _filters(data: RunData, shown: Sequence[int]) -> str:
    """Buttons that filter the pairs by outcome, each with the number of its pairs."""
    if data.accuracy_change() is None:
        return ""
    outcomes = [_outcome(data, i) for i in shown]
    names = {"all": f"All <small>{len(shown)}</small>"}
    names |= {name: f"{words.capitalize()} <small>{outcomes.count(name)}</small>" for name, words in _OUTCOMES.values()}
    buttons = (
        f'<button data-show="{name}" aria-pressed="{"true" if name == "all" else "false"}">{words}</button>'
        for name, words in names.items()
    )
    return f'<div class="controls">{"".join(buttons)}</div>'


def _totals(data: RunData) -> str:
    if data.accuracy_change() is None:
        return ""
    outcomes = [outcome for i in range(len(data.before)) if (outcome := _outcome(data, i)) != "unjudged"]
    totals = ", ".join(f"<b>{outcomes.count(name)}</b> {words}" for name, words in _OUTCOMES.values())
    return f'<p class="after">Of all {len(outcomes)} evaluated pairs, {totals}.</p>'


def _pair(data: RunData, i: int) -> str:
    before, prompt = data.before[i], escape(data.before[i]["prompt"])
    shots = _shot(data, before, "before") + (_shot(data, data.after[i], "after") if data.paired else "")
    body = f"<div>{shots}</div><figcaption>{prompt}</figcaption>"
    return f'<figure class="pair" data-outcome="{_outcome(data, i)}">{body}</figure>'


def _shot(data: RunData, record: EvaluationRecord, when: str) -> str:
    name = record.get("picture")
    picture = read_picture(data.path, name) if name else None
    if picture is None:
        return "<div></div>"
    word = _VERDICTS.get(record["strict"], "no verdict")
    title = f"{when} training: {word}, graded {number(record.get('graded'))}"
    return shot(picture, title, f"{when} training", record["strict"])


def _kinds(data: RunData) -> str:
    before, after = _by_kind(data.before), _by_kind(data.after)
    if len(before) < 2:
        return ""
    about = "share of the test pictures that pass; bars: one standard error"
    return chart(charts.accuracy_bars(before, after), "kinds", "Strict accuracy by kind of prompt", about)


def _rewards(data: RunData) -> str:
    """The warnings of the run, held-out rewards, the terms of the trained reward, and missing scores."""
    before, after = data.summary.get("held_out_before") or {}, data.summary.get("held_out_after") or {}
    rows = {f"{n}, held out": f"{number(before.get(n))} → {number(after.get(n))}" for n in {**before, **after}}
    rewards = cast(RewardSummary, data.summary.get("rewards") or {})
    weights = rewards.get("weights") or {}
    asked, missing = rewards.get("asked") or {}, rewards.get("missing") or {}
    if len(weights) > 1:
        rows["trained on"] = " + ".join(f"{weight:g} × {name}" for name, weight in weights.items())
        rows["groups are pruned on"] = f"the {rewards['selected_on']}"
    rows |= {f"{name}, scores missing": f"{count(n)} of {count(asked[name])}" for name, n in missing.items() if n}
    if any(missing.values()):
        rows["last error of a reward"] = rewards.get("last_error") or "none was given"
    warnings = data.summary.get("warnings")
    notes = [note(f"Warning: {escape(w)}.") for w in warnings] if isinstance(warnings, list) else []
    return "".join(notes) + (f"<h3>Rewards</h3>{pairs(rows)}" if rows else "")


def _by_kind(records: Sequence[EvaluationRecord]) -> dict[str, Mean]:
    kinds = dict.fromkeys(record["kind"] for record in records if record["kind"])
    means = {kind: accuracy(r for r in records if r["kind"] == kind) for kind in kinds}
    return {escape(kind): mean for kind, mean in means.items() if mean is not None}
