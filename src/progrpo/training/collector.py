"""The collector of a run: it samples the rollouts and audits of iterations, within memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from progrpo.config import Config
from progrpo.objectives.settings import LossSettings
from progrpo.policies.base import Policy
from progrpo.preferences.recorded import recorded_pairs
from progrpo.rewards.base import Scorer
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.rollout import rollout
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sharding import NOT_SHARDED, GroupSharding
from progrpo.rollout.waves import in_waves
from progrpo.training.audit import Audit, GroupWatch
from progrpo.training.build import sampling_from
from progrpo.training.distributed import Ranks
from progrpo.training.latent_reward import latent_reward
from progrpo.training.memory import Microbatch
from progrpo.training.plan_monitor import PlanMonitor
from progrpo.types import Prompt, Rollout

_Sampled = TypeVar("_Sampled")


@dataclass(frozen=True)
class Batch:
    """The prompts of a zero-based iteration, this process' slots among them, and the key of the iteration's noise."""

    iteration: int
    prompts: Sequence[Prompt]
    slots: Tensor
    key: NoiseKey


class Collector:
    """The sampling of rollouts and audits by the plan in force.

    `microbatch` is the number of rows of a call, halved where memory runs out.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        reward: Scorer,
        loss: LossSettings,
        plan_monitor: PlanMonitor,
        ranks: Ranks,
    ) -> None:
        self.microbatch = Microbatch(config.sampling.rows_per_call, "sampling.microbatch")
        self._config = config
        self._policy = policy
        self._reward = reward
        self._loss = loss
        self._latent_reward = latent_reward(config.preview, policy)
        self._plan_monitor = plan_monitor
        self._sharding: GroupSharding = ranks if config.prompts.split_groups else NOT_SHARDED
        self._peers: GroupSharding = ranks if plan_monitor.plan.keep_groups is not None else NOT_SHARDED

    def sampler(self, iteration: int) -> Sampler:
        """The sampler of a zero-based iteration."""
        sampler = Sampler(
            policy=self._policy,
            reward=self._reward,
            sampling=sampling_from(self._config, self._policy, self._loss.stores, iteration),
            plan=self._plan_monitor.plan,
            selector=self._plan_monitor.selector,
            preview_settings=self._config.preview,
            probe=self._plan_monitor.probe,
            latent_reward=self._latent_reward,
            sharding=self._sharding,
            peers=self._peers,
        )
        return sampler.with_max_batch(self.microbatch.size)

    def watched_slot(self, iteration: int, prompts: int) -> int | None:
        """The slot of the group that is watched if this zero-based iteration of so many prompts is audited.

        None where the plan does not finish and train on every member of a group here: its audit is a group more.
        """
        plan = self._plan_monitor.plan
        if plan.survivors < plan.group_size or plan.keep_groups is not None or self._sharding.world > 1:
            return None
        return self._plan_monitor.audited_place(iteration) % prompts

    def watch(self, batch: Batch, reward: Scorer) -> GroupWatch | None:
        """The watch of a group of this process, for an audit that costs its previews alone, scored by `reward`.

        None where the audit is a group more.
        """
        slot = self.watched_slot(batch.iteration, len(batch.prompts))
        return None if slot is None else GroupWatch(batch.prompts[slot], slot, reward)

    def rollout(self, batch: Batch, meter: Meter, watch: GroupWatch | None = None) -> Rollout:
        """The rollout of this process' prompts, one of whose groups may be watched, or their recorded pairs."""
        prompts = [batch.prompts[slot] for slot in batch.slots.tolist()]
        if self._config.prompts.pairs:
            with meter.stage("sample"):
                return recorded_pairs(self._policy, prompts, batch.slots)

        def sample(sampler: Sampler, own_meter: Meter) -> Rollout:
            if watch is not None:
                sampler = watch.begin(sampler)
            return in_waves(sampler, prompts, batch.slots, batch.key, own_meter, self._config.reward.waves)

        return self._within_memory(sample, batch.iteration, meter)

    def audit(self, batch: Batch, reward: Scorer, meter: Meter) -> Audit:
        """The audit of a prompt of the iteration by `reward`, under a slot that no trained group has."""
        slot = len(batch.prompts)
        prompt = batch.prompts[self._plan_monitor.audited_place(batch.iteration) % slot]
        watch = GroupWatch(prompt, slot, reward)

        def sample(sampler: Sampler, own_meter: Meter) -> Audit:
            record = replace(sampler.sampling.record, graphs=False)
            sampling = replace(sampler.sampling, record=record)
            sampler = watch.begin(replace(sampler, reward=reward, sampling=sampling))
            rolled = rollout(sampler, [prompt], torch.tensor([slot]), batch.key, own_meter)
            own_meter.add(watch.meter)
            return watch.audit(rolled, batch.key)

        return self._within_memory(sample, batch.iteration, meter)

    def _within_memory(self, sample: Callable[[Sampler, Meter], _Sampled], iteration: int, meter: Meter) -> _Sampled:
        """The result of `sample`, with smaller microbatches where memory runs out: noise does not depend on them."""

        def attempt(size: int) -> _Sampled:
            own_meter = Meter()  # an attempt that fails is not what the plan counts
            sampled = sample(self.sampler(iteration), own_meter)
            meter.add(own_meter)
            return sampled

        with self._policy.weights(self._loss.rollout_weights):
            return self.microbatch.run(attempt, self.refusal)

    @property
    def refusal(self) -> str | None:
        """The reason why a process that runs out of memory while sampling cannot try again; None where it can."""
        if self._sharding.world == self._peers.world == 1 and self._policy.drain_peer_calls is None:
            return None
        return (
            "out of memory while processes work together (model.shard, prompts.split_groups, plan.keep_groups), so that"
            " one of them cannot try again; lower sampling.microbatch"
        )
