"""One run, iteration by iteration. It calls the stages and holds no math."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from progrpo.config import Config, trained_items
from progrpo.objectives.advantage import group_statistics
from progrpo.policies.base import Policy
from progrpo.prompts.order import PromptOrder
from progrpo.rewards.mixture import RewardMixture
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import Sampling
from progrpo.rollout.sharding import NOT_SHARDED, GroupSharding
from progrpo.rollout.waves import in_waves
from progrpo.tracking.records import Metrics, metric
from progrpo.training import checks
from progrpo.training.audit import Audit, audit
from progrpo.training.build import sampling_from
from progrpo.training.distributed import Ranks, Tally
from progrpo.training.learner import Learner
from progrpo.training.memory import Microbatch
from progrpo.training.plan_monitor import PlanMonitor
from progrpo.training.state import TrainerState
from progrpo.training.totals import FailureCounter, Totals, summed_over
from progrpo.training.watch import SelfChecks
from progrpo.types import Cost, Prompt, Rollout

_Sampled = TypeVar("_Sampled")
_STAGES = ("sample", "preview", "reward", "update", "audit")


@dataclass(frozen=True)
class Iteration:
    """What a zero-based iteration leaves: its metrics, this process' rollout, and in the main process an audit if due."""

    number: int
    record: Metrics
    rollout: Rollout
    audit: Audit | None


@dataclass(frozen=True)
class _Batch:
    """The prompts of an iteration, this process' places among them, and the key of the iteration's noise."""

    prompts: Sequence[Prompt]
    slots: Tensor
    key: NoiseKey


