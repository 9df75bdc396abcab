"""The expected gain of the plan over the run, and the decisions of a plan that follows audits."""

from __future__ import annotations

import re
from collections.abc import Sequence

from progrpo.pages.page import chart, escape, note, section
from progrpo.pages.report.pruning import Judged, plan_value
from progrpo.pages.run_data import RunData
from progrpo.tracking.decisions import PlanDecision
from progrpo.tracking.records import metric, number_of

_LEAD = (
    "The expected progress of a second, over that of plain GRPO (groups of 24, not pruned). The run estimates it after "
    "an audit, from how previews rank, how rewards are spread, what each stage costs, and how noisy gradients are. "
    "Below 1 a plan costs more than it gains."
)
_LAST = 20  # decisions that are named


def write(data: RunData) -> str:
    """The section; nothing where no plan was judged."""
    values = [(number_of(r), value) for r in data.metrics if (value := metric(r, "plan/value")) is not None]
    if not values:
        return ""
    decisions = {number_of(r): decision for r in data.metrics if (decision := PlanDecision.of(r)) is not None}
    judged = []
    for iteration, value in values:
        decision = decisions.get(iteration)
        judged.append(Judged(iteration, float(value), "" if decision is None else _arrows(decision.plan)))
        if decision is not None and decision.changes:
            judged.append(Judged(iteration, decision.next_value, _arrows(decision.next_plan)))
    named = _named(data, decisions)
    shown = named[-_LAST:]
    rules = {iteration: len(named) - len(shown) + i for i, (iteration, _) in enumerate(shown, start=1)}
    figure = chart(plan_value(judged, rules), "plan-value", "Expected gain over the run", _about(rules))
    return section("plan", "Does the plan pay?", _LEAD, figure + _list(shown, len(named)))


def _named(data: RunData, decisions: dict[int, PlanDecision]) -> list[tuple[int, PlanDecision]]:
    """The changes of a plan, and the first verdict on one that follows audits, with their iterations."""
    follows = data.setting("plan", "preset") == "auto" or bool(data.setting("plan", "adaptive"))
    first = min(decisions, default=None) if follows else None
    return [(i, decision) for i, decision in sorted(decisions.items()) if decision.changes or i == first]


def _about(rules: dict[int, int]) -> str:
    return "over plain GRPO’s, the line at 1" + ("; dotted: the decisions below" if rules else "")


def _list(shown: Sequence[tuple[int, PlanDecision]], count: int) -> str:
    if not shown:
        return ""
    items = "".join(f"<li>After iteration {i}: {escape(_arrows(decision.sentence))}.</li>" for i, decision in shown)
    older = note(f"The last {len(shown)} of {count} decisions; <code>metrics.jsonl</code> has all.")
    start = count - len(shown) + 1
    return (older if start > 1 else "") + f'<ol class="decisions" start="{start}">{items}</ol>'


def _arrows(text: str) -> str:
    return re.sub(r"(\d) x\b", r"\1 ×", text.replace("->", "→"))
