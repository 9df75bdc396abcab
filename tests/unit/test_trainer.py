"""One run, iteration by iteration, on the tiny pipeline."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from progrpo.config import (
    AuditSettings,
    GRPOSettings,
    ObjectiveSettings,
    OptimSettings,
    PlanSettings,
    PreviewSettings,
    PromptSettings,
    RewardSettings,
    WatchSettings,
)
from progrpo.prompts.order import BySignal, InTurn
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint, UnitCosts
from progrpo.rollout.rollout import rollout
from progrpo.storage import load_state, save_state
from progrpo.tracking.console import Console
from progrpo.tracking.decisions import PlanDecision
from progrpo.tracking.records import Summary
from progrpo.tracking.run_folder import RunFolder
from progrpo.training.audit import GroupWatch
from progrpo.training.distributed import Ranks
from progrpo.training.errors import MissingScoresError, SelfCheckError
from progrpo.training.noise_scale import NoiseScale
from progrpo.training.plan_judge import Verdict
from progrpo.training.plan_monitor import PlanMonitor
from progrpo.training.summary import Progress, summarize
from progrpo.training.totals import Totals, Work
from progrpo.training.watch import SelfChecks
from progrpo.types import Cost

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def untimed(record):
    return {k: v for k, v in record.items() if k != "seconds" and not k.startswith("time/")}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.trainable.items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_is_a_function_of_its_seed(tiny_trainer, tiny_config):
    first, second, other = (tiny_trainer(tiny_config(seed=seed)) for seed in (1, 1, 2))
    records = [untimed(trainer.step().record) for trainer in (first, second, other)]
    assert records[0] == records[1] != records[2]
    assert same(weights(first), weights(second)) and not same(weights(first), weights(other))


def test_a_record_has_the_documented_metrics(tiny_trainer, tiny_config):
    objective, audit = ObjectiveSettings(grpo=GRPOSettings(kl_beta=0.01)), AuditSettings(every=1)
    record = tiny_trainer(tiny_config(objective=objective, audit=audit)).step().record
    documented = set(re.findall(r"^- `([^`]+)`", DOCS.read_text(), re.M))
    names = {re.sub(r"@\d+", "@S", name) for name in record}
    assert names <= documented
    always = {n for n in re.findall(r"^- `([^`]+)` \([^;]*; always\)", DOCS.read_text(), re.M)}
    assert always <= names and {"update/kl", "audit/nfe", "preview/rank_correlation@S", "preview/variance@S"} <= names
    assert (record["iteration"], record["rollout/survivors"], record["update/lr"]) == (0, 2 * 3, 1e-3)
    stages = [value for name, value in record.items() if name.startswith("time/")]
    assert sum(stages) == pytest.approx(record["seconds"]) and min(stages) >= 0


def test_every_figure_of_a_summary_is_documented():
    entries = re.findall(r"^- (.+?)(?: \(|:)", DOCS.read_text().partition("\n## The summary\n")[2], re.M)
    documented = {name for entry in entries for name in re.findall(r"`(\w+)`", entry)}
    assert documented == Summary.__optional_keys__


def test_metrics_that_were_not_measured_are_absent(tiny_trainer, tiny_config):
    record = tiny_trainer(tiny_config()).step().record
    assert not {"update/kl", "audit/nfe", "reward/strict", "reward/group_std_full"} & record.keys()
    plain = tiny_trainer(tiny_config(plan=PlanSettings("custom", group_size=4, final_keep=3))).step().record
    assert plain["reward/group_std_full"] > 0


def test_kl_grows_from_zero(tiny_trainer, tiny_config):
    trainer = tiny_trainer(tiny_config(objective=ObjectiveSettings(grpo=GRPOSettings(kl_beta=0.01))))
    first, second = (trainer.step().record for _ in range(2))
    assert first["update/kl"] == pytest.approx(0, abs=1e-12) and second["update/kl"] > 1e-9


def test_an_audit_comes_every_nth_iteration_and_changes_no_weight(tiny_trainer, tiny_config):
    watched, not_watched = (tiny_trainer(tiny_config(audit=AuditSettings(every=n))) for n in (2, 0))
    done = [watched.step() for _ in range(2)]
    for _ in range(2):
        not_watched.step()
    assert [d.audit is not None for d in done] == [False, True]
    assert same(weights(watched), weights(not_watched))
    audit = done[1].audit
    assert audit.prompt in watched.order.prompts_for(1, 2)
    assert audit.scores_TG.shape == (4, 4) and audit.final_G.shape == (4,)
    assert audit.pictures_GSHWC.shape == (4, 5, 16, 16, 3)
    record = audit.record(1)
    assert record["iteration"] == 1 and record["steps"] == [0, 1, 2, 3]
    assert sorted(s for s in record["stopped_at"] if s is not None) == [1]


PLAIN = PlanSettings("custom", group_size=4)


@pytest.mark.parametrize("waves", [1, 2])
def test_where_every_member_is_trained_on_an_audit_watches_a_group_of_the_iteration(tiny_trainer, tiny_config, waves):
    """At the cost of previews alone; it is the audit of one more group in the same place, and changes no weight."""
    sections = {"plan": PLAIN, "reward": RewardSettings(waves=waves)}
    watched, not_watched = (tiny_trainer(tiny_config(audit=AuditSettings(every=n), **sections)) for n in (2, 0))
    done = [watched.step() for _ in range(2)]
    for _ in range(2):
        not_watched.step()
    assert [d.audit is not None for d in done] == [False, True] and same(weights(watched), weights(not_watched))
    audit, rolled = done[1].audit, done[1].rollout
    place = watched.order.prompts_for(1, 2).index(audit.prompt)
    own = rolled.finalists.group_N == place
    assert torch.equal(audit.final_G, rolled.finalists.ranking_N[own])
    assert np.array_equal(audit.pictures_GSHWC[:, -1], rolled.pictures.images_NHWC[own].numpy())
    assert audit.stopped_at == [None] * 4 and audit.scores_TG.shape == (4, 4)
    torch.testing.assert_close(audit.scores_TG[-1], audit.final_G, rtol=0, atol=0.01)
    assert watched.totals.audited == Cost(decodes=16, reward_calls=16, previews=16)
    assert done[1].record["audit/nfe"] == 0 < done[1].record["time/audit"]


def test_watched_groups_are_seen_as_a_group_of_their_own_would_be(tiny_trainer, tiny_config):
    """With further preview steps, which need network calls."""
    config = tiny_config(plan=PLAIN, preview=PreviewSettings(ode_steps=2))
    trainer = tiny_trainer(config)
    prompts, key = trainer.order.prompts_for(0, 2), NoiseKey(config.seed, 0)
    audits = []
    for slots in ([0, 1], [1]):  # with another group, and alone
        watch = GroupWatch(prompts[1], 1, trainer.reward)
        sampler = watch.begin(trainer.sampler)
        audits.append(
            watch.audit(rollout(sampler, [prompts[s] for s in slots], torch.tensor(slots), key, Meter()), key)
        )
        assert watch.meter.cost == Cost(nfe=16, decodes=32, reward_calls=32, previews=32)
    first, second = audits
    torch.testing.assert_close(first.used_TG, second.used_TG, rtol=0, atol=1e-4)
    torch.testing.assert_close(first.scores_TG, second.scores_TG, rtol=0, atol=1e-4)
    torch.testing.assert_close(first.final_G, second.final_G, rtol=0, atol=1e-4)
    assert (first.used_TG[0] - first.scores_TG[0]).abs().max() > 2e-4


@pytest.mark.parametrize(("prune", "warns"), [(((1, 2),), True), ((), False)])
def test_a_plan_below_plain_groups_is_warned_of_where_it_prunes(tiny_trainer, tiny_config, capsys, prune, warns):
    monitor = tiny_trainer(tiny_config(plan=PlanSettings("custom", group_size=4, prune=prune))).plan_monitor
    before, monitor.plan_value = monitor.standing, 0.9  # as after a verdict
    monitor.announce_change(before, Console(7))
    assert ("is expected to bring 0.90 x" in capsys.readouterr().out) == warns


def test_auto_does_not_advise_itself(tiny_config, capsys):
    """It keeps a plan that is a little below plain groups: a change would gain less than 2 %."""
    config = tiny_config(plan=PlanSettings("auto"), audit=AuditSettings(every=1))
    monitor = PlanMonitor(config, Ranks(), SelfChecks(config.watch))
    monitor.plan, monitor.plan_value = Plan(12, (PrunePoint(2, 6),)), 1.01
    before, monitor.plan_value = monitor.standing, 0.99
    monitor.announce_change(before, Console(7))
    assert capsys.readouterr().out == ""


def test_a_plan_that_moves_its_steps_alone_is_announced(tiny_config, capsys):
    config = tiny_config(plan=PlanSettings("custom", group_size=4, prune=((1, 3),), adaptive=True))
    monitor = PlanMonitor(config, Ranks(), SelfChecks(config.watch))
    before = monitor.standing
    monitor.announce_change(before, Console(7))
    assert capsys.readouterr().out == ""
    monitor.plan, monitor.plan_value = Plan(4, (PrunePoint(2, 3),)), 1.1
    decision = PlanDecision(0.95, [4, 3], [1], 1.1, [4, 3], [2], 2.0, None, None)
    monitor.verdict = Verdict(monitor.plan, decision, 1.0)
    monitor.announce_change(before, Console(7))
    assert capsys.readouterr().out.startswith("plan: groups of 4 -> 3 (3 after step 2) from here on: 1.10 x")


def test_a_first_verdict_that_keeps_the_plan_is_announced_once(tiny_config, capsys):
    config = tiny_config(plan=PlanSettings("auto"), audit=AuditSettings(every=1))
    monitor = PlanMonitor(config, Ranks(), SelfChecks(config.watch))
    before, monitor.plan_value = monitor.standing, 1.0
    monitor.verdict = Verdict(monitor.plan, PlanDecision(1.0, [24], [], 1.0, [24], [], 0.5, None, None), 1.0)
    monitor.announce_change(before, Console(7))
    assert capsys.readouterr().out.startswith("plan: groups of 24 (not pruned) as before: 1.00 x the expected progress")
    monitor.announce_change(monitor.standing, Console(7))
    assert capsys.readouterr().out == ""


def test_a_plan_that_adapts_and_is_not_worth_its_time_is_warned_of_at_the_first_verdict(tiny_config, capsys):
    plan = PlanSettings("custom", group_size=4, prune=((1, 2),), adaptive=True)
    config = tiny_config(plan=plan, audit=AuditSettings(every=1))
    monitor = PlanMonitor(config, Ranks(), SelfChecks(config.watch))
    before, monitor.plan_value = monitor.standing, 0.8
    monitor.verdict = Verdict(monitor.plan, PlanDecision(0.8, [4, 2], [1], 0.8, [4, 2], [1], 0.5, None, None), 1.0)
    monitor.announce_change(before, Console(7))
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("plan: groups of 4 -> 2") and "warning: the plan 4 -> 2 is expected to bring 0.80 x" in said


def test_a_value_belongs_to_the_plan_that_was_judged(tiny_config):
    """A plan that a resumed run takes in its place has none yet."""
    judged, same, other = (
        PlanMonitor(config, Ranks(), SelfChecks(config.watch))
        for prune in (((1, 2),), ((1, 2),), ())
        for config in [tiny_config(plan=PlanSettings("custom", group_size=4, prune=prune))]
    )
    judged.plan_value = 0.9
    for monitor, value in ((same, 0.9), (other, None)):
        monitor.load_state_dict(judged.state_dict(), Work(Cost(), {}))
        assert monitor.plan_value == value


def test_agreements_are_forgotten_with_the_plan_that_they_are_of(tiny_trainer, tiny_config):
    plan = PlanSettings("custom", group_size=4, prune=((2, 3),), adaptive=True)
    trainer = tiny_trainer(tiny_config(plan=plan, audit=AuditSettings(every=1)))
    judge = trainer.plan_monitor.judge
    judge.recorded = UnitCosts(1.0, 1e-6, 1e-6, 1e-6)
    for number in range(2):
        judge.watch([0.8] * 4, np.arange(4.0), Cost(), {})
        trainer.checks.check_agreement(number, [0.8])
    trainer.step()
    assert trainer.plan != plan.plan(4)
    assert trainer.checks.state_dict()["agreements"] == []


def test_a_plan_is_priced_with_the_groups_that_teach_nothing(tiny_trainer, tiny_config, redness):
    """The unit costs of an iteration give its seconds back, though half of its trajectories are not trained on."""
    teaching: list[str] = []

    def reward(images, prompts):
        reds = redness(images, prompts)
        return [red if prompt in teaching else 0.5 for red, prompt in zip(reds, prompts, strict=True)]

    trainer = tiny_trainer(tiny_config(audit=AuditSettings(every=1)), reward=reward)
    teaching.append(trainer.order.prompts_for(0, 2)[0].text)  # the audited one
    for _ in range(2):
        trainer.plan_monitor.judge.watch([0.8] * 4, np.arange(4.0), Cost(), {})
    record, predicted = trainer.step().record, trainer.totals.predicted
    assert record["advantage/zero_variance_groups"] == 1
    assert trainer.totals.counted.trained_steps == predicted.trained_steps / 2
    spent = sum(record[f"time/{stage}"] for stage in ("sample", "preview", "reward", "update"))
    assert trainer.plan_monitor.judge.units.seconds(predicted) == pytest.approx(spent)


def test_a_plan_is_priced_without_what_a_first_iteration_takes_once(tiny_trainer, tiny_config, redness):
    def reward(images, prompts):
        if trainer.iteration == 0:  # as long as networks are compiled, or models loaded
            time.sleep(0.2)
        return redness(images, prompts)

    trainer = tiny_trainer(tiny_config(audit=AuditSettings(every=1)), reward=reward)
    records = [trainer.step().record for _ in range(3)]
    units, counted = trainer.plan_monitor.judge.units, trainer.totals.counted
    scored = 2 * (counted.decodes - counted.previews) / 3  # of two of three iterations
    assert units.finish * scored == pytest.approx(sum(record["time/reward"] for record in records[1:]))
    assert records[0]["time/reward"] > 0.2


def test_a_plan_is_priced_without_the_first_iterations_of_all_processes_of_a_run(tiny_trainer, tiny_config, tmp_path):
    config = tiny_config(audit=AuditSettings(every=1))
    first = tiny_trainer(config)
    records = [first.step().record for _ in range(2)]
    save_state(tmp_path / "state", first.state_dict())
    resumed = tiny_trainer(config)
    resumed.load_state_dict(load_state(tmp_path / "state"))
    resumed.step()  # the third audit: the second iteration is the only one that no process began with
    units, counted = resumed.plan_monitor.judge.units, resumed.totals.counted
    assert units.finish * (counted.decodes - counted.previews) / 3 == pytest.approx(records[1]["time/reward"])


def test_previews_of_audits_price_those_that_the_plan_does_not_make(tiny_trainer, tiny_config):
    config = tiny_config(plan=PLAIN, preview=PreviewSettings(ode_steps=2), audit=AuditSettings(every=1))
    trainer = tiny_trainer(config)
    audits = [trainer.step().audit for _ in range(3)]
    assert trainer.plan_monitor.judge.units.preview == audits[-1].preview_seconds > 0
    assert tiny_trainer(tiny_config(plan=PLAIN, audit=AuditSettings(every=1))).step().audit.preview_seconds is None


def test_groups_that_a_reward_cannot_compare_are_not_stopped(tiny_trainer, tiny_config):
    def ranking(images, prompts):
        return [0.0] * len(images)

    ranking.groupwise = True  # type: ignore[attr-defined]
    message = "plan.keep_groups must be empty for the reward reward, which compares the pictures of one group alone"
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tiny_config(plan=STOPS), reward=ranking)


@pytest.mark.parametrize(("step", "left"), [(2, 1), (1, 0)])
def test_a_resumed_run_forgets_the_agreements_of_another_plan(tiny_config, step, left):
    def monitor_of(prune: tuple[int, int]) -> tuple[PlanMonitor, SelfChecks]:
        config = tiny_config(plan=PlanSettings("custom", group_size=4, prune=(prune,)))
        checks = SelfChecks(config.watch)
        checks.check_agreement(0, [0.8])
        return PlanMonitor(config, Ranks(), checks), checks

    saved, _ = monitor_of((2, 3))
    resumed, checks = monitor_of((step, 3))
    resumed.load_state_dict(saved.state_dict(), Work(Cost(), {}))
    assert len(checks.state_dict()["agreements"]) == left


def test_what_pruning_saved_is_by_the_plan_of_each_iteration(tiny_trainer, tiny_config, tmp_path):
    """Smaller groups that are not pruned save nothing."""
    trainer, older = (tiny_trainer(tiny_config(plan=PLAIN)) for _ in range(2))
    folder = RunFolder.create(tmp_path / "run")
    trainer.step()
    state = trainer.state_dict()
    state["totals"].pop("unpruned", None)  # as an older progrpo saved it
    older.load_state_dict(state)
    for one in (trainer, older):
        one.plan_monitor.plan = Plan(2)
        one.step()
        summary = summarize(one, folder, Progress("running", 1.0, None, []))
        assert summary["nfe"] == 2 * 4 * (4 + 2) and summary["nfe_saved"] == 0


def test_v_of_a_choice_is_of_as_many_as_the_plan_in_force_keeps(tiny_trainer, tiny_config, tmp_path):
    trainer = tiny_trainer(tiny_config(plan=PLAIN, audit=AuditSettings(every=1)))
    audit, folder = trainer.step().audit, RunFolder.create(tmp_path / "run")
    folder.write_audit(audit.record(0), audit.pictures_GSHWC)
    plans = {Plan(4, (PrunePoint(1, 2),)): ["1"], Plan(4, (PrunePoint(1, 3),)): [], Plan(3, (PrunePoint(1, 2),)): []}
    for trainer.plan_monitor.plan, steps in plans.items():  # the audit, of a group of 4, kept half
        summary = summarize(trainer, folder, Progress("running", 1.0, None, []))
        assert list(summary["preview_variance"]) == steps and list(summary["preview_variance_by_step"]) == [*"0123"]


def test_an_iteration_that_a_reward_ends_is_not_predicted(tiny_trainer, tiny_config):
    """A summary of the run compares what was predicted with what was counted."""
    answer: list[float | None] = [0.5]
    trainer = tiny_trainer(tiny_config(), reward=lambda images, prompts: answer * len(images))
    trainer.step()
    answer[0] = None
    with pytest.raises(MissingScoresError):
        trainer.step()
    assert trainer.totals.predicted.nfe == trainer.totals.counted.nfe == trainer.predicted().nfe


def test_auto_audits_each_iteration_until_a_plan_is_judged(tiny_trainer, tiny_config, tmp_path, capsys):
    """Also after a resume, which comes to the same verdict."""
    config = tiny_config(plan=PlanSettings("auto"), audit=AuditSettings(every=3), iterations=7)
    trainer = tiny_trainer(config)
    trainer.plan_monitor.judge.recorded = UnitCosts(1.0, 0.1, 0.1, 50.0)
    done = [trainer.step() for _ in range(2)]
    save_state(tmp_path / "state", trainer.state_dict())
    resumed = tiny_trainer(config)
    resumed.load_state_dict(load_state(tmp_path / "state"))
    resumed.plan_monitor.judge.recorded = trainer.plan_monitor.judge.recorded
    before_it = trainer.plan_monitor.standing
    done.append(trainer.step())
    trainer.plan_monitor.announce_change(before_it, Console(7))
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("plan: groups of 24 -> 6 (6 by final rewards) from here on: ")
    assert "(1.00 x until here), since its survivors have " in said and "training a member takes" in said
    judgement = trainer.plan_monitor.judge.verdict(Plan(24), trainer.plan_monitor.selector, frozenset())
    before, after = (t.learner.updater.noise_scale.state_dict() for t in (resumed, trainer))
    mean = 0.95 * before["noise"] + 0.05 * done[2].record["update/gradient_noise"]
    expected = NoiseScale()
    expected.load_state_dict({**after, "noise": mean, "members": before["members"]})
    expected.change_signal(judgement.signal_ratio)
    assert after == pytest.approx(expected.state_dict()) and judgement.signal_ratio < 0.9  # of the new plan
    decision = {name: value for name, value in done[2].record.items() if name.startswith("plan/")}
    assert decision == judgement.decision.metrics()
    assert (decision["plan/value"], decision["plan/path"], decision["plan/next_path"]) == (1.0, [24], [24, 6])
    assert decision["plan/next_value"] > 1.5 and all(f"`{name}`" in DOCS.read_text() for name in decision)
    summary = summarize(trainer, RunFolder.create(tmp_path / "run"), Progress("running", 1.0, None, []))
    assert (summary["plan"]["value"], summary["plan"]["path"]) == (decision["plan/next_value"], [24, 6])
    done += [trainer.step() for _ in range(3)]
    assert [d.audit is not None for d in done] == [True, True, True, False, False, True]
    assert ["plan/value" in d.record for d in done] == [False, False, True, False, False, True]
    assert done[5].record["plan/path"] == [24, 6] and done[3].record["rollout/survivors"] == 12
    assert [untimed(resumed.step().record) for _ in range(4)] == [untimed(d.record) for d in done[2:]]


@pytest.mark.parametrize(
    ("plan", "keep"),
    [
        (PlanSettings("custom", group_size=6, prune=((1, 4), (2, 3))), [3, 4, 3, 3]),
        (PlanSettings("custom", group_size=6, prune=((2, 5),), final_keep=2), [2, 2, 5, 2]),
        (PlanSettings("custom", group_size=6), [3, 3, 3, 3]),  # half of a group that the plan keeps whole
    ],
)
def test_an_audit_measures_the_variance_of_choices_from_the_whole_group(tiny_trainer, tiny_config, plan, keep):
    done = tiny_trainer(tiny_config(plan=plan, audit=AuditSettings(every=1))).step()
    audit, record = done.audit, done.audit.record(0)
    final = audit.final_G.double().numpy()

    def best(scores):
        return max(combinations(range(6), count), key=lambda members: np.var(scores[list(members)]))

    for step, count in enumerate(keep):
        seen = audit.used_TG[step].double().numpy()
        assert record["keep"][step] == count
        assert record["variance"][step] == pytest.approx(np.var(final[list(best(seen))]) / np.var(final))
        assert record["variance_final"][step] == pytest.approx(np.var(final[list(best(final))]) / np.var(final))
    for name in ("variance", "variance_final"):
        written = {key: value for key, value in done.record.items() if key.startswith(f"preview/{name}@")}
        assert written == {f"preview/{name}@{step}": record[name][step] for step, _ in plan.prune}


def test_an_audit_of_equal_rewards_has_no_variance(tiny_trainer, tiny_config):
    trainer = tiny_trainer(
        tiny_config(audit=AuditSettings(every=1)), reward=lambda images, prompts: [0.5] * len(images)
    )
    done = trainer.step()
    assert done.audit.record(0)["variance"] == done.audit.record(0)["variance_final"] == [None] * 4
    assert done.record["preview/variance@1"] is None


def test_the_last_preview_of_an_audit_is_almost_the_picture(tiny_trainer, tiny_config):
    """The last step starts at sigma 0.009: what is seen there is what comes out."""
    audit = tiny_trainer(tiny_config(audit=AuditSettings(every=1))).step().audit
    torch.testing.assert_close(audit.scores_TG[-1], audit.final_G, rtol=0, atol=0.01)


def test_the_average_of_the_weights_lags_behind(tiny_trainer, tiny_config):
    trainer = tiny_trainer(tiny_config(optim=OptimSettings(ema_decay=0.5)))
    start = weights(trainer)
    trainer.step()
    assert trainer.learner.evaluated_weights == "ema"
    sets = trainer.policy.named_weights.state_dict()
    for name, now in weights(trainer).items():
        torch.testing.assert_close(sets["ema"][name], (start[name] + now) / 2)
    assert tiny_trainer(tiny_config()).learner.evaluated_weights == "current"


def test_groups_without_two_pictures_have_no_share_in_the_diversity(tiny_trainer, tiny_config):
    """So that it does not depend on which process has them."""
    trainer = tiny_trainer(tiny_config())
    rolled = trainer.step().rollout
    alone_N = (rolled.group_N == 0) | (rolled.trajectories.member_N == rolled.trajectories.member_N[-1])
    rolled = replace(rolled, pictures=replace(rolled.pictures, there_N=alone_N))
    tally = trainer.learner.learn(rolled, trainer.sampler.sampling, NoiseKey(0, 1), 1).tally
    assert tally.counts["rollout/diversity"] == 1


def test_an_objectives_average_follows_from_the_first_iteration_on(tiny_trainer, tiny_config):
    objective = ObjectiveSettings(name="dgpo")
    trainer = tiny_trainer(tiny_config(objective=objective))
    first = weights(trainer)
    trainer.step()
    # min(1e-3 n, 0.3) after the n-th, and the first is the first: with 0 the average would be the weights
    expected = {name: 1e-3 * first[name] + (1 - 1e-3) * now for name, now in weights(trainer).items()}
    average = trainer.policy.named_weights.state_dict()["average"]
    assert all(torch.allclose(average[name], expected[name], rtol=1e-6, atol=1e-9) for name in first)
    assert not same(average, weights(trainer))


def test_audits_go_through_the_places_of_an_iteration(tiny_trainer, tiny_config):
    trainer = tiny_trainer(tiny_config(audit=AuditSettings(every=2)))  # of two prompts an iteration
    done = [trainer.step() for _ in range(4)]
    places = [trainer.order.prompts_for(i, 2).index(done[i].audit.prompt) for i in (1, 3)]
    assert places == [0, 1]


def test_predictions_are_per_prompt(tiny_trainer, tiny_config):
    trainer = tiny_trainer(tiny_config(prompts=PromptSettings(per_iteration=3)))
    # 4 members for two steps and 3 for two, seen once by four and once by three, three trained on three steps
    assert trainer.predicted() == Cost(3 * 14, 3 * 7, 3 * 7, 3 * 9, previews=3 * 4)


def test_state_goes_through_storage(tiny_trainer, tiny_config, tmp_path):
    config = tiny_config(optim=OptimSettings(ema_decay=0.5))
    trainer, other = tiny_trainer(config), tiny_trainer(config)
    trainer.step()
    save_state(tmp_path / "state", trainer.state_dict())
    other.load_state_dict(load_state(tmp_path / "state"))
    assert other.iteration == 1 and asdict(other.totals) == asdict(trainer.totals)
    assert untimed(trainer.step().record) == untimed(other.step().record)
    assert same(weights(trainer), weights(other))


def test_totals_add_seconds_by_stage():
    totals = Totals()
    totals.add_seconds({"sample": 1.0, "update": 2.0})
    totals.add_seconds({"sample": 0.5})
    assert totals.seconds == {"sample": 1.5, "update": 2.0}
    again = Totals()
    again.load_state_dict(totals.state_dict())
    assert again == totals and again.seconds is not totals.seconds


def test_more_prompts_an_iteration_than_there_are_come_again(tiny_trainer, tiny_config):
    trainer = tiny_trainer(tiny_config(prompts=PromptSettings(per_iteration=4)))
    rolled = trainer.step().rollout
    assert len(rolled.prompts) == 4 and len({p.text for p in rolled.prompts}) == 3
    starts = rolled.trajectories.path[0].x_NCHW
    assert len(starts.flatten(1).unique(dim=0)) == len(starts)  # the same prompt in two slots is two groups


def test_failures_of_an_audit_are_counted_with_its_iteration(tiny_trainer, tiny_config):
    # a checkpoint after it would not know of them, and a resumed run would count fewer
    trainer = tiny_trainer(tiny_config(audit=AuditSettings(every=1)), reward=lambda i, p: [None, *[0.5] * (len(i) - 1)])
    record = trainer.step().record
    asked = record["rollout/reward_calls"] + trainer.totals.audited.reward_calls
    assert trainer.totals.asked == {"reward": asked} and not any(trainer.reward.failures().asked.values())
    assert 0 < record["reward/failed@reward"] < trainer.totals.missing["reward"]


def test_a_watched_group_whose_previews_have_no_score_stops_nothing(tiny_trainer, tiny_config, redness):
    """Previews of one group of four at each step; the pictures of both groups are scored."""

    def finished_alone(images, prompts):
        return redness(images, prompts) if len(images) == 8 else [None] * len(images)

    trainer = tiny_trainer(tiny_config(plan=PLAIN, audit=AuditSettings(every=1)), reward=finished_alone)
    done = trainer.step()
    assert done.audit is not None and done.audit.agreement() == [None] * 4
    assert done.record["reward/missing"] == 0 and "reward/failed@reward" not in done.record
    assert trainer.totals.asked == {"reward": 8 + 16} and trainer.totals.missing == {"reward": 16}


def test_a_probe_learns_what_selectors_compare(tiny_trainer, tiny_config):
    trainer = tiny_trainer(tiny_config(preview=PreviewSettings(probe=True)))
    trainer.reward._ranking = lambda rewards_NR, group_N: -rewards_NR[:, 0]  # as GDPO's sum, no multiple of the reward
    rolled = trainer.step().rollout
    taught = torch.cat([lesson.rewards_N for lesson in trainer.plan_monitor.probe._examples])
    assert torch.equal(taught, rolled.survivors.ranking_N) and torch.equal(taught, -rolled.survivors.value_N)


def test_a_state_is_taken_up_by_the_trainers_own_settings(tiny_trainer, tiny_config):
    # as with --accept-changes: none of these may stay as it was without a word
    before = tiny_trainer(tiny_config())
    before.step()
    after = tiny_trainer(
        tiny_config(
            optim=OptimSettings(weight_decay=0.5, betas=(0.5, 0.9), ema_decay=0.9),
            plan=PlanSettings("custom", group_size=6, prune=((1, 2),)),
            preview=PreviewSettings(probe=True),
        )
    )
    after.load_state_dict(before.state_dict())
    (group,) = after.learner.updater.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.5, 0.9)) and after.iteration == 1
    assert same(after.policy.named_weights.state_dict()["ema"], weights(before)) and after.plan.group_size == 6
    assert after.step().record["rollout/survivors"] == 2 * 2


def test_a_run_that_let_its_reference_go_goes_on_towards_one(tiny_trainer, tiny_config):
    # all weights are trained without a penalty, and later, with --accept-changes, with one
    full = tiny_config(model=replace(tiny_config().model, weights="full"))
    before = tiny_trainer(full)
    base = weights(before)
    before.step()
    assert "reference" not in before.state_dict()["policy"]
    after = tiny_trainer(replace(full, objective=ObjectiveSettings(grpo=GRPOSettings(clip_range=3e-3, kl_beta=0.1))))
    after.load_state_dict(before.state_dict())
    assert same(after.policy.named_weights.state_dict()["reference"], base)
    assert after.step().record["update/kl"] > 0


@pytest.mark.parametrize(
    ("sampling", "sentence"),
    [
        ({"guidance_scale": 2.0, "embedded_guidance": True}, "sampling.embedded_guidance must be false: "),
        ({"sampler": "cps", "train_last_step": True}, "sampling.train_last_step must be false: "),
    ],
)
def test_sampling_that_the_model_does_not_have_is_refused_at_once(tiny_trainer, tiny_config, sampling, sentence):
    # a run makes its folder, or replaces an old run, once it has a trainer
    config = tiny_config()
    with pytest.raises(ValueError, match=f"^{sentence}"):
        tiny_trainer(replace(config, sampling=replace(config.sampling, **sampling)))


def test_a_step_is_refused_that_only_a_later_window_trains(tiny_trainer, tiny_config):
    config = tiny_config()
    windows = {"sde_window": "sliding", "sde_window_size": 1, "sde_window_interval": 1}
    sampling = replace(config.sampling, sampler="cps", train_last_step=True, **windows)
    tiny_trainer(replace(config, sampling=sampling, iterations=3))
    with pytest.raises(ValueError, match=r"^sampling.train_last_step must be false: the last step of cps"):
        tiny_trainer(replace(config, sampling=sampling, iterations=4))


# --- groups that stop -------------------------------------------------------------------------------------------------

STOPS = PlanSettings("custom", group_size=4, prune=((1, 3),), keep_groups=2)


def in_threes(tiny_config, **sections):
    return tiny_config(plan=STOPS, prompts=PromptSettings(per_iteration=3), **sections)


@pytest.mark.parametrize("name", ["grpo", "nft", "dgpo"])
def test_a_group_that_stops_is_not_trained_on_and_the_others_are(tiny_trainer, tiny_config, name):
    objective = ObjectiveSettings(name=name, grpo=GRPOSettings(clip_range=3e-3))
    config = in_threes(tiny_config, objective=objective, audit=AuditSettings(every=1))
    trainer = tiny_trainer(replace(config, optim=replace(config.optim, updates_per_rollout=2)))
    before = weights(trainer)
    done = trainer.step()
    record, rolled = done.record, done.rollout
    assert len(rolled.group_N.unique()) == 2 and len(rolled.trajectories) == record["rollout/survivors"] == 2 * 3
    assert record["rollout/stopped_groups"] == 1
    assert record["reward/skipped_groups"] == record["advantage/zero_variance_groups"] == 0
    assert not same(weights(trainer), before)
    assert record.keys() >= {"preview/rank_correlation@1", "update/noise_scale"}
    documented = set(re.findall(r"^- `([^`]+)`", DOCS.read_text(), re.M))
    assert {re.sub(r"@\d+", "@S", key) for key in record} <= documented


def test_an_order_hears_of_a_group_that_stops_how_far_its_previews_differ(tiny_trainer, tiny_config):
    trainer = tiny_trainer(in_threes(tiny_config))
    heard: list[float] = []
    trainer.order = Listening({"": tuple(trainer.order.all_prompts)}, 0, heard)
    rolled = trainer.step().rollout
    (stopped,) = set(range(3)) - set(rolled.group_N.tolist())
    seen, (previews,) = rolled.finalists, rolled.previews
    for group in range(3):
        own = previews.scores_N[previews.group_N == group] if group == stopped else seen.value_N[seen.group_N == group]
        assert heard[group] == pytest.approx(own.std(correction=0).item())


@dataclass(frozen=True)
class Listening(InTurn):
    """An order that notes what it observes."""

    heard: list[float]

    def observe(self, iteration: int, signals: Sequence[float]) -> None:
        self.heard.extend(signals)


def test_a_run_that_stops_groups_goes_on_from_its_state(tiny_trainer, tiny_config, tmp_path):
    def build():
        trainer = tiny_trainer(in_threes(tiny_config, audit=AuditSettings(every=2)))
        trainer.order = BySignal({"": tuple(trainer.order.all_prompts)}, 0)
        return trainer

    straight, begun, resumed = build(), build(), build()
    begun.step()
    save_state(tmp_path / "state", begun.state_dict())
    resumed.load_state_dict(load_state(tmp_path / "state"))
    straight.step()
    for _ in range(2):
        assert untimed(straight.step().record) == untimed(resumed.step().record)
    assert same(weights(straight), weights(resumed))
    assert straight.totals.counted == straight.totals.predicted == resumed.totals.counted


def test_a_run_whose_groups_are_all_alike_is_stopped_where_some_are(tiny_trainer, tiny_config):
    config = in_threes(tiny_config, watch=WatchSettings(flat_iterations=2))
    trainer = tiny_trainer(config, reward=lambda images, prompts: [0.5] * len(images))
    first = trainer.step()
    assert first.record["advantage/zero_variance_groups"] == 2 and first.rollout.group_N.unique().tolist() == [0, 1]
    with pytest.raises(SelfCheckError, match="for 2 iterations no group's rewards differed"):
        trainer.step()
