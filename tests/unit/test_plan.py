import json
from dataclasses import replace

import pytest

from progrpo.rollout.plan import PRESETS, Plan, PlanCosts, PrunePoint, preset, summary, unit_costs
from progrpo.types import Cost

STANDARD = Plan(48, (PrunePoint(5, 24), PrunePoint(7, 12)))


def run(plan: Plan, num_inference_steps: int, trained_steps: int) -> tuple[Cost, list[int]]:
    """Count by hand, call by call, what a run without guidance spends; also who lives at each call."""
    path: list[int] = []
    living, nfe, decodes = plan.group_size, 0, 0
    keeps = {point.step: point.keep for point in plan.prune}
    for step in range(num_inference_steps):
        nfe, path = nfe + living, [*path, living]
        if keeps.get(step, living) < living:
            decodes, living = decodes + living, keeps[step]
    trained = (plan.final_keep or living) * trained_steps
    return Cost(nfe, decodes + living, decodes + living, trained, previews=decodes), path


def summarised(plan: Plan, guidance: bool, ode_steps: int = 1, prompts: int = 1) -> PlanCosts:
    """The summary of a plan for 10 steps of which 9 are trained."""
    per_prompt, per_iteration = (plan.predict(10, 9, guidance, ode_steps, prompts=count) for count in (1, prompts))
    return summary(plan, 10, guidance, per_prompt, per_iteration, prompts)


@pytest.mark.parametrize(
    ("name", "steps", "nfe", "decodes", "survivors"),
    [
        ("late", 10, 12 * 9 + 6, 18, 6),
        ("standard", 10, 48 * 6 + 24 * 2 + 12 * 2, 84, 12),
        ("flash", 10, 200, 52, 12),
        ("posthoc", 10, 240, 24, 12),
        ("none", 10, 240, 24, 24),
        ("sd14", 50, 1880, 48 + 32 + 8, 8),
    ],
)
def test_cost_of_the_presets(name, steps, nfe, decodes, survivors):
    plan = preset(name, steps)
    assert plan == PRESETS[name][0]
    seen = decodes - plan.finalists
    assert plan.predict(steps, 9, guidance=False) == Cost(nfe, decodes, decodes, survivors * 9, seen)
    assert plan.predict(steps, 9, guidance=True) == Cost(2 * nfe, decodes, decodes, survivors * 9, seen)


def test_further_ode_steps_cost_calls_and_a_probe_costs_none():
    plain = STANDARD.predict(10, 9, guidance=False)
    twice = STANDARD.predict(10, 9, guidance=True, ode_steps=3)
    assert twice.nfe == 2 * (plain.nfe + 2 * (48 + 24)) and twice.decodes == plain.decodes
    probed = STANDARD.predict(10, 9, guidance=False, ode_steps=3, probed=frozenset({5, 9}))
    assert probed == Cost(360 + 2 * 24, 24 + 12, 24 + 12, 12 * 9, previews=24, probed=48)


def test_units_turn_a_cost_into_the_seconds_that_it_was_measured_by():
    counted = STANDARD.predict(10, 9, guidance=False) * 4
    seconds = {"sample": 3.0, "preview": 0.7, "reward": 0.2, "update": 2.0, "other": 9.0}
    units = unit_costs(counted, seconds)
    assert units.seconds(counted) == pytest.approx(5.9)
    none = preset("none", 10).predict(10, 9, guidance=False)
    unseen = unit_costs(none, {**seconds, "preview": 0.0})
    assert unseen.preview == unseen.finish == pytest.approx(0.2 / 24)
    assert unit_costs(none, {**seconds, "preview": 0.0}, 0.001).preview == 0.001
    assert unit_costs(counted, seconds, 0.001) == units  # the run's own
    waves = unit_costs(counted, {**seconds, "overlapped": 0.3})  # a third of what was waited for
    assert waves.seconds(counted) == pytest.approx(5.6) and waves.preview == pytest.approx(units.preview * 2 / 3)
    assert unit_costs(counted, {**seconds, "overlapped": 2.0}).preview == 0


