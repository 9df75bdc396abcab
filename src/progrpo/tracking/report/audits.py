"""What audit groups show: the film of a group, how well previews agree with final rewards, and what selectors keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from progrpo.tracking.report import charts
from progrpo.tracking.report.charts import ACCENT, GREY, TEAL
from progrpo.tracking.report.film import films
from progrpo.tracking.report.page import chart, note, section
from progrpo.tracking.report.run import Run
from progrpo.tracking.statistics import spearman

_FILM = (
    "An audit group runs to the end unpruned and is decoded at every step; it is never trained on. A row is a member, "
    "the best final reward on top; under each preview stands its score."
)
_AGREEMENT = "A prune point trusts the previews’ order. Where that is the order of final rewards, pruning loses little."
_KEPT = (
    "Final rewards of the audit groups, as distances from the group’s mean in its std. Rewards crowd together; a "
    "uniform draw keeps the crowd, OVF keeps the two ends (compare figure 1 of arXiv 2512.15347)."
)


def write(run: Run) -> str:
    if not run.audits:
        off = run.config.get("audit", {}).get("every") == 0
        words = "Audits are off (audit.every is 0)." if off else "No audit group is written yet."
        return section("audits", "Inside a group", "", note(f"{words} They show previews, agreement and what is kept."))
    return (
        section("audits", "Inside a group", _FILM, films(run.path, run.audits))
        + section("agreement", "Preview agreement", _AGREEMENT, _agreement(run))
        + section("kept", "What is kept", _KEPT, _kept(run))
    )


def _agreement(run: Run) -> str:
    steps = run.audits[-1]["steps"]
    rows = [[spearman(scores, audit["final"]) for scores in audit["scores"]] for audit in run.audits]
    usable = np.array([row for row in rows if None not in row and len(row) == len(steps)], dtype=np.float64)
    if not len(usable):
        return note("No audit group has rewards that differ, so there is no rank correlation to show.")
    groups = "1 audit group" if len(usable) == 1 else f"{len(usable)} audit groups, mean and range"
    about = f"Spearman’s rank correlation with final rewards over {groups}" + (
        "; dotted: prune points" * bool(run.prune_steps)
    )
    figure = charts.agreement(steps, usable, run.path_of_plan, run.prune_steps)
    return chart(figure, "agreement-by-step", "Agreement by step", about)


def _kept(run: Run) -> str:
    audits = [audit for audit in run.audits if _standardised(audit) is not None]
    if not audits:
        return note("No audit group has rewards that differ, so there is nothing to compare.")
    subsets = [
        ("Full group", GREY, [list(range(len(a["final"]))) for a in audits]),
        ("Uniform draw", GREY, [a["kept_uniform"] for a in audits]),
        ("OVF, on final rewards", ACCENT, [a["kept_ovf"] for a in audits]),
        ("The plan, on previews", TEAL, [[g for g, s in enumerate(a["stopped_at"]) if s is None] for a in audits]),
    ]
    drawn = [(title, colour, _take(audits, members)) for title, colour, members in subsets]
    top = max(float(charts.histogram_shares(np.concatenate(groups)).max()) for _, _, groups in drawn)
    cards = "".join(_histogram(i, *card, top) for i, card in enumerate(drawn))
    return f'<div class="grid four">{cards}</div>'


def _take(audits: Sequence[Mapping[str, Any]], members: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The standardised rewards of the members named, a list a group, the missing left out."""
    taken = [_standardised(audit)[list(chosen)] for audit, chosen in zip(audits, members, strict=True)]  # type: ignore[index]
    return [values[~np.isnan(values)] for values in taken]


def _standardised(audit: Mapping[str, Any]) -> np.ndarray | None:
    """Final rewards less the group's mean over its std, NaN where missing; None if they do not differ."""
    final = np.array(audit["final"], dtype=np.float64)
    there = final[~np.isnan(final)]
    return (final - there.mean()) / there.std() if len(there) > 1 and np.ptp(there) > 0 else None


def _histogram(place: int, title: str, colour: str, groups: Sequence[np.ndarray], top: float) -> str:
    stds = [values.std() for values in groups if len(values)]
    about = f"{len(groups[-1])} a group, std {np.mean(stds):.2f}" if stds else "none has a reward"
    return chart(charts.histogram(np.concatenate(groups), colour, top), f"kept-{place}", title, about)
