"""The monitor of a run's plan: audits teach the probe, judge the plan, and check the previews."""

from __future__ import annotations

from dataclasses import dataclass

from progrpo.config import Config, resolve_plan
from progrpo.rollout.plan import Plan, path
from progrpo.rollout.probe import Probe, probe_examples, trusted_steps
from progrpo.tracking.console import Console
from progrpo.tracking.records import Metrics, metric
from progrpo.training.audit import Audit
from progrpo.training.distributed import Ranks
from progrpo.training.noise_scale import NoiseScale
from progrpo.training.plan_judge import PlanJudge, Verdict, iteration_cost, nfe_of_full_groups, plan_from, plan_state
from progrpo.training.state import PlanMonitorState
from progrpo.training.totals import Totals, Work
from progrpo.training.watch import SelfChecks
from progrpo.types import Cost, Rollout


@dataclass(frozen=True)
class PlanStanding:
    """The plan in force and its value, None before a verdict."""

    value: float | None
    plan: Plan


class PlanMonitor:
    """The keeper of the plan in force, which is alike in all processes. From audits it learns how well previews rank.

    The main process makes the audits, and the others hear of them.
    """

    def __init__(self, config: Config, ranks: Ranks, self_checks: SelfChecks) -> None:
        self.plan = resolve_plan(config)
        self.selector = config.plan.load_selector()
        self.probe = _probe(config)
        self.judge = PlanJudge(config)
        self.plan_value: float | None = None
        """The value of the plan in force, by the last verdict."""
        self.verdict: Verdict | None = None
        """The last verdict; None before it, and after a resume."""
        self._work = Work(Cost(), {})
        """The work that is done."""
        self._left_out = self._work
        """The part of it by which no plan is priced."""
        self._begun = False
        """Whether this process has made an iteration."""
        self._config = config
        self._ranks = ranks
        self._self_checks = self_checks

    @property
    def standing(self) -> PlanStanding:
        """The plan in force and its value."""
        return PlanStanding(self.plan_value, self.plan)

    @property
    def probed_steps(self) -> frozenset[int]:
        """The steps at which the probe is trusted to rank."""
        return trusted_steps(self.probe, self._config.preview)

    def predicted(self, iteration: int) -> Cost:
        """The cost that the plan in force predicts for a zero-based iteration, over all processes, without audits."""
        return iteration_cost(self._config, self.plan, self.probed_steps, iteration)

    @property
    def nfe_unpruned(self) -> int:
        """The NFE of an iteration in which the plan in force prunes nothing and no network call is shared."""
        return 0 if self.plan.recorded else nfe_of_full_groups(self._config, self.plan.group_size)

    def is_audit_due(self, iteration: int) -> bool:
        """Whether this zero-based iteration has an audit: every n-th, and under `auto` each until the first verdict."""
        if self.plan.recorded:
            return False
        every = self._config.audit.every
        seeks = self._config.plan.preset == "auto" and self.plan_value is None
        return every > 0 and (seeks or (iteration + 1) % every == 0)

    def audited_place(self, iteration: int) -> int:
        """The place of the prompt that an audit takes, up to multiples of their number: another one every time."""
        every = self._config.audit.every
        return iteration // every + (iteration + 1) % every

    def learn(
        self, iteration: int, rolled: Rollout, audit: Audit | None, totals: Totals, noise_scale: NoiseScale
    ) -> Metrics:
        """Learn from a zero-based iteration, in the main process also from its audit; the metrics of the plan.

        Every process teaches its probe alike, and takes the plan that the main process chooses. SelfCheckError where
        previews have stopped to tell anything.
        """
        work = self._usual(totals.work)
        metrics = {} if audit is None else self._agreement(audit)
        self._teach_probe(rolled, audit)
        if not self.is_audit_due(iteration):
            return {}
        correlations = [metric(metrics, name) for name in metrics if name.startswith("preview/rank_correlation@")]
        self._self_checks.check_agreement(iteration + 1, self._ranks.gather([correlations])[0])
        metrics |= self._judge_plan(audit, work, noise_scale)
        return metrics

    def _usual(self, work: Work) -> Work:
        """The work by which plans are priced: that of no process's first iteration, or all of it before there is other.

        A first iteration also compiles networks (`model.compile`), which takes minutes and comes once.
        """
        if not self._begun:
            self._left_out += work.since(self._work)
            self._begun = True
        self._work = work
        usual = work.since(self._left_out)
        return work if usual.cost == Cost() else usual

    def _agreement(self, audit: Audit) -> Metrics:
        """The agreement of previews with final rewards at the plan's points, the probe's beside it, and V there."""
        used, probe = audit.used_agreement(), audit.probe_agreement()
        variance, variance_final = audit.variance(), audit.variance_final()
        metrics: Metrics = {}
        for point in self.plan.active_points():
            metrics[f"preview/rank_correlation@{point.step}"] = used[point.step]
            metrics[f"preview/hit_rate@{point.step}"] = audit.hit_rate(point.step, point.keep)
            metrics[f"preview/variance@{point.step}"] = variance[point.step]
            metrics[f"preview/variance_final@{point.step}"] = variance_final[point.step]
            if probe is not None:
                metrics[f"probe/rank_correlation@{point.step}"] = probe[point.step]
        return metrics

    def _teach_probe(self, rolled: Rollout, audit: Audit | None) -> None:
        """Rate the probe by the audit, then teach it."""
        if self.probe is None:
            return
        own = probe_examples(rolled.trajectories, rolled.condition, rolled.survivors.ranking_N)
        if audit is not None:
            own |= audit.examples
        for agreement in self._ranks.gather([None if audit is None else audit.probe_agreement()]):
            if agreement is not None:
                self.probe.watch(agreement)
        examples = {slot: example for part in self._ranks.gather([own]) for slot, example in part.items()}
        self.probe.learn([example for _, example in sorted(examples.items())])  # in one order, whoever sampled which

    def _judge_plan(self, audit: Audit | None, work: Work, noise_scale: NoiseScale) -> Metrics:
        """Judge the plan in the main process, which has the audit; all take the plan that it chooses."""
        verdict = None
        if audit is not None:
            self.judge.watch(
                audit.used_agreement(), audit.final_G.numpy(), work.cost, work.seconds, audit.preview_seconds
            )
            verdict = self.judge.verdict(
                self.plan, self.selector, self.probed_steps, noise_scale.settled, noise_scale.own_direction
            )
        verdict = self._ranks.gather([verdict])[0]
        if verdict is None:
            return {}
        if verdict.plan != self.plan:
            self._self_checks.forget_agreement()
        self.plan = verdict.plan
        noise_scale.change_signal(verdict.signal_ratio)
        self.plan_value = verdict.decision.next_value
        self.verdict = verdict
        return verdict.decision.metrics()

    def announce_change(self, before: PlanStanding, console: Console) -> None:
        """Say what was decided, or warn of a plan whose pruning has turned out not to be worth its time."""
        value = self.plan_value
        if value is None:
            return
        prunes = self.plan.survivors < self.plan.group_size
        is_auto = self._config.plan.preset == "auto"  # it takes plain groups where they are worth a change
        if self._config.plan.follows_audits and (self.plan != before.plan or before.value is None):
            assert self.verdict is not None, "only a verdict decides"
            console.say(f"plan: {self.verdict.decision.sentence}")
        if prunes and not is_auto and value < 1 and (before.value is None or before.value >= 1):
            console.warn(
                f"the plan {' -> '.join(map(str, path(self.plan)))} is expected to bring {value:.2f} x the progress a"
                " second of plain GRPO (plan.preset none); prune where previews rank better, preview cheaper, or take"
                " plan.preset auto"
            )

    def forget_audits(self) -> None:
        """Measure previews anew: audits of other rewards or previews do not compare. The plan in force stays."""
        self._self_checks.forget_agreement()
        self.judge.forget()
        self._left_out = self._work
        self.plan_value = None
        self.probe = _probe(self._config)

    def begin_anew(self) -> None:
        """Take the configuration's own plan: the one in force was chosen from another, or for other steps."""
        self._self_checks.forget_agreement()
        self.plan = resolve_plan(self._config)
        self.plan_value = None

    def state_dict(self) -> PlanMonitorState:
        return {
            "plan": plan_state(self.plan),
            "judge": self.judge.state_dict(),
            "probe": None if self.probe is None else self.probe.state_dict(),
            "plan_value": self.plan_value,
            "left_out": self._left_out.state_dict(),
        }

    def load_state_dict(self, state: PlanMonitorState, work: Work) -> None:
        """Go on from a saved state, after so much work. Of an older progrpo's, none prices a plan."""
        self._work = work
        self._left_out = Work.of(state["left_out"]) if "left_out" in state else work
        plan = plan_from(state["plan"])
        follows, same_group = self._config.plan.follows_audits, plan.group_size == self.plan.group_size
        if follows and (same_group or self._config.plan.preset == "auto"):
            self.plan = plan
        if self.plan != plan:
            self._self_checks.forget_agreement()
        self.judge.load_state_dict(state["judge"])
        if self.probe is not None and state["probe"] is not None:
            self.probe.load_state_dict(state["probe"])
        self.plan_value = state["plan_value"] if self.plan == plan else None


def _probe(config: Config) -> Probe | None:
    """A new probe; None for a run without one."""
    return Probe(config.sampling.num_inference_steps, config.seed) if config.preview.probe else None