def test_sd14_against_its_baseline():
    assert Plan(16).predict(50, 49, guidance=False).nfe == 800


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("steps", [4, 5, 8, 10, 20, 25, 28, 40, 50, 1000])
def test_prediction_is_what_a_run_counts(name, steps):
    plan = preset(name, steps)
    cost, path = run(plan, steps, 3)
    assert plan.predict(steps, 3, guidance=False) == cost
    assert [plan.living_at(step) for step in range(steps)] == path


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        ("late", 2, [0]),  # one call is left to save, however few there are
        ("late", 4, [2]),
        ("late", 6, [4]),
        ("late", 28, [24]),
        ("standard", 20, [11, 15]),
        ("standard", 50, [29, 39]),
        ("standard", 8, [4, 5]),
        ("standard", 4, [1, 2]),
        ("flash", 40, [23, 31]),
        ("sd14", 10, [5, 7]),
        ("posthoc", 3, []),
        ("none", 1, []),
    ],
)
def test_presets_move_to_the_same_share_of_the_calls(name, steps, expected):
    assert [point.step for point in preset(name, steps).prune] == expected


@pytest.mark.parametrize(
    ("name", "steps"), [("late", 1), ("standard", 1), ("standard", 2), ("standard", 3), ("sd14", 3), ("flash", 0)]
)
def test_presets_need_enough_steps(name, steps):
    with pytest.raises(ValueError, match=f"num_inference_steps={steps} is too few for the plan preset '{name}'"):
        preset(name, steps)


def test_unknown_preset():
    with pytest.raises(ValueError, match="'fast' is unknown; choose one of late, standard, flash"):
        preset("fast", 10)


def test_reading_a_plan():
    assert [STANDARD.living_at(step) for step in range(10)] == [48] * 6 + [24] * 2 + [12] * 2
    assert [STANDARD.keep_after(step) for step in range(10)] == [None] * 5 + [24, None, 12, None, None]
    assert (STANDARD.finalists, STANDARD.survivors) == (12, 12)
    assert (Plan(24, final_keep=6).finalists, Plan(24, final_keep=6).survivors) == (24, 6)


def test_a_point_that_keeps_everyone_is_plain_grpo():
    plan = Plan(24, (PrunePoint(2, 24),), final_keep=24)
    plan.validate(10)
    assert plan.active_points() == ()
    assert plan.keep_after(2) is None
    assert plan.predict(10, 9, guidance=False) == Plan(24).predict(10, 9, guidance=False)
    late = Plan(24, (PrunePoint(2, 12), PrunePoint(4, 12), PrunePoint(6, 4)))
    assert late.active_points() == (PrunePoint(2, 12), PrunePoint(6, 4))
    assert late.predict(10, 9, guidance=False) == run(late, 10, 9)[0]


@pytest.mark.parametrize(
    ("plan", "steps", "message"),
    [
        (Plan(1), 10, "group_size must be at least 2"),
        (Plan(24), 0, "num_inference_steps must be at least 1"),
        (Plan(24, (PrunePoint(-1, 12),)), 10, "step must be at least 0"),
        (Plan(24, (PrunePoint(5, 12), PrunePoint(5, 6))), 10, "prune steps must increase"),
        (Plan(24, (PrunePoint(5, 12), PrunePoint(3, 6))), 10, "prune steps must increase"),
        (Plan(24, (PrunePoint(9, 12),)), 10, "use a step of at most 8, or final_keep"),
        (Plan(24, (PrunePoint(5, 1),)), 10, "prune keep at step 5 must be at least 2"),
        (Plan(24, (PrunePoint(5, 25),)), 10, "at most the 24 members"),
        (Plan(24, (PrunePoint(5, 12), PrunePoint(6, 16))), 10, "at most the 12 members"),
        (Plan(24, final_keep=1), 10, "final_keep must be at least 2"),
        (Plan(24, (PrunePoint(5, 12),), final_keep=13), 10, "final_keep must be at most the 12 members"),
        (Plan(24, (PrunePoint(5, 12),), keep_groups=0), 10, "keep_groups must be at least 1, not 0"),
        (Plan(24, final_keep=12, keep_groups=2), 10, "keep_groups must go with a prune point"),
    ],
)
def test_mistakes_are_named(plan, steps, message):
    with pytest.raises(ValueError, match=message):
        plan.validate(steps)
    with pytest.raises(ValueError, match=message):
        plan.predict(steps, 1, guidance=False)


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("ode_steps", [1, 3])
def test_groups_stop_at_the_first_point(guidance, ode_steps):
    """Of 12 prompts 5 go on: what they cost, and what the others have cost until then."""
    plan = Plan(24, (PrunePoint(3, 12), PrunePoint(6, 8)), final_keep=6, keep_groups=5)
    per_prompt = replace(plan, keep_groups=None).predict(10, 9, guidance, ode_steps)
    until = Plan(24).predict(4, 0, guidance)  # four calls; the decodes of previews are as many as of pictures
    further = 24 * (ode_steps - 1) * (2 if guidance else 1)
    stopped = Cost(until.nfe + further, 24, 24, previews=24)
    assert plan.predict(10, 9, guidance, ode_steps, prompts=12) == per_prompt * 5 + stopped * 7
    assert plan.predict(10, 9, guidance, ode_steps, prompts=5) == per_prompt * 5
    assert [plan.rows_at(step, 12) for step in range(10)] == [12 * 24] * 4 + [5 * 12] * 3 + [5 * 8] * 3
    assert plan.trained(12) == 5 * 6 and replace(plan, keep_groups=None).trained(12) == 12 * 6
    assert [plan.stops_groups_after(step) for step in range(10)] == [step == 3 for step in range(10)]


