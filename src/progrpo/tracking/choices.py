"""V of choices by step, the variance that they keep, from the records of audits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from progrpo.tracking.records import AuditRecord

LAST = 8
"""The audits that a plan is judged by: previews tell less as a model learns."""


@dataclass(frozen=True)
class Choice:
    """The choice of `keep` of a group's members, by previews of a step: V, and the largest V of as many."""

    keep: int
    members: int
    variance: float
    variance_final: float


def measures_variance(audit: AuditRecord) -> bool:
    """Whether an audit has V at each step, which those of an older progrpo lack, and those whose rewards are equal."""
    rows = (audit.get("keep", []), audit.get("variance", []), audit.get("variance_final", []))
    return bool(audit["steps"]) and all(len(row) == len(audit["steps"]) and None not in row for row in rows)


def alike(audits: Sequence[AuditRecord]) -> list[AuditRecord]:
    """The last audits with V, without those that keep another number at a step or of another group than the last."""
    measured = [audit for audit in audits if measures_variance(audit)][-LAST:]
    sizes = [(len(audit["final"]), audit["steps"], audit["keep"]) for audit in measured]
    return [audit for audit, size in zip(measured, sizes, strict=True) if size == sizes[-1]]


def choices(audits: Sequence[AuditRecord]) -> dict[int, Choice]:
    """The choice at each step, with the mean V of the audits that are `alike`; empty without any."""
    latest = alike(audits)
    if not latest:
        return {}
    last = latest[-1]
    means = [
        np.array([audit[name] for audit in latest], dtype=np.float64).mean(axis=0)
        for name in ("variance", "variance_final")
    ]
    return {
        step: Choice(int(keep), len(last["final"]), float(variance), float(most))
        for step, keep, variance, most in zip(last["steps"], last["keep"], *means, strict=True)
    }


def share_of_steps(steps: Sequence[int], share: float) -> int:
    """The step after which about this share of the network calls is made."""
    return steps[min(len(steps) - 1, max(0, round(share * len(steps)) - 1))]
