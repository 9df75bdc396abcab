"""What the run spent: network evaluations by the plan and by the count, and seconds by stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from progrpo.tracking.report import charts, page
from progrpo.tracking.report.page import chart, escape, note, section
from progrpo.tracking.report.run import Records, Run
from progrpo.tracking.wording import count, duration, percent

_LINES = {
    "predicted": ("Predicted", "by the plan"),
    "counted": ("Counted", "by the run as it went"),
    "audit": ("Audit", "to watch, not to train"),
}
_COLUMNS = {"nfe": "NFE", "decodes": "Decodes", "reward_calls": "Reward calls", "trained_steps": "Trained steps"}


_MOST_STEPS = 10_000  # a bar each


def write(run: Run) -> str:
    lead = "NFE: one sample through the denoiser once; with classifier-free guidance a step counts two."
    body = f'<div class="beside">{_plan(run)}<div>{_spent(run)}</div></div><h3>Time</h3>{_time(run)}'
    return section("cost", "Cost", lead, body)


def _plan(run: Run) -> str:
    plan = run.summary.get("plan")
    if plan is None:
        return note("The plan is not in summary.json yet.")
    path, prune_steps, steps = run.path_of_plan, run.prune_steps, int(plan["num_inference_steps"])
    if steps > _MOST_STEPS:
        raise ValueError(f"num_inference_steps must be at most {_MOST_STEPS}")
    paid, whole = sum(charts.alive_by_step(path, prune_steps, steps)), path[0] * steps
    sizes = " → ".join(map(str, path))
    words = f"{sizes} members, selector {escape(plan['selector'])}: {paid} of {whole} network calls a prompt"
    return chart(charts.funnel(path, prune_steps, steps), "funnel", "The plan", words)


def _spent(run: Run) -> str:
    cost = run.summary.get("cost")
    if not cost:
        return note("No cost is counted yet.")
    rows = [
        [f"{title}<small>{about}</small>", *(count(cost[name].get(key)) for key in _COLUMNS)]
        for name, (title, about) in _LINES.items()
        if cost.get(name)
    ]
    return page.table(("", *_COLUMNS.values()), rows) + _savings(run) + _disagreement(cost) + _uncounted(run)


def _savings(run: Run) -> str:
    saved, ratio = run.summary.get("nfe_saved"), run.summary.get("nfe_ratio_to_none")
    words = (
        "" if saved is None else f"Pruning saved <b>{percent(saved)}</b> of what the expanded groups take unpruned. "
    )
    words += "" if ratio is None else f"Sampling took <b>{ratio:.2f} ×</b> the NFE of plain GRPO at its group size."
    return f'<p class="after">{words}</p>' if words else ""


def _uncounted(run: Run) -> str:
    since = len(run.since_summary)
    return note(f"Counted after {len(run.metrics) - since} iterations; {since} more are done.") if since else ""


def _disagreement(cost: Mapping[str, Any]) -> str:
    """What sampling costs must be as predicted, else the report says so; trajectories without advantage are not trained."""
    predicted, counted = cost.get("predicted") or {}, cost.get("counted") or {}
    sampled = _COLUMNS.keys() & predicted.keys() & counted.keys() - {"trained_steps"}
    return note("Predicted and counted costs differ.") if any(predicted[k] != counted[k] for k in sampled) else ""


def _time(run: Run) -> str:
    stages = dict(run.summary.get("seconds_by_stage") or {})
    for stage, seconds in _summed(run.since_summary).items():
        stages[stage] = stages.get(stage, 0.0) + seconds
    stages.pop("overlapped", None)  # counted in two stages already
    total = sum(stages.values())
    if not total:
        return note("No time is recorded yet.")
    rows = [
        [escape(stage), _bar(seconds / total), percent(seconds / total, 0), duration(seconds)]
        for stage, seconds in sorted(stages.items(), key=lambda item: -item[1])
    ]
    return page.table(("Stage", "", "Share", "Time"), rows)


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>'


def _summed(records: Records) -> dict[str, float]:
    stages = dict.fromkeys(key for record in records for key in record if key.startswith("time/"))
    return {key.removeprefix("time/"): sum(r.get(key) or 0.0 for r in records) for key in stages}
