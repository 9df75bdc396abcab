"""The cost of the run: predicted and counted network evaluations, and seconds by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from progrpo.pages import page
from progrpo.pages.page import chart, escape, note, section
from progrpo.pages.report.pruning import alive_by_step, funnel
from progrpo.pages.run_data import RunData, total
from progrpo.tracking.records import CostSummary, Metrics
from progrpo.tracking.wording import count, duration, percent

_LINES = {
    "predicted": ("Predicted", "by the plan"),
    "counted": ("Counted", "during the run"),
    "audit": ("Audits", "beside the plan"),
}
_COLUMNS = {"nfe": "NFE", "decodes": "Decodes", "reward_calls": "Reward calls", "trained_steps": "Trained steps"}
_UNTRAINED = (
    "Fewer steps were trained than predicted: survivors without an advantage are left out, such as those of a group"
    " with equal rewards."
)
_MOST_STEPS = 10_000  # the chart has a bar per step


def write(data: RunData) -> str:
    lead = "One NFE is one sample through the denoiser. With classifier-free guidance a step counts two."
    body = f'<div class="beside">{_plan(data)}<div>{_spent(data)}</div></div><h3>Time</h3>{_time(data)}'
    return section("cost", "Cost", lead, body)


def _plan(data: RunData) -> str:
    if data.pairs:
        return note(f"Pictures are those of {escape(data.pairs)}: nothing is sampled in training.")
    plan = data.summary.get("plan")
    if plan is None:
        return note("The plan is not in summary.json yet.")
    path, prune_steps, steps = data.path_of_plan, data.prune_steps, int(plan["num_inference_steps"])
    if steps > _MOST_STEPS:
        raise ValueError(f"num_inference_steps must be at most {_MOST_STEPS}")
    made, whole = sum(alive_by_step(path, prune_steps, steps)), path[0] * steps
    sizes = " → ".join(map(str, path))
    about = f"{sizes} members, selector {escape(plan['selector'])}: {made} of {whole} network calls per prompt"
    if len(data.groups_of_plan) == 2:
        begun, go_on = data.groups_of_plan
        about += f" that goes on; {go_on} of {begun} prompts do after step {prune_steps[0]}"
    return chart(funnel(path, prune_steps, steps), "funnel", "The plan", about)


def _spent(data: RunData) -> str:
    cost = data.summary.get("cost")
    if not cost:
        return note("No cost is counted yet.")
    by_line = cast(Mapping[str, Mapping[str, int]], cost)
    rows = [
        [f"{title}<small>{about}</small>", *(count(by_line[name].get(key)) for key in _COLUMNS)]
        for name, (title, about) in _LINES.items()
        if by_line.get(name)
    ]
    return page.table(("", *_COLUMNS.values()), rows) + _savings(data) + _disagreement(cost) + _uncounted(data)


def _savings(data: RunData) -> str:
    saved, ratio = data.summary.get("nfe_saved"), data.summary.get("nfe_ratio_to_none")
    sentences = []
    if saved is not None:
        sentences.append(f"Pruning saved <b>{percent(saved)}</b> of the NFE that the groups would take unpruned.")
    if ratio:
        sentences.append(f"Sampling took <b>{ratio:.2f} ×</b> the NFE of plain GRPO (plan <code>none</code>).")
    return f'<p class="after">{" ".join(sentences)}</p>' if sentences else ""


def _uncounted(data: RunData) -> str:
    since = len(data.since_summary)
    return note(f"Counted after {len(data.metrics) - since} iterations; {since} more are done.") if since else ""


def _disagreement(cost: CostSummary) -> str:
    """A note if sampling cost other than predicted, and one that explains fewer trained steps than predicted."""
    predicted, counted = cost.get("predicted") or {}, cost.get("counted") or {}
    differing = {key for key in predicted.keys() & counted.keys() if predicted[key] != counted[key]} & _COLUMNS.keys()
    differ = note("Predicted and counted costs differ.") if differing - {"trained_steps"} else ""
    fewer = counted.get("trained_steps", 0) < predicted.get("trained_steps", 0)
    return differ + (note(_UNTRAINED) if fewer else "")


def _time(data: RunData) -> str:
    stages = dict(data.summary.get("seconds_by_stage") or {})
    for stage, seconds in _seconds_by_stage(data.since_summary).items():
        stages[stage] = stages.get(stage, 0.0) + seconds
    stages.pop("overlapped", None)  # it is counted in two stages already
    whole = sum(stages.values())
    if not whole:
        return note("No time is recorded yet.")
    rows = [
        [escape(stage), _bar(seconds / whole), percent(seconds / whole, 0), duration(seconds)]
        for stage, seconds in sorted(stages.items(), key=lambda item: -item[1])
    ]
    return page.table(("Stage", "", "Share", "Time"), rows)


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>'


def _seconds_by_stage(records: Sequence[Metrics]) -> dict[str, float]:
    names = dict.fromkeys(name for record in records for name in record if name.startswith("time/"))
    return {name.removeprefix("time/"): total(records, name) for name in names}
