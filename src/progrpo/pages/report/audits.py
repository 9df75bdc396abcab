"""Audit groups: their films, the agreement of previews with final rewards, and the members that selectors keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from progrpo.pages import charts
from progrpo.pages.charts import ACCENT, AMBER, GREY, TEAL, VIOLET, Curve
from progrpo.pages.page import chart, escape, note, section
from progrpo.pages.report import pruning
from progrpo.pages.report.film import films
from progrpo.pages.run_data import RunData
from progrpo.tracking.choices import alike, measures_variance, share_of_steps
from progrpo.tracking.records import AuditRecord, Metrics, iteration_of
from progrpo.tracking.statistics import spearman, standardised

_FILM = (
    "An audit group is sampled to the end without pruning and decoded at every step. Where the plan trains "
    "on every member, it is one of the iteration’s groups; else it is one more, never trained on. "
    "Each row is a member, the best final reward first; below each preview is its score, of one ODE step and the full "
    "decoder whatever the run decides by."
)
_AGREEMENT = (
    "Pruning relies on the order of previews. The closer it is to the order of final rewards, the less pruning loses."
)
_VARIANCE = (
    "What a choice gains is V, the variance of the final rewards that it keeps in units of the whole group’s: the blue "
    "line leads from a random choice (1, or just below) up to the best choice by final rewards (grey), so the gap to "
    "grey is what previews lose, and where grey itself is near 1 there is nothing to select."
)
_SHARES = (0.25, 0.5, 0.75)  # of the network calls, after which V is drawn where nothing is pruned on previews
_KEPT = (
    "Final rewards in the audit groups, less the group’s mean, in units of its standard deviation. Most rewards lie "
    "close together: a uniform draw keeps that distribution, OVF keeps its two ends (figure 1 of arXiv 2512.15347)."
)


def write(data: RunData) -> str:
    if data.pairs:
        text = (
            f"The run learns from the pictures of {escape(data.pairs)}: no group is sampled, so that none is audited."
        )
        return section("audits", "Inside a group", "", note(text))
    if not data.audits:
        off = data.setting("audit", "every") == 0
        reason = "Audits are off (audit.every is 0)." if off else "No audit group is written yet."
        text = f"{reason} Audits show previews, their agreement with final rewards, and the members that are kept."
        return section("audits", "Inside a group", "", note(text))
    return (
        section("audits", "Inside a group", _FILM, films(data.path, data.audits))
        + section("agreement", "Preview agreement", f"{_AGREEMENT} {_VARIANCE}", _choices(data))
        + section("kept", "What is kept", _KEPT, _kept(data))
    )


def _agreement(data: RunData) -> str:
    steps = data.audits[-1]["steps"]
    rows = [
        [spearman(scores, audit["final"]) for scores in audit.get("used", audit["scores"])] for audit in data.audits
    ]
    known = [row for row in rows if len(row) == len(steps) and any(value is not None for value in row)]
    if not known:
        return note("No audit group has previews and rewards that differ, so there is no rank correlation to show.")
    groups = "1 audit group" if len(known) == 1 else f"{len(known)} audit groups, mean and range"
    correlations_AT = np.array(known, dtype=np.float64)  # NaN where the previews of a step are all alike
    measured = np.flatnonzero(np.isfinite(correlations_AT).any(0)).tolist()
    correlations_AT = correlations_AT[:, measured]
    some = "" if np.isfinite(correlations_AT).all() else ", at each step of those whose previews differ"
    points = "; dotted: prune points" if data.prune_steps else ""
    about = f"Spearman’s rank correlation with final rewards over {groups}{some}{points}"
    shown = [steps[i] for i in measured]
    figure = pruning.agreement(shown, correlations_AT, data.path_of_plan, data.prune_steps)
    return chart(figure, "agreement-by-step", "Agreement by step", about)


def _choices(data: RunData) -> str:
    """The agreement by step, and V by step and over the run. Audits of an older progrpo did not measure V."""
    return f'<div class="grid">{_agreement(data)}{_variance_by_step(data)}{_over_the_run(data)}</div>'


def _variance_by_step(data: RunData) -> str:
    latest = alike(data.audits)
    if not latest:
        return ""
    steps, members = latest[-1]["steps"], len(latest[-1]["final"])
    variance_AT, variance_final_AT = (
        np.array([audit[name] for audit in latest], dtype=np.float64) for name in ("variance", "variance_final")
    )
    figure = pruning.variance(steps, variance_AT, variance_final_AT, data.path_of_plan, data.prune_steps)
    groups = "the last audit group" if len(latest) == 1 else f"the last {len(latest)} audit groups, mean and range"
    keeps = " or ".join(str(keep) for keep in sorted({int(keep) for keep in latest[-1]["keep"]}))
    about = f"V of a choice of {keeps} of {members} over {groups}"
    return chart(figure, "variance-by-step", "Variance of the choice by step", about)


def _over_the_run(data: RunData) -> str:
    """V of the choices at the plan's points, beside the best and the agreement, over iterations.

    Where nothing is pruned on previews, it is V of choices of half at a few steps.
    """
    keys = {key for record in data.metrics for key in record if key.startswith("preview/rank_correlation@")}
    points = sorted(int(key.partition("@")[2]) for key in keys)
    measured = {audit["iteration"]: audit for audit in data.audits if measures_variance(audit)}
    steps = points or sorted({share_of_steps(a["steps"], share) for a in measured.values() for share in _SHARES})
    records = [{**_choice_metrics(measured.get(iteration_of(r)), steps), **r} for r in data.metrics]
    colours = (ACCENT, TEAL, AMBER, VIOLET)
    lines = []
    for i, step in enumerate(steps):
        colour = colours[i % len(colours)]
        lines.append(Curve(f"preview/variance@{step}", f"V at step {step}", colour))
        if points or step == steps[-1]:  # choices of half have one bound
            name = f"V at most at step {step}" if points else "V at most"
            lines.append(Curve(f"preview/variance_final@{step}", name, GREY))
        if points:
            lines.append(Curve(f"preview/rank_correlation@{step}", f"agreement at step {step}", colour, points=True))
    figure = charts.curves(records, lines, {"rangemode": "tozero"}, 240)
    if figure is None:
        return ""
    return chart(figure, "variance-over-run", "Choices over the run", _about_run(data, points))


def _about_run(data: RunData, points: Sequence[int]) -> str:
    if points:
        return "V at the prune points, the best by final rewards, and the rank correlation (dotted), in audit groups"
    whose = "as many as the plan keeps" if len(data.path_of_plan) > 1 else "half of a group, which the plan keeps whole"
    return f"V that a choice by previews would have, of {whose}, and the best by final rewards, in audit groups"


def _choice_metrics(audit: AuditRecord | None, steps: Sequence[int]) -> Metrics:
    """V of an audit's choices at these steps, by the names that iterations have for those of the plan's points."""
    if audit is None:
        return {}
    at = {step: i for i, step in enumerate(audit["steps"]) if step in steps}
    return {
        f"preview/{name}@{step}": row[i]
        for name, row in (("variance", audit["variance"]), ("variance_final", audit["variance_final"]))
        for step, i in at.items()
    }


def _kept(data: RunData) -> str:
    groups = [(audit, rewards) for audit in data.audits if (rewards := standardised(audit["final"])) is not None]
    if not groups:
        return note("No audit group has rewards that differ, so there is nothing to compare.")
    subsets = [
        _Subset("Full group", GREY, [_present(rewards, range(len(rewards))) for _, rewards in groups]),
        _Subset("Uniform draw", GREY, [_present(rewards, audit["kept_uniform"]) for audit, rewards in groups]),
        _Subset("OVF, on final rewards", ACCENT, [_present(rewards, audit["kept_ovf"]) for audit, rewards in groups]),
        _Subset("Kept by the plan", TEAL, [_present(rewards, _survivors(audit)) for audit, rewards in groups]),
    ]
    top = max(float(pruning.histogram_shares(np.concatenate(subset.groups)).max()) for subset in subsets)
    cards = "".join(_histogram(subset, f"kept-{i}", top) for i, subset in enumerate(subsets))
    return f'<div class="grid four">{cards}</div>'


@dataclass(frozen=True)
class _Subset:
    """The standardised rewards of some members of each group."""

    title: str
    colour: str
    groups: Sequence[np.ndarray]


def _survivors(audit: AuditRecord) -> list[int]:
    return [member for member, step in enumerate(audit["stopped_at"]) if step is None]


def _present(rewards_G: np.ndarray, members: Sequence[int]) -> np.ndarray:
    """The rewards of these members, without missing ones."""
    rewards = rewards_G[list(members)]
    return rewards[~np.isnan(rewards)]


def _histogram(subset: _Subset, anchor: str, top: float) -> str:
    stds = [values.std() for values in subset.groups if len(values)]
    about = f"{len(subset.groups[-1])} per group, std {np.mean(stds):.2f}" if stds else "no member has a reward"
    return chart(pruning.histogram(np.concatenate(subset.groups), subset.colour, top), anchor, subset.title, about)
