"""One run, iteration by iteration. It calls the stages and holds no math."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from progrpo.config import Config, resolve_plan, trained_items
from progrpo.objectives.advantage import group_statistics
from progrpo.packing import balanced_size
from progrpo.policies.base import Policy
from progrpo.prompts.order import PromptOrder
from progrpo.rewards.mixture import RewardMixture
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan
from progrpo.rollout.rollout import last_scores
from progrpo.rollout.sampler import Sampler
from progrpo.tracking.records import Metrics, metric
from progrpo.training import checks
from progrpo.training.audit import Audit
from progrpo.training.build import check_sampling
from progrpo.training.collector import Batch, Collector
from progrpo.training.distributed import Ranks, Tally
from progrpo.training.learner import Learner
from progrpo.training.plan_monitor import PlanMonitor
from progrpo.training.state import TrainerState
from progrpo.training.totals import FailureCounter, Totals, summed_over
from progrpo.training.watch import SelfChecks
from progrpo.types import Cost, Rollout

_STAGES = ("sample", "preview", "reward", "update", "audit")


@dataclass(frozen=True)
class Iteration:
    """The results of a zero-based iteration: metrics, this process' rollout, and the main process' audit if due."""

    number: int
    record: Metrics
    rollout: Rollout
    audit: Audit | None


class Trainer:
    """The trainer of a policy.

    All that changes is in `state_dict`; noise and windows follow from the iteration's number.
    """

    def __init__(self, config: Config, policy: Policy, reward: RewardMixture, order: PromptOrder, ranks: Ranks) -> None:
        _check_processes(config, reward, ranks)
        _check_stopped_groups(config, reward, ranks)
        check_sampling(config, policy)
        self.policy = policy
        self.reward = reward
        self.order = order
        self.ranks = ranks
        ranks.before_waiting = policy.drain_peer_calls
        self.checks = SelfChecks(config.watch)
        self.plan_monitor = PlanMonitor(config, ranks, self.checks)
        self.learner = Learner(config, policy, reward.weights, ranks, self.checks)
        self.collector = Collector(config, policy, reward, self.learner.objective.settings, self.plan_monitor, ranks)
        self.iteration = 0
        """The number of iterations that are done."""
        self.totals = Totals()
        self.failures = FailureCounter(reward, self.totals, ranks, config.reward.max_missing)
        self.untouched = True
        """Whether nothing but totals has changed since the last iteration: until the next one has its scores."""
        self._config = config
        self._frozen = checks.fingerprint(policy)
        _agree_on_batch_invariance(self)

    @property
    def config(self) -> Config:
        """The configuration, with the microbatches that fit into memory."""
        config = self._config
        sampling, optim = self.collector.microbatch.size, self.learner.updater.microbatch.size
        if sampling < config.sampling.rows_per_call:
            config = replace(config, sampling=replace(config.sampling, microbatch=sampling))
        if optim < config.optim.items_per_pass:
            config = replace(config, optim=replace(config.optim, microbatch=optim))
        return config

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self.plan_monitor.plan

    @property
    def sampler(self) -> Sampler:
        """The sampler of the next iteration."""
        return self.collector.sampler(self.iteration)

    def predicted(self) -> Cost:
        """The cost that the plan in force predicts for the next iteration, over all processes, without audits."""
        return self.plan_monitor.predicted(self.iteration)

    def step(self) -> Iteration:
        """Run the next iteration."""
        start = time.perf_counter()
        meter = Meter()
        audit_meter = Meter()
        batch = self._next_batch()
        sampling = self.sampler.sampling
        is_audited = self.plan_monitor.is_audit_due(batch.iteration)
        reward_of_audits = self.failures.reward_of_audits
        watch = self.collector.watch(batch, reward_of_audits) if is_audited and self.ranks.is_main else None
        rolled = self.collector.rollout(batch, meter, watch)
        lost_before = self.totals.lost
        failed = self.failures.check(f"iteration {batch.iteration + 1}")
        lost = self.totals.lost - lost_before
        self.untouched = False
        self._observe(batch.slots, rolled)
        with meter.stage("update"):
            updated = self.learner.learn(rolled, sampling, batch.key, batch.iteration)
        meter.count(trained_steps=updated.items)
        audit = None
        if is_audited:
            if watch is not None:
                audit = watch.audit(rolled, batch.key)
                audit_meter.add(watch.meter)
                meter.seconds["audit"] = sum(watch.meter.seconds.values())
            elif self.ranks.is_main:
                with meter.stage("audit"):
                    audit = self.collector.audit(batch, reward_of_audits, audit_meter)
            # counted with the next iteration, they would be missing from the checkpoint of this one
            self.failures.collect_of_audits()
        record = self._record(updated.tally, meter, time.perf_counter() - start)
        audited = summed_over(self.ranks, audit_meter.cost)
        self.totals.audited += audited
        record |= {"audit/nfe": audited.nfe} if audit is not None else {}
        record |= {f"reward/failed@{name}": count for name, count in failed.items() if count}
        record |= {"rollout/missing_pictures": lost} if lost else {}
        self.checks.check_rewards(batch.iteration + 1, record, self.plan.groups_left(len(batch.prompts)))
        noise_scale = self.learner.updater.noise_scale
        record |= self.plan_monitor.learn(batch.iteration, rolled, audit, self.totals, noise_scale)
        _add_seconds_since(start, record, self.totals)
        self.iteration += 1
        self.untouched = True
        return Iteration(batch.iteration, record, rolled, audit)

    def _next_batch(self) -> Batch:
        count = self._config.prompts.per_iteration
        split = self._config.prompts.split_groups
        is_audited = self.plan_monitor.is_audit_due(self.iteration)
        watched = self.collector.watched_slot(self.iteration, count) if is_audited else None
        # the main process makes the audit, of the same group whatever the number of processes
        slots = torch.arange(count) if split else self.ranks.deal(count, to_main=watched or 0)
        prompts = self.order.prompts_for(self.iteration, count)
        return Batch(self.iteration, prompts, slots, NoiseKey(self._config.seed, self.iteration))

    def _observe(self, slots: Tensor, rolled: Rollout) -> None:
        """Tell the order how far each group's rewards differed, alike on every process.

        A group that was stopped whole has previews in their place, or its prompt would be drawn as before.
        """
        scores_N, group_N = rolled.finalists.value_N, rolled.finalists.group_N
        if self.plan.keep_groups is not None:
            scores_N, group_N = last_scores(rolled)
        own = scores_N, slots[group_N]
        rewards, slot = (torch.cat(shares) for shares in zip(*self.ranks.gather([own]), strict=True))
        statistics = group_statistics(rewards, slot, self._config.prompts.per_iteration)
        signals = statistics.std_P.where(statistics.count_P >= 2, torch.nan)
        self.order.observe(self.iteration, signals.tolist())

    def _record(self, tally: Tally, meter: Meter, seconds: float) -> Metrics:
        """The metrics of an iteration that took so many seconds; its costs are added to the totals."""
        spent = summed_over(self.ranks, meter.cost)
        self.totals.counted += spent
        self.totals.predicted += self.predicted()
        self.totals.unpruned += self.plan_monitor.nfe_unpruned
        stages = {name: meter.seconds.get(name, 0.0) for name in _STAGES}
        in_stages = sum(stages.values())
        stages["other"] = max(0.0, seconds - in_stages)
        stages["overlapped"] = max(0.0, in_stages - seconds)
        self.totals.add_seconds(stages)
        record: Metrics = {"iteration": self.iteration, "seconds": seconds, **tally.over(self.ranks)}
        record |= self.order.metrics()
        record |= {f"rollout/{name}": value for name, value in asdict(spent).items()}
        record["rollout/survivors"] = self.plan.trained(self._config.prompts.per_iteration)
        record["update/lr"] = self.learner.learning_rate
        if record.keys() & {"update/gradient_noise", "update/gradient_member_noise"}:
            record["update/noise_scale"] = self.learner.updater.noise_scale.prompts
        return record | {f"time/{name}": value for name, value in stages.items()}

    def check_frozen(self) -> None:
        """SelfCheckError where a frozen weight has moved."""
        checks.check_frozen(self.policy, self._frozen)

    def state_dict(self) -> TrainerState:
        """The main process' state is whole; all must ask for it, since some weights may be shared out."""
        return {
            "iteration": self.iteration,
            "order": self.order.state_dict(),
            "totals": self.totals.state_dict(),
            "checks": self.checks.state_dict(),
            **self.learner.state_dict(),
            **self.plan_monitor.state_dict(),
        }

    def load_state_dict(self, state: TrainerState) -> None:
        """Go on from a saved state, by this trainer's own configuration where it is another than the saved state's."""
        self.learner.load_state_dict(state)
        self.order.load_state_dict(state["order"])
        self.totals.load_state_dict(state["totals"])
        self.checks.load_state_dict(state["checks"])
        self.plan_monitor.load_state_dict(state, self.totals.work)  # forgets checks of another plan
        self.iteration = state["iteration"]
        if "unpruned" not in state["totals"]:  # of an older progrpo
            self.totals.unpruned = self.plan_monitor.nfe_unpruned * self.iteration


