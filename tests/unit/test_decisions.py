"""A decision on a plan in an iteration's record, and in words."""

from __future__ import annotations

from dataclasses import replace

from progrpo.tracking.decisions import PlanDecision

PRUNES = PlanDecision(1.0, [24], [], 1.46, [24, 12, 6], [8], 2.0, 12.34, 0.5, 1.7)


def test_a_decision_comes_back_from_its_metrics():
    for decision in (PRUNES, replace(PRUNES, noise_scale=None, own_direction=None, path=[24, 16], steps=[3])):
        assert PlanDecision.of({"iteration": 3, **decision.metrics()}) == decision
    assert PlanDecision.of({"plan/value": 1.2, "plan/path": [24, 6]}) is None  # of an older run
    assert PlanDecision.of({**PRUNES.metrics(), "plan/next_value": None}) is None  # it was not finite


def test_a_decision_names_the_plan_its_gain_and_the_reasons():
    assert PRUNES.sentence == (
        "groups of 24 -> 12 -> 6 (12 after step 8, 6 by final rewards) from here on: 1.46 x the expected progress a"
        " second of plain groups of 24 (1.00 x until here), since its survivors have 1.70 x the reward variance of"
        " their groups (V), training a member takes 2 x its sampling, the gradient noise scale is 12.3 prompts, and"
        " prompts' own directions add 0.5 x the noise of their members"
    )
    assert "until here), since training a member takes" in replace(PRUNES, next_variance=None).sentence  # an older run


def test_a_plan_that_stays_is_named_too():
    stays = replace(PRUNES, next_value=1.0, next_path=[24], next_steps=[], noise_scale=None, own_direction=None)
    assert PRUNES.changes and not stays.changes
    assert replace(stays, path=[24, 6], next_path=[24, 6], steps=[1], next_steps=[2]).changes  # a step alone
    assert stays.sentence == (
        "groups of 24 (not pruned) as before: 1.00 x the expected progress a second of plain groups of 24, and no"
        " other plan is worth a change, since training a member takes 2 x its sampling, and the gradient noise scale is"
        " not known yet"
    )
