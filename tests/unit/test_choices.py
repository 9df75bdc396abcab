"""V by step from audits' records: of which audits, and where."""

from __future__ import annotations

import pytest

from progrpo.tracking.choices import alike, choices, measures_variance, share_of_steps
from progrpo.tracking.records import AuditRecord


def audit(variance: float | None, keep: int = 2, members: int = 4) -> AuditRecord:
    return {
        "steps": [0, 1],
        "final": [0.0] * members,
        "keep": [keep, keep + 1],
        "variance": [variance, 1.5],
        "variance_final": [1.8, 1.6],
    }


def test_v_is_the_mean_over_the_last_eight_audits_that_keep_as_many():
    older, other = [audit(9.0)] * 3, [audit(5.0, keep=1), audit(5.0, members=6)]
    audits = [*older, *[audit(i / 10) for i in range(6)], *other]
    assert alike(audits) == other[1:]
    audits.append(audit(0.8))
    kept = choices(audits)
    assert kept[0].variance == pytest.approx((0.1 + 0.2 + 0.3 + 0.4 + 0.5 + 0.8) / 6)
    assert kept[1].variance == 1.5 and kept[0].variance_final == pytest.approx(1.8)
    assert [(choice.keep, choice.members) for choice in kept.values()] == [(2, 4), (3, 4)]


def test_audits_without_v_are_left_out():
    without: AuditRecord = {"steps": [0, 1], "final": [0.0] * 4}
    assert choices([]) == choices([audit(None), without]) == {}
    assert not measures_variance({**audit(1.0), "steps": []})
    assert choices([audit(1.2), audit(None), without])[0].variance == 1.2


@pytest.mark.parametrize(("steps", "expected"), [(1, [0, 0, 0]), (6, [1, 2, 3]), (10, [1, 4, 7])])
def test_shares_are_of_the_network_calls(steps, expected):
    assert [share_of_steps(range(steps), share) for share in (0.25, 0.5, 0.75)] == expected
