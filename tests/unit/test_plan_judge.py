"""Whether a plan pays, by hand from what was counted and how long it took; and which plan is chosen."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import cast

import numpy as np
import pytest
import torch

from progrpo.checks import check
from progrpo.config import (
    Config,
    GRPOSettings,
    ObjectiveSettings,
    PlanSettings,
    PreviewSettings,
    SamplingSettings,
    last_equal_step,
    prompt_cost,
    stochastic_steps,
)
from progrpo.rollout import plan_value
from progrpo.rollout.plan import Plan, PrunePoint, UnitCosts, preset
from progrpo.rollout.plan_value import Simulation
from progrpo.rollout.probe import Probe, ProbeExample, trusted_steps
from progrpo.rollout.prune import Selection
from progrpo.storage import load_state, save_state
from progrpo.training.plan_judge import JudgeState, PlanJudge, Verdict, plan_from
from progrpo.types import Cost
from tests.support.grids import SELECTORS

STEPS = 10
OVF, NOWHERE = SELECTORS["ovf"], frozenset[int]()
COUNTED = Cost(nfe=1000, decodes=140, reward_calls=140, trained_steps=900, previews=100)
SECONDS = {"sample": 50.0, "preview": 4.0, "reward": 8.0, "update": 180.0, "audit": 999.0, "other": 999.0}
CALL, PREVIEW, FINISH, TRAIN = 0.05, 0.04, 0.2, 0.2
"""Seconds of one of each."""
UNITS = UnitCosts(CALL, PREVIEW, FINISH, TRAIN)
FINAL = torch.special.ndtri((torch.arange(24, dtype=torch.float64) + 0.5) / 24).numpy()
VERDICTS = np.array([1.0] * 12 + [0.0] * 12)
EQUAL = np.array([0.4] * 24)
STANDARD = (FINAL / FINAL.std()).tolist()


@pytest.fixture(autouse=True)
def few_groups(monkeypatch):
    """A coarser simulation in an eighth of the time: what is compared here is of the same draws."""
    monkeypatch.setattr(plan_value, "_GROUPS", 64)


def config(adaptive: bool = False, start: PlanSettings | None = None, **sections) -> Config:
    plan = replace(start or PlanSettings(preset="flash"), adaptive=adaptive)
    return replace(Config(plan=plan, sampling=SamplingSettings(num_inference_steps=STEPS)), **sections)


def judged(asked: Config, *agreements, counted: Cost = COUNTED, seconds=SECONDS) -> PlanJudge:
    judge = PlanJudge(asked)
    for agreement in agreements:
        judge.watch(agreement, FINAL, counted, seconds)
    return judge


def verdict(judge: PlanJudge, plan: Plan, select=OVF, probed_steps: frozenset[int] = NOWHERE) -> Verdict:
    result = judge.verdict(plan, select, probed_steps)
    assert result is not None
    return result


def flat(agreement: float | None) -> list[float | None]:
    return [agreement] * STEPS


FLASH = preset("flash", STEPS)


def test_a_plan_is_judged_after_three_audits():
    judge = judged(config())
    for _ in range(2):
        assert judge.verdict(FLASH, OVF, NOWHERE) is None
        judge.watch(flat(0.8), FINAL, COUNTED, SECONDS)
    assert judge.verdict(FLASH, OVF, NOWHERE) is None
    judge.watch(flat(0.8), FINAL, COUNTED, SECONDS)
    assert judge.verdict(FLASH, OVF, NOWHERE) is not None


def test_plan_value_is_signal_a_second_over_that_of_plain_grpo():
    agreement = [0.1 * step for step in range(STEPS)]
    judgement = verdict(judged(config(), *[agreement] * 3), FLASH)
    simulation = Simulation.of(agreement, [STANDARD] * 3, 24)
    # flash: 24 for six calls, 16 for two, 12 for two; 24 and then 16 are previewed; nine of ten steps are trained
    flash = (24 * 6 + 16 * 2 + 12 * 2) * CALL + (24 + 16) * PREVIEW + 12 * FINISH + 12 * 9 * TRAIN
    none = 24 * 10 * CALL + 24 * FINISH + 24 * 9 * TRAIN
    expected = simulation.signal(FLASH, OVF) / flash / (simulation.signal(Plan(24), OVF) / none)
    assert judgement.decision.value == pytest.approx(expected, rel=1e-12)
    assert judgement.plan == FLASH and judgement.decision.next_path == [24, 16, 12]
    variance = simulation.signal(FLASH, OVF) / 12 / (simulation.signal(Plan(24), OVF) / 24)
    assert judgement.decision.next_variance == pytest.approx(variance, rel=1e-12) and 1 < variance < 2


def test_guidance_further_steps_and_untrained_steps_are_in_the_price():
    grpo = ObjectiveSettings(grpo=GRPOSettings(clip_range=1e-3))
    sampling = SamplingSettings(num_inference_steps=STEPS, guidance_scale=3.0, sde_window="first", sde_window_size=2)
    asked = config(sampling=sampling, preview=PreviewSettings(ode_steps=3), objective=grpo)
    judgement = verdict(judged(asked, *[flat(0.7)] * 3), FLASH)
    simulation = Simulation.of([0.7] * STEPS, [STANDARD] * 3, 24)
    calls = 2 * (24 * 6 + 16 * 2 + 12 * 2 + 2 * (24 + 16))
    flash = calls * CALL + (24 + 16) * PREVIEW + 12 * FINISH + 12 * 2 * TRAIN
    none = 2 * 24 * 10 * CALL + 24 * FINISH + 24 * 2 * TRAIN
    expected = simulation.signal(FLASH, OVF) / flash / (simulation.signal(Plan(24), OVF) / none)
    assert judgement.decision.value == pytest.approx(expected, rel=1e-12)


def test_the_value_of_plain_grpo_is_one():
    decision = verdict(judged(config(), *[flat(0.5)] * 3), preset("none", STEPS)).decision
    assert decision.value == decision.next_variance == pytest.approx(1)


def test_a_probes_steps_cost_no_preview():
    probe, rewards = Probe(STEPS), torch.arange(4.0)
    probe.learn([ProbeExample(torch.zeros(STEPS, 4, 1, 2, 2), torch.zeros(1, 1), rewards, rewards.expand(STEPS, -1))])
    for _ in range(3):
        probe.watch([0.9 if step == 5 else 0.0 for step in range(STEPS)])
    judge = judged(config(), *[flat(0.7)] * 3)
    with_probe = verdict(judge, FLASH, probed_steps=trusted_steps(probe, PreviewSettings())).decision.value
    flash = (24 * 6 + 16 * 2 + 12 * 2) * CALL + (24 + 16) * PREVIEW + 12 * FINISH + 12 * 9 * TRAIN
    assert with_probe / verdict(judge, FLASH).decision.value == pytest.approx(flash / (flash - 24 * PREVIEW), rel=1e-12)


def test_costs_that_were_written_down_are_taken_in_place_of_measured_ones():
    judge = PlanJudge(config())
    judge.recorded = UnitCosts(1.0, 2.0, 3.0, 4.0)
    for _ in range(3):
        judge.watch(flat(0.7), FINAL, COUNTED, SECONDS)
    assert judge.units == judge.recorded


def test_costs_are_those_of_the_first_verdict():
    judge = judged(config(), *[flat(0.7)] * 3)
    assert judge.units == UNITS
    before = verdict(judge, FLASH).decision.value
    judge.watch(flat(0.7), FINAL, COUNTED * 2, {name: 100 * s for name, s in SECONDS.items()} | {"preview": 0.0})
    assert judge.units == UNITS
    assert verdict(judge, FLASH).decision.value == before


def test_costs_are_not_those_of_the_audits_before():
    judge = PlanJudge(config())
    for factor in (100.0, 10.0, 1.0):
        judge.watch(flat(0.7), FINAL, COUNTED, {name: factor * s for name, s in SECONDS.items()})
    assert judge.units == UNITS


def test_newer_audits_weigh_more_and_old_ones_are_forgotten():
    later = [[0.1 * i, *flat(0.2)[1:]] for i in range(1, 9)]
    old = judged(config(), *[flat(0.9)] * 20, *later)  # the policy that previews agreed with is long gone
    assert verdict(old, FLASH) == verdict(judged(config(), *later), FLASH)
    weights = np.array([0.5 ** ((7 - i) / 2) for i in range(8)])
    mean = [float(weights @ [0.1 * i for i in range(1, 9)] / weights.sum()), *flat(0.2)[1:]]
    at_first = Plan(24, (PrunePoint(0, 12),))
    even = [sum(step) / 8 for step in zip(*later, strict=True)]
    values = [verdict(judge, at_first).decision.value for judge in (old, judged(config(), *[mean] * 8))]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert values[0] > verdict(judged(config(), *[even] * 8), at_first).decision.value  # here they rise


def test_previews_that_are_all_alike_know_nothing():
    some = verdict(judged(config(), *[flat(0.4)] * 3), FLASH).decision.value
    mixed = [flat(None), flat(0.8), flat(None), flat(0.8)]
    weights = [0.5 ** (age / 2) for age in (3, 2, 1, 0)]
    mean = 0.8 * (weights[1] + weights[3]) / sum(weights)
    assert verdict(judged(config(), *mixed), FLASH).decision.value == pytest.approx(
        verdict(judged(config(), *[flat(mean)] * 4), FLASH).decision.value
    )
    nothing = verdict(judged(config(), *[flat(None)] * 3), FLASH).decision.value
    assert nothing == verdict(judged(config(), *[flat(0.0)] * 3), FLASH).decision.value < some


def test_a_group_whose_rewards_are_equal_is_as_if_it_had_not_been():
    judge = PlanJudge(config())
    for agreement, final in [(None, EQUAL), (0.5, FINAL), (0.6, FINAL), (None, EQUAL)]:
        judge.watch(flat(agreement), final, COUNTED, SECONDS)
    assert judge.verdict(FLASH, OVF, NOWHERE) is None and judge.units is None
    judge.watch(flat(0.7), FINAL, COUNTED, SECONDS)
    assert verdict(judge, FLASH) == verdict(judged(config(), flat(0.5), flat(0.6), flat(0.7)), FLASH)


def test_missing_rewards_are_left_out():
    judge = PlanJudge(config())
    for _ in range(3):
        judge.watch(flat(0.7), np.append(VERDICTS, np.nan), COUNTED, SECONDS)
    whole = PlanJudge(config())
    for _ in range(3):
        whole.watch(flat(0.7), VERDICTS, COUNTED, SECONDS)
    assert verdict(judge, FLASH) == verdict(whole, FLASH)


def test_a_verdict_that_half_the_members_pass_promises_nothing_for_a_choice():
    """Twelve of 24 have the variance of all: half the signal, where normal rewards have 1.85 halves."""
    choice = Plan(24, final_keep=12)
    for final, v in ((VERDICTS, 1.0), (FINAL, np.mean(np.sort(np.square(STANDARD))[12:]))):
        judge = PlanJudge(config())
        for _ in range(3):
            judge.watch(flat(1.0), final, COUNTED, SECONDS)
        spent, of_none = (UNITS.seconds(prompt_cost(config(), plan)) for plan in (choice, Plan(24)))
        assert verdict(judge, choice).decision.value == pytest.approx(v / 2 / (spent / of_none), rel=1e-8)


def test_better_previews_pay_more_and_dearer_ones_less():
    values = [verdict(judged(config(), *[flat(a)] * 3), FLASH).decision.value for a in (0.0, 0.5, 0.9)]
    assert values[0] < values[1] < values[2]
    dear = judged(config(), *[flat(0.9)] * 3, seconds=SECONDS | {"preview": 400.0})
    assert verdict(dear, FLASH).decision.value < values[2]


# --- the plan that is taken -------------------------------------------------------------------------------------------


def test_a_plan_that_is_not_adaptive_stays():
    judge = judged(config(), *[flat(0.99)] * 3, seconds=SECONDS | {"preview": 0.0})
    assert verdict(judge, FLASH).plan == FLASH


SAMPLING_IS_ALL = SECONDS | {"preview": 0.001, "reward": 0.001, "update": 0.001}


def test_where_early_previews_are_good_and_cheap_it_prunes_early():
    chosen = verdict(judged(config(True), *[flat(0.97)] * 3, seconds=SAMPLING_IS_ALL), FLASH)
    assert chosen.plan.prune[0].step == 0 and chosen.plan.finalists == 12
    assert chosen.decision.next_path[0] == 24 and chosen.decision.next_path[-1] == 12


def test_where_previews_become_good_late_it_prunes_no_earlier():
    blind_until_six = [0.0] * 6 + [0.97] * 4
    chosen = verdict(judged(config(True), *[blind_until_six] * 3, seconds=SAMPLING_IS_ALL | {"update": 500.0}), FLASH)
    assert chosen.plan.prune and chosen.plan.prune[0].step == 6


@pytest.mark.parametrize("agreement", [None, 0.0, -0.4])
@pytest.mark.parametrize("dear", ["preview", "update"])
def test_where_previews_know_nothing_nobody_goes_while_sampling(agreement, dear):
    judge = judged(config(True), *[flat(agreement)] * 3, seconds=SECONDS | {dear: 2000.0})
    assert verdict(judge, FLASH).plan.active_points() == ()


def test_where_training_is_what_costs_it_chooses_by_final_rewards():
    chosen = verdict(judged(config(True), *[flat(None)] * 3, seconds=SECONDS | {"update": 20_000.0}), FLASH)
    assert chosen.plan == Plan(24, final_keep=12) and chosen.decision.next_path == [24, 12]


@pytest.mark.parametrize("dear", ["sample", "update"])
@pytest.mark.parametrize("agreement", [0.0, 0.99])
@pytest.mark.parametrize("start", [PlanSettings(preset="flash"), PlanSettings("custom", group_size=8, prune=((3, 5),))])
def test_survivors_never_become_fewer_and_the_group_stays(start, agreement, dear):
    asked = config(True, start)
    judge = judged(asked, *[flat(agreement)] * 3, seconds=SECONDS | {dear: 1e6})
    first = plan_from({"group_size": 8, "prune": [{"step": 3, "keep": 5}], "final_keep": None})
    plan = first if start.preset == "custom" else FLASH
    least = plan.survivors
    for _ in range(2):  # also not one after another
        plan = verdict(judge, plan).plan
        plan.validate(STEPS)
        assert plan.survivors >= least and plan.group_size == (8 if start.preset == "custom" else 24)


def test_the_plan_that_is_taken_is_worth_at_least_as_much():
    for agreement in (flat(0.2), [0.1 * s for s in range(STEPS)], flat(0.95)):
        judge = judged(config(True), *[agreement] * 3)
        before = verdict(judge, FLASH)
        after = verdict(judge, before.plan)
        assert after.decision.value >= before.decision.value
        assert after.plan == before.plan  # what is best stays
        if before.plan != FLASH:
            assert after.decision.value > 1.02 * before.decision.value  # else it is no reason to change


def test_a_baseline_of_the_full_group_has_no_verdict():
    posthoc = preset("posthoc", STEPS)
    for baseline in ("survivors", "group"):
        judge = judged(config(objective=ObjectiveSettings(baseline=baseline)), *[flat(0.7)] * 3)
        assert (judge.verdict(posthoc, OVF, NOWHERE) is None) == (baseline == "group")


def test_one_std_for_all_groups_is_judged_by_the_spread_of_audits():
    judge, group = (PlanJudge(config(objective=ObjectiveSettings(advantage=name))) for name in ("batch", "group"))
    weights, finals = [0.5 ** (age / 2) for age in (2, 1, 0)], [FINAL, 5 * FINAL, VERDICTS]
    for final in finals:
        for one in (judge, group):
            one.watch(flat(0.7), np.append(final, np.nan), COUNTED, SECONDS)
    standard = [((final - final.mean()) / final.std()).tolist() for final in finals]
    simulation = Simulation.of([0.7] * STEPS, standard, 24, weights).of_batch([f.std() for f in finals], weights)
    flash, none = (simulation.signal(plan, OVF) for plan in (FLASH, Plan(24)))
    seconds = [UNITS.seconds(prompt_cost(judge.config, plan)) for plan in (FLASH, Plan(24))]
    value = verdict(judge, FLASH).decision.value
    assert value == pytest.approx(flash / none / (seconds[0] / seconds[1]), rel=1e-9)
    assert abs(value / verdict(group, FLASH).decision.value - 1) > 1e-3
    resumed = PlanJudge(judge.config)
    resumed.load_state_dict(judge.state_dict())
    assert verdict(resumed, FLASH) == verdict(judge, FLASH)
    older = judge.state_dict()
    del older["stds"]
    resumed.load_state_dict(older)
    assert verdict(resumed, FLASH).decision.value > 0


def test_a_std_for_each_reward_has_no_verdict_and_no_plan_that_needs_one():
    gdpo = ObjectiveSettings(advantage="gdpo")
    assert judged(config(objective=gdpo), *[flat(0.7)] * 3).verdict(FLASH, OVF, NOWHERE) is None
    for asked, name in ((config(True, objective=gdpo), "plan.adaptive"), (config(start=AUTO, objective=gdpo), "auto")):
        with pytest.raises(ValueError, match=f"objective.advantage must be group or batch for .*{name}, not gdpo"):
            check(asked)


def test_costs_of_a_prompt_are_the_plans_own():
    assert prompt_cost(config(), FLASH) == FLASH.predict(STEPS, STEPS - 1, False)


# --- resume -----------------------------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_its_dictionary(tmp_path):
    for plan in (
        Plan(8),
        Plan(24, (PrunePoint(5, 16), PrunePoint(7, 12))),
        Plan(24, (PrunePoint(1, 20),), 12, 3),
        Plan(2, recorded=True),
    ):
        save_state(tmp_path / "plan", {"plan": asdict(plan)})
        assert plan_from(load_state(tmp_path / "plan")["plan"]) == plan


@pytest.mark.parametrize("audits", [0, 2, 3, 12])
def test_a_verdict_is_the_same_after_a_resume(tmp_path, audits):
    agreements = [[None if step == i % 4 else 0.05 * i + 0.03 * step for step in range(STEPS)] for i in range(audits)]
    judge = judged(config(True), *agreements)
    save_state(tmp_path / "judge", judge.state_dict())
    other = judged(config(True), *[flat(0.99)] * 5, seconds=SECONDS | {"sample": 1.0})
    other.load_state_dict(cast(JudgeState, load_state(tmp_path / "judge")))
    assert other.units == judge.units
    for _ in range(2):
        assert (
            other.verdict(FLASH, OVF, NOWHERE)
            == judge.verdict(FLASH, OVF, NOWHERE)
            == judge.verdict(FLASH, OVF, NOWHERE)
        )
        for one in (judge, other):
            one.watch(flat(0.6), FINAL, COUNTED, SECONDS)


def test_a_checkpoint_without_final_rewards_begins_the_memory_anew():
    judge = judged(config(), *[flat(0.7)] * 4)
    state = judge.state_dict()
    del state["finals"]
    other = PlanJudge(config())
    other.load_state_dict(state)
    assert other.units == judge.units and other.verdict(FLASH, OVF, NOWHERE) is None
    for _ in range(3):
        other.watch(flat(0.7), FINAL, COUNTED * 2, SECONDS)
    assert other.units == judge.units
    assert verdict(other, FLASH) == verdict(judged(config(), *[flat(0.7)] * 3), FLASH)


# --- the plan that a run measures for itself --------------------------------------------------------------------------

AUTO = PlanSettings(preset="auto")


def test_progress_follows_the_critical_batch_law():
    """With a noise scale of B prompts of the plan in force, P prompts of signal s make 1 / (1 + B s_now / (P s))."""
    judge = judged(config(), *[flat(0.7)] * 3)
    prompts, scale = judge.config.prompts.per_iteration, 5.0
    simulation = Simulation.of([0.7] * STEPS, [STANDARD] * 3, 24)
    flash, none = (simulation.signal(plan, OVF) for plan in (FLASH, Plan(24)))
    seconds = [UNITS.seconds(prompt_cost(judge.config, plan)) for plan in (FLASH, Plan(24))]
    noise = scale * flash
    expected = prompts * flash / (prompts * flash + noise) / seconds[0]
    plain = prompts * none / (prompts * none + noise) / seconds[1]
    judgement = judge.verdict(FLASH, OVF, NOWHERE, scale)
    assert judgement is not None and judgement.decision.value == pytest.approx(expected / plain, rel=1e-12)
    unknown, large = judge.verdict(FLASH, OVF, NOWHERE), judge.verdict(FLASH, OVF, NOWHERE, 1e12)
    assert unknown is not None and large is not None
    assert unknown.decision.value == pytest.approx(large.decision.value, rel=1e-9)


def test_where_prompts_ask_for_different_changes_more_members_of_one_tell_less():
    """Own directions with the noise of the members under the plan in force: 1 / (1 / s + 1 / s_now) for signal s."""
    judge = judged(config(), *[flat(0.7)] * 3)
    simulation = Simulation.of([0.7] * STEPS, [STANDARD] * 3, 24)
    flash, none = (simulation.signal(plan, OVF) for plan in (FLASH, Plan(24)))
    seconds = [UNITS.seconds(prompt_cost(judge.config, plan)) for plan in (FLASH, Plan(24))]
    judgement = judge.verdict(FLASH, OVF, NOWHERE, None, 1.0)
    assert judgement is not None
    expected = (flash / 2 / seconds[0]) / (1 / (1 / none + 1 / flash) / seconds[1])
    assert judgement.decision.value == pytest.approx(expected, rel=1e-12)
    assert judgement.decision.value > verdict(judge, FLASH).decision.value


def test_auto_begins_unpruned_and_takes_the_strongest_choice_where_training_is_dear():
    assert AUTO.plan(STEPS) == Plan(24)
    judge = judged(config(start=AUTO), *[flat(0.3)] * 3, seconds=SECONDS | {"update": 20_000.0})
    judgement = verdict(judge, Plan(24))
    assert judgement.plan == Plan(24, final_keep=6)
    assert judgement.decision.next_value > judgement.decision.value == pytest.approx(1)


def test_a_verdict_says_how_the_signal_of_a_prompt_changes():
    judge = judged(config(start=AUTO), *[flat(0.3)] * 3, seconds=SECONDS | {"update": 20_000.0})
    judgement = verdict(judge, Plan(24))
    simulation = Simulation.of([0.3] * STEPS, [STANDARD] * 3, 24)
    ratio = simulation.signal(judgement.plan, OVF) / simulation.signal(Plan(24), OVF)
    assert judgement.signal_ratio == pytest.approx(ratio, rel=1e-12) and 0.5 < ratio < 1
    known = judge.verdict(Plan(24), OVF, NOWHERE, 8.0, 0.5)  # own directions have no part in it
    assert known is not None and known.plan == judgement.plan and known.signal_ratio == judgement.signal_ratio
    assert verdict(judge, judgement.plan).signal_ratio == 1


@pytest.mark.parametrize(("noise_scale", "own_direction"), [(None, None), (8.0, 0.5)])
def test_a_plan_that_teaches_nothing_is_judged_too(noise_scale, own_direction):
    """The best twelve by final rewards are alike where more of the group pass."""

    def best(scores_PG, keep, present_PG, seeds_P):
        chosen_PK = scores_PG.argsort(1, descending=True)[:, :keep]
        return Selection(chosen_PK, torch.ones_like(chosen_PK, dtype=torch.bool))

    plan = Plan(24, final_keep=12)
    judge = PlanJudge(config(start=AUTO))
    for _ in range(3):
        judge.watch(flat(0.5), np.array([1.0] * 20 + [0.0] * 4), COUNTED, SECONDS)
    judgement = judge.verdict(plan, best, NOWHERE, noise_scale, own_direction)
    assert judgement is not None and judgement.decision.value == 0 and judgement.signal_ratio == 1
    assert judgement.decision.next_value > 0 and judgement.plan != plan


def test_a_verdict_says_why():
    judge = judged(config(start=AUTO), *[flat(0.3)] * 3)
    ratio = 9 * TRAIN / (10 * CALL + FINISH)  # nine of ten steps are trained
    for scale, own in ((None, None), (12.34, 0.5)):
        judgement = judge.verdict(Plan(24), OVF, NOWHERE, scale, own)
        assert judgement is not None and judgement.decision.training_ratio == pytest.approx(ratio, rel=1e-12)
        assert (judgement.decision.noise_scale, judgement.decision.own_direction) == (scale, own)


@pytest.mark.parametrize("start", [PlanSettings("custom", prune=((8, 12),)), AUTO])
def test_no_plan_is_taken_that_compares_equal_members(start):
    sampling = SamplingSettings(
        num_inference_steps=STEPS, same_latent=True, sde_window="random", sde_window_size=2, sde_window_end=6
    )
    asked = config(start.preset == "custom", start, sampling=sampling)
    judgement = verdict(judged(asked, *[flat(0.97)] * 3, seconds=SAMPLING_IS_ALL), start.plan(STEPS))
    # without that the plan would prune after step 0, as above
    assert judgement.plan.prune[0].step == 5 == last_equal_step(asked) + 1


@pytest.mark.parametrize("window", ["sliding", "random"])
def test_calls_that_a_group_shares_are_priced_over_all_windows_of_the_run(window):
    sampling = SamplingSettings(
        num_inference_steps=STEPS,
        same_latent=True,
        sde_window=window,
        sde_window_size=2,
        sde_window_end=6,
        sde_window_interval=2,
    )
    asked = config(sampling=sampling, iterations=8)  # sliding, two iterations each start at step 0, 1, 2 and 3
    shared = [1 + stochastic_steps(asked, iteration).start for iteration in range(8)]
    assert window == "random" or shared == [1, 1, 2, 2, 3, 3, 4, 4]
    assert len(set(shared)) > 1 and sum(shared) / 8 != shared[0]
    decision = verdict(judged(asked, *[flat(0.7)] * 3), FLASH).decision
    simulation = Simulation.of([0.7] * STEPS, [STANDARD] * 3, 24)
    saved = 23 * sum(shared) / 8
    flash = (24 * 6 + 16 * 2 + 12 * 2 - saved) * CALL + (24 + 16) * PREVIEW + 12 * FINISH + 12 * 2 * TRAIN
    sampled, trained = (24 * 10 - saved) * CALL + 24 * FINISH, 24 * 2 * TRAIN
    expected = simulation.signal(FLASH, OVF) / flash / (simulation.signal(Plan(24), OVF) / (sampled + trained))
    assert decision.value == pytest.approx(expected, rel=1e-12)
    assert decision.training_ratio == pytest.approx(trained / sampled, rel=1e-12)


def test_auto_prunes_nothing_where_previews_know_nothing_and_updates_are_cheap():
    seconds = SECONDS | {"update": 1.0}
    assert verdict(judged(config(start=AUTO), *[flat(0.0)] * 3, seconds=seconds), Plan(24)).plan == Plan(24)


def test_auto_takes_small_groups_where_noise_is_small():
    """Where one prompt knows the direction, a better known one is worth nothing, and the cheapest update is best."""
    judge = judged(config(start=AUTO), *[flat(0.9)] * 3)
    judgement = judge.verdict(Plan(24), OVF, NOWHERE, 1e-3)
    assert judgement is not None and (judgement.plan.group_size, judgement.plan.survivors) == (12, 6)
    again = judge.verdict(judgement.plan, OVF, NOWHERE, None)
    assert again is not None and again.plan.group_size == 24  # the choice is made anew by each audit