class Trainer:
    """Trains a policy. All that changes is in `state_dict`; noise and windows follow from the iteration's number."""

    def __init__(self, config: Config, policy: Policy, reward: RewardMixture, order: PromptOrder, ranks: Ranks) -> None:
        _check_processes(config, reward, ranks)
        self.policy = policy
        self.reward = reward
        self.order = order
        self.ranks = ranks
        ranks.drain_peer_calls = policy.drain_peer_calls
        self.checks = SelfChecks(config.watch)
        self.plan_monitor = PlanMonitor(config, ranks, self.checks)
        self.learner = Learner(config, policy, reward.weights, ranks, self.checks)
        self.sampling_microbatch = Microbatch(config.sampling.rows_per_call, "sampling.microbatch")
        self.iteration = 0
        """The number of iterations that are done."""
        self.totals = Totals()
        self.failures = FailureCounter(reward, self.totals, ranks, config.reward.max_missing)
        self.untouched = True
        """Whether nothing but totals has changed since the last iteration: until the next one has its scores."""
        self._config = config
        self._sharding: GroupSharding = ranks if config.prompts.split_groups else NOT_SHARDED
        self._frozen = checks.fingerprint(policy)
        _agree_on_batch_invariance(self)

    @property
    def config(self) -> Config:
        """The configuration, with the microbatches that fit into memory."""
        config = self._config
        sampling, optim = self.sampling_microbatch.size, self.learner.updater.microbatch.size
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
    def evaluated_weights(self) -> str:
        """The weights that evaluation and the saved LoRA use."""
        return self.learner.evaluated_weights

    @property
    def sampling(self) -> Sampling:
        """How the next iteration samples."""
        return sampling_from(self.config, self.policy, self.learner.objective.settings.stores, self.iteration)

    @property
    def sampler(self) -> Sampler:
        """The sampler of the next iteration."""
        monitor = self.plan_monitor
        return Sampler(
            policy=self.policy,
            reward=self.reward,
            sampling=self.sampling,
            plan=monitor.plan,
            selector=monitor.selector,
            preview_settings=self._config.preview,
            probe=monitor.probe,
            sharding=self._sharding,
        )

    def predicted(self, iterations: int = 1) -> Cost:
        """The cost that the plan in force predicts for so many iterations, over all processes and without audits."""
        return self.plan_monitor.predicted(iterations)

    def step(self) -> Iteration:
        """Run the next iteration."""
        start, meter, audit_meter = time.perf_counter(), Meter(), Meter()
        iteration, sampling = self.iteration, self.sampling
        self.totals.predicted += self.predicted()
        batch = self._next_batch()
        rolled = self.sample(lambda sampler, meter: self._roll_out(batch, sampler, meter), meter)
        lost = self.totals.lost
        failed = self.failures.check(f"iteration {iteration + 1}")
        lost = self.totals.lost - lost
        self.untouched = False
        self._observe(batch.slots, rolled)
        with meter.stage("update"):
            updated = self.learner.learn(rolled, sampling, batch.key, iteration)
        meter.count(trained_steps=updated.items)
        found = None
        audit_due = self.plan_monitor.is_audit_due(iteration)
        if audit_due and self.ranks.is_main:
            with meter.stage("audit"):
                found = self.sample(lambda sampler, meter: self._audit(batch, sampler, meter), audit_meter)
        if audit_due:
            # counted with the next iteration's they would be unknown to a run that is resumed here; no audit is trained
            # on
            self.failures.collect()
        record = self._record(updated.tally, meter, time.perf_counter() - start)
        audited = summed_over(self.ranks, audit_meter.cost)
        self.totals.audited += audited
        record |= {"audit/nfe": audited.nfe} if found is not None else {}
        record |= {f"reward/failed@{name}": count for name, count in failed.items() if count}
        record |= {"rollout/missing_pictures": lost} if lost else {}
        self.checks.check_rewards(iteration + 1, record, len(batch.prompts))
        record |= self.plan_monitor.learn(iteration, rolled, found, self.totals)
        self._add_seconds_since(start, record)
        self.iteration, self.untouched = iteration + 1, True
        return Iteration(iteration, record, rolled, found)

    def _next_batch(self) -> _Batch:
        count = self._config.prompts.per_iteration
        slots = torch.arange(count) if self._config.prompts.split_groups else self.ranks.deal(count)
        prompts = self.order.prompts_for(self.iteration, count)
        return _Batch(prompts, slots, NoiseKey(self._config.seed, self.iteration))

    def sample(self, call: Callable[[Sampler, Meter], _Sampled], meter: Meter) -> _Sampled:
        """Return what `call` samples, with smaller microbatches where memory runs out: noise does not depend on them."""

        def attempt(size: int) -> _Sampled:
            its_meter = Meter()  # an attempt that fails is not what the plan counts
            sampled = call(self.sampler.with_max_batch(size), its_meter)
            meter.add(its_meter)
            return sampled

        with self.policy.weights(self.learner.objective.settings.rollout_weights):
            return self.sampling_microbatch.run(attempt, self.sampling_refusal)

    @property
    def sampling_refusal(self) -> str | None:
        """The reason why a process that runs out of memory while sampling cannot try again; None where it can."""
        if self._sharding.world == 1 and self.policy.drain_peer_calls is None:
            return None
        return (
            "out of memory while processes work together (model.shard, prompts.split_groups), so that one of them"
            " cannot try again; lower sampling.microbatch"
        )

    def _roll_out(self, batch: _Batch, sampler: Sampler, meter: Meter) -> Rollout:
        prompts = [batch.prompts[slot] for slot in batch.slots.tolist()]
        return in_waves(sampler, prompts, batch.slots, batch.key, meter, self._config.reward.waves)

    def _audit(self, batch: _Batch, sampler: Sampler, meter: Meter) -> Audit:
        """Audit a prompt of the iteration, under a slot that no trained group has."""
        prompt = batch.prompts[self.plan_monitor.audited_place(self.iteration)]
        return audit(sampler, prompt, len(batch.prompts), batch.key, meter)

    def _observe(self, slots: Tensor, rolled: Rollout) -> None:
        """Tell the order how far each group's rewards differed, alike on every process."""
        own = rolled.finalists.value_N, slots[rolled.finalists.group_N]
        rewards, slot = (torch.cat(shares) for shares in zip(*self.ranks.gather([own]), strict=True))
        statistics = group_statistics(rewards, slot, self._config.prompts.per_iteration)
        signals = statistics.std_P.where(statistics.count_P >= 2, torch.nan)
        self.order.observe(self.iteration, signals.tolist())

    def _record(self, tally: Tally, meter: Meter, seconds: float) -> Metrics:
        """The metrics of an iteration that took so many seconds; its costs are added to the totals."""
        spent = summed_over(self.ranks, meter.cost)
        self.totals.counted += spent
        stages = {name: meter.seconds.get(name, 0.0) for name in _STAGES}
        in_stages = sum(stages.values())
        stages["other"] = max(0.0, seconds - in_stages)
        stages["overlapped"] = max(0.0, in_stages - seconds)
        self.totals.add_seconds(stages)
        record: Metrics = {"iteration": self.iteration, "seconds": seconds, **tally.over(self.ranks)}
        record |= self.order.metrics()
        record |= {f"rollout/{name}": value for name, value in asdict(spent).items()}
        record["rollout/survivors"] = self.plan.survivors * self._config.prompts.per_iteration
        record["update/lr"] = self.learner.learning_rate
        return record | {f"time/{name}": value for name, value in stages.items()}

    def _add_seconds_since(self, start: float, record: Metrics) -> None:
        """Add to the record and the totals the seconds that passed since the record was made."""
        recorded, other = metric(record, "seconds"), metric(record, "time/other")
        assert recorded is not None and other is not None
        later = time.perf_counter() - start - recorded
        record |= {"seconds": recorded + later, "time/other": other + later}
        self.totals.add_seconds({"other": later})

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
        self.plan_monitor.load_state_dict(state)
        self.checks.load_state_dict(state["checks"])
        self.iteration = state["iteration"]


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


def _agree_on_batch_invariance(trainer: Trainer) -> None:
    """Measure on every process whether the network is batch-invariant, and take it for all only where all are.

    It is called with one row, with a few, and with as many as the run has in a call.
    """
    if trainer.learner.objective.settings.stores == "latents":
        return
    config, plan = trainer.config, trainer.plan
    prompts = config.prompts.per_iteration
    rows = min(config.sampling.rows_per_call, prompts * plan.group_size)
    items = min(config.optim.items_per_pass, prompts * plan.survivors * trained_items(config))
    branches = 2 if config.sampling.in_pairs else 1
    measured = trainer.policy.measure_batch_invariance([1, branches * rows], [3, branches * items])
    trainer.policy.batch_invariant = all(trainer.ranks.gather([measured]))