def test_a_point_may_stop_groups_alone():
    plan = Plan(12, (PrunePoint(2, 12), PrunePoint(4, 12)), keep_groups=2)
    assert plan.active_points() == (PrunePoint(2, 12),) and plan.keep_after(2) == 12
    assert plan.predict(10, 9, guidance=False, prompts=6) == Cost(
        6 * 12 * 3 + 2 * 12 * 7, 6 * 12 + 2 * 12, 6 * 12 + 2 * 12, 2 * 12 * 9, previews=6 * 12
    )


def test_the_last_useful_step_is_allowed():
    Plan(24, (PrunePoint(8, 12),)).validate(10)


def test_summary():
    report = json.loads(json.dumps(summarised(STANDARD, guidance=True)))
    assert report == {
        "group_size": 48,
        "survivors": 12,
        "path": [48, 24, 12],
        "groups": [1],
        "prune_steps": [5, 7],
        "num_inference_steps": 10,
        "nfe_per_prompt": 720,
        "decodes_per_prompt": 84,
        "reward_calls_per_prompt": 84,
        "trained_steps_per_prompt": 108,
        "nfe_per_iteration": 720,
        "decodes_per_iteration": 84,
        "reward_calls_per_iteration": 84,
        "trained_steps_per_iteration": 108,
        "nfe_full_group": 960,
        "nfe_saved": 0.25,
        "nfe_ratio_to_none": 1.5,
    }


@pytest.mark.parametrize(
    ("name", "path", "saved"), [("none", [24], 0.0), ("posthoc", [24, 12], 0.0), ("flash", [24, 16, 12], 1 / 6)]
)
def test_summary_of_other_presets(name, path, saved):
    report = summarised(preset(name, 10), guidance=False)
    assert report["path"] == path
    assert report["nfe_saved"] == pytest.approx(saved)


def test_summary_where_groups_stop():
    plan = replace(STANDARD, keep_groups=4)
    report = summarised(plan, guidance=True, prompts=12)
    assert (report["path"], report["groups"]) == ([48, 24, 12], [12, 4])
    assert report["nfe_per_prompt"] == 720  # of one that goes on
    assert report["nfe_per_iteration"] == 2 * (12 * 48 * 6 + 4 * (24 * 2 + 12 * 2))
    assert report["decodes_per_iteration"] == report["reward_calls_per_iteration"] == 12 * 48 + 4 * (24 + 12)
    assert report["trained_steps_per_iteration"] == 4 * 12 * 9
    assert report["nfe_saved"] == pytest.approx(1 - report["nfe_per_iteration"] / (12 * 960))
    assert report["nfe_ratio_to_none"] == pytest.approx(report["nfe_per_iteration"] / (12 * 480))


def test_a_latent_reward_head_decodes_finalists_alone():
    report = summarised(STANDARD, guidance=True, ode_steps=0)
    assert report["decodes_per_prompt"] == report["reward_calls_per_prompt"] == 12
    assert report["nfe_per_prompt"] == summarised(STANDARD, guidance=True)["nfe_per_prompt"]
    assert STANDARD.predict(10, 9, guidance=True, ode_steps=0).probed == 48 + 24