def _add_seconds_since(start: float, record: Metrics, totals: Totals) -> None:
    """Add to the record and the totals the seconds that passed since the record was made."""
    recorded, other = metric(record, "seconds"), metric(record, "time/other")
    assert recorded is not None and other is not None
    later = time.perf_counter() - start - recorded
    record |= {"seconds": recorded + later, "time/other": other + later}
    totals.add_seconds({"other": later})


def _check_processes(config: Config, reward: RewardMixture, ranks: Ranks) -> None:
    """ValueError for an iteration that cannot be shared out among the processes."""
    if config.prompts.per_iteration < ranks.world and not config.prompts.split_groups:
        raise ValueError(
            f"prompts.per_iteration is {config.prompts.per_iteration}, fewer than the {ranks.world} processes; give"
            " each at least one, or have them share the groups (prompts.split_groups)"
        )
    if config.prompts.split_groups and reward.groupwise:
        raise ValueError(
            f"prompts.split_groups must be false for the reward {reward.groupwise}, which compares the pictures of a"
            " whole group"
        )


def _check_stopped_groups(config: Config, reward: RewardMixture, ranks: Ranks) -> None:
    """ValueError for groups that are stopped by scores that do not compare between groups."""
    if resolve_plan(config).keep_groups is None:
        return
    if reward.groupwise:
        raise ValueError(
            f"plan.keep_groups must be empty for the reward {reward.groupwise}, which compares the pictures of one"
            " group alone"
        )
    if config.reward.noise and ranks.world > 1:
        raise ValueError(
            f"plan.keep_groups must be empty for reward.noise in {ranks.world} processes: the scores of each are"
            " estimated from its own groups, and do not compare"
        )


def _agree_on_batch_invariance(trainer: Trainer) -> None:
    """Measure on every process whether the network is batch-invariant, and take it for all only where all are.

    It is called with one row, with a few, and with as many as the run has in its calls before and after each prune.
    """
    if trainer.learner.objective.settings.stores == "latents":
        return
    config, plan = trainer.config, trainer.plan
    prompts = config.prompts.per_iteration
    branches = 2 if config.sampling.in_pairs else 1
    living = sorted({plan.rows_at(step, prompts) for step in range(config.sampling.num_inference_steps)})
    called = [branches * balanced_size(rows, config.sampling.rows_per_call) for rows in living]
    items = min(config.optim.items_per_pass, plan.trained(prompts) * trained_items(config))
    measured = trainer.policy.measure_batch_invariance([1, *called], [3, branches * items])
    trainer.policy.batch_invariant = all(trainer.ranks.gather([measured]))
