"""One run, iteration by iteration. It calls the stages and holds no math."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from progrpo.config import Config, learning_rate, microbatch, resolve_plan, trained_items
from progrpo.objectives.advantage import group_statistics
from progrpo.objectives.base import Experience
from progrpo.policies.base import Policy
from progrpo.policies.sharded import all_gathered, as_shared
from progrpo.prompts.order import PromptOrder
from progrpo.rewards.base import Scorer
from progrpo.rewards.mixture import Failures, RewardMixture
from progrpo.rollout.denoise import Sampling
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.probe import probe_examples
from progrpo.rollout.prune import SELECTORS
from progrpo.rollout.rollout import rollout
from progrpo.rollout.sharding import NOT_SHARDED, GroupSharding
from progrpo.rollout.waves import in_waves
from progrpo.training import checks
from progrpo.training.audit import Audit, audit
from progrpo.training.build import objective_from, optimizer_from, previewing, sampling_from
from progrpo.training.distributed import Ranks, Tally
from progrpo.training.errors import SelfCheckError
from progrpo.training.loss_scale import LossScale
from progrpo.training.memory import halved, is_out_of_memory
from progrpo.training.pictures import group_diversity
from progrpo.training.plan_judge import PlanJudge, plan_from, prompt_cost
from progrpo.training.update import learn_from, update
from progrpo.training.watch import SelfChecks
from progrpo.training.zero import PartitionedAdamW
from progrpo.types import Cost, Prompt, Rollout

EMA = "ema"
_Sampled = TypeVar("_Sampled")
_STAGES = ("sample", "preview", "reward", "update", "audit")


@dataclass
class Totals:
    """What the run has spent so far, over all processes. Audits have their own line."""

    counted: Cost = field(default_factory=Cost)
    predicted: Cost = field(default_factory=Cost)
    """What the plan in force said of each iteration before it ran."""
    audited: Cost = field(default_factory=Cost)
    seconds: dict[str, float] = field(default_factory=dict)

    asked: dict[str, int] = field(default_factory=dict)
    """Scores of each reward, evaluations and audits included; how many of them are missing, and the last error that said why."""
    missing: dict[str, int] = field(default_factory=dict)
    last_error: str | None = None
    lost: int = 0
    """Pictures that were none, previews, evaluations and audits included; and why the last of them was."""
    fault: str = ""

    def add_failures(self, found: Sequence[Failures]) -> None:
        for f in found:
            for name in f.asked:
                self.asked[name] = self.asked.get(name, 0) + f.asked[name]
                self.missing[name] = self.missing.get(name, 0) + f.missing[name]
            self.last_error = f.last_error or self.last_error
            self.lost, self.fault = self.lost + f.lost, f.fault or self.fault

    def add_seconds(self, spent: Mapping[str, float]) -> None:
        for stage, seconds in spent.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counted, self.predicted, self.audited = (
            Cost(**state[name]) for name in ("counted", "predicted", "audited")
        )
        self.seconds, self.asked, self.missing = (dict(state[name]) for name in ("seconds", "asked", "missing"))
        self.last_error = state["last_error"]
        self.lost, self.fault = state.get("lost", 0), state.get("fault", "")


@dataclass(frozen=True)
class Iteration:
    """What one iteration leaves: its record for metrics.jsonl, the main process' rollout, and an audit if one was due."""

    record: dict[str, Any]
    rollout: Rollout
    audit: Audit | None


class Trainer:
    """Everything that changes during a run is in `state_dict`; noise and windows follow from the iteration's number."""

    def __init__(self, config: Config, policy: Policy, reward: RewardMixture, order: PromptOrder, ranks: Ranks) -> None:
        if config.prompts.per_iteration < ranks.world and not config.prompts.split_groups:
            raise ValueError(
                f"prompts.per_iteration is {config.prompts.per_iteration}, fewer than the {ranks.world} processes;"
                " give each at least one, or have them share the groups (prompts.split_groups)"
            )
        if config.prompts.split_groups and reward.groupwise:
            raise ValueError(
                f"prompts.split_groups must be false for the reward {reward.groupwise}, which compares the pictures of a whole group"
            )
        self.config, self.policy, self.reward, self.order, self.ranks = config, policy, reward, order, ranks
        ranks.drain_peer_calls = policy.drain_peer_calls
        self.plan, self.how, self.judge = resolve_plan(config), previewing(config), PlanJudge(config)
        self.select = SELECTORS[config.plan.selector]
        self.objective = objective_from(config, policy)
        self._agree_on_batch_invariance()
        self.optimizer = optimizer_from(config.optim, policy.trainable.values(), ranks.zero)
        self.loss_scale = LossScale(config.model.dtype == "float16")
        self.iteration, self.totals = 0, Totals()
        self.untouched = True
        """Whether nothing but totals has changed since the last iteration ended: until the next one has its scores."""
        for name in (*([EMA] if config.optim.ema_decay > 0 else []), *self.objective.settings.averages):
            policy.named_weights.snapshot(name)
        self._frozen, self._checked = checks.fingerprint(policy), False
        watch = config.watch
        self.checks = SelfChecks(watch.max_skipped, watch.flat_iterations, watch.still_iterations, watch.lost_agreement)

    def _agree_on_batch_invariance(self) -> None:
        """Measure it on every process, in calls of one row, a few, and as many as the run makes; all go by the least of them."""
        if self.objective.settings.stores == "latents":
            return
        sampling, prompts = self.config.sampling, self.config.prompts.per_iteration
        rows = min(microbatch(sampling), prompts * self.plan.group_size)
        items = min(microbatch(self.config.optim), prompts * self.plan.survivors * trained_items(self.config))
        branches = 2 if sampling.in_pairs else 1
        measured = self.policy.measure_batch_invariance([1, branches * rows], [3, branches * items])
        self.policy.batch_invariant = all(self.ranks.gather([measured]))

    @property
    def evaluated_weights(self) -> str:
        """The weights that evaluation and the saved LoRA use."""
        return EMA if self.config.optim.ema_decay > 0 else "current"

    @property
    def _number(self) -> int:
        """Of the iteration that runs, as people are told it: counted from 1."""
        return self.iteration + 1

    @property
    def sampling(self) -> Sampling:
        """How the next iteration samples."""
        return sampling_from(self.config, self.policy, self.objective.settings.stores, self.iteration)

    def predicted(self, iterations: int = 1) -> Cost:
        """What the plan in force says that so many iterations cost, over all processes and without audits."""
        probed = self.how.probed([point.step for point in self.plan.active_points()])
        return prompt_cost(self.config, self.plan, probed) * (self.config.prompts.per_iteration * iterations)

    def step(self) -> Iteration:
        """Run the next iteration."""
        start, meter, key = time.perf_counter(), Meter(), NoiseKey(self.config.seed, self.iteration)
        self.totals.predicted += self.predicted()
        prompts = self.order.prompts_for(self.iteration, self.config.prompts.per_iteration)
        slots = torch.arange(len(prompts)) if self.config.prompts.split_groups else self.ranks.deal(len(prompts))
        sampling = self.sampling
        with self.policy.weights(self.objective.settings.rollout_weights):
            rolled = self.within_memory(lambda m: self._roll_out(prompts, slots, self.sampling, key, m), meter)
        lost = self.totals.lost
        failed = self.check_failures(f"iteration {self._number}")
        lost = self.totals.lost - lost
        self.untouched = False
        self._observe(slots, rolled)
        with meter.stage("update"):
            tally = self._update(rolled, sampling, key, meter)
        audited, found = Meter(), None
        if self._audit_due() and self.ranks.is_main:
            with meter.stage("audit"):
                found = self._audit(prompts, key, audited)
        if self._audit_due():
            # with the next iteration's they would be unknown to a run that is resumed here; nothing is trained on an audit
            self._collect_failures()
        record = self._record(tally, meter, audited, found, time.perf_counter() - start)
        record |= {f"reward/failed@{name}": count for name, count in failed.items() if count}
        record |= {"rollout/missing_pictures": lost} if lost else {}
        self.checks.rewards(self._number, record, len(prompts))
        self._learn_of_previews(rolled, found)
        record |= self._judge_plan(found)
        self._check_previews(record)
        since = time.perf_counter() - start - record["seconds"]
        record |= {"seconds": record["seconds"] + since, "time/other": record["time/other"] + since}
        self.totals.add_seconds({"other": since})
        self.iteration, self.untouched = self.iteration + 1, True
        return Iteration(record, rolled, found)

    @property
    def _sharding(self) -> GroupSharding:
        """Those who sample a group."""
        return self.ranks if self.config.prompts.split_groups else NOT_SHARDED

    def within_memory(self, sample: Callable[[Meter], _Sampled], meter: Meter) -> _Sampled:
        """What `sample` gives, with half of `config`'s microbatch where memory runs out: noise knows whose it is, so it is the same."""
        while True:
            its_meter = Meter()  # what did not come to an end was not what the plan counts
            try:
                sampled = sample(its_meter)
                meter.add(its_meter)
                return sampled
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self._sharding.world > 1 or self.policy.drain_peer_calls:  # the others are in the midst of it
                    raise SelfCheckError(
                        "out of memory while processes work together (model.shard, prompts.split_groups), so that one of them cannot"
                        " try again; lower sampling.microbatch"
                    ) from error
            wanted = self.config.sampling
            smaller = halved(microbatch(wanted), "sampling.microbatch")
            self.config = replace(self.config, sampling=replace(wanted, microbatch=smaller))

    def _roll_out(
        self, prompts: Sequence[Prompt], slots: Tensor, sampling: Sampling, key: NoiseKey, meter: Meter
    ) -> Rollout:
        def sample(reward: Scorer, places: Tensor, its_meter: Meter) -> Rollout:
            own = slots[places]
            chosen = [prompts[i] for i in own.tolist()]
            parts = self.plan, sampling, self.select, key, its_meter, self.how, self._sharding
            return rollout(self.policy, reward, chosen, own, *parts)

        return in_waves(sample, self.reward, len(slots), self.config.reward.waves, meter)

    def _update(self, rolled: Rollout, sampling: Sampling, key: NoiseKey, meter: Meter) -> Tally:
        wanted, clip = self.config.objective, self.objective.settings.adv_clip_max
        weights, quorum, diverse = self.reward.weights, self.config.reward.quorum, Tally()
        there = rolled.pictures.there_N.numpy()
        if (
            found := group_diversity(rolled.pictures.images_NHWC.numpy()[there], rolled.group_N.numpy()[there])
        ) is not None:
            diverse.add("rollout/diversity", found * len(rolled.prompts), len(rolled.prompts))
        sharding = self._sharding
        experience, tally = learn_from(rolled, sampling, key, wanted, clip, self.ranks, weights, quorum, sharding)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.iteration)
        optim = self.config.optim
        learning = self.policy, self.objective, self.optimizer, experience, optim, self.ranks
        seen, items, enough = update(*learning, self.loss_scale)
        if enough < microbatch(optim):
            self.config = replace(self.config, optim=replace(optim, microbatch=enough))
        meter.count(trained_steps=items)
        tally.merge(seen)
        tally.merge(diverse)
        if self.config.optim.ema_decay > 0:
            self.policy.named_weights.update(EMA, self.config.optim.ema_decay)
        for name, average in self.objective.settings.averages.items():
            self.policy.named_weights.update(name, average.decay(self.iteration + 1))
        skipped = int(seen.maxima["update/skipped"])
        self.checks.updates(self._number, skipped, self.config.optim.updates_per_rollout)
        taught = self.ranks.sum(torch.tensor(float(items))).item() > 0 and not skipped
        self.checks.weights(self._number, checks.sum_of_trained(self.policy), taught)
        if taught and not self._checked:
            self._check_first_update(seen, experience)
        return tally

    def _check_first_update(self, seen: Tally, experience: Experience) -> None:
        """Once in the life of this object, so again after a resume."""
        self._checked = True
        if "update/on_policy_deviation" in seen.maxima:
            assert self.objective.clip_range is not None
            rounding = checks.rounding_between(self.policy, self.objective)
            checks.check_ratio(seen.maxima["update/on_policy_deviation"], self.objective.clip_range, rounding)
        if "reference" not in self.policy.named_weights:
            return  # a resumed run that let it go after these checks
        checks.check_moved(self.policy)
        if len(experience):
            checks.check_bound(self.policy, experience)
        self.ranks.join()  # the others may be at it still, and need this process' part of the reference
        if self.config.model.weights == "full" and not self.objective.settings.uses_reference:
            self.policy.named_weights.forget("reference")  # a copy of the whole denoiser that nothing asks for

    def check_failures(self, when: str) -> dict[str, int]:
        """How many scores of each reward are missing since this was last called, over all processes; more than allowed stop the run."""
        found = self._collect_failures()
        checks.check_failures(found, self.config.reward.max_missing, when)
        return {name: sum(f.missing[name] for f in found) for name in self.reward.weights}

    def _collect_failures(self) -> list[Failures]:
        """Those of all processes since this was last called, which are added to the totals."""
        found = self.ranks.gather([self.reward.failures()])
        self.totals.add_failures(found)
        return found

    def _audit_due(self) -> bool:
        """In this iteration; the main process makes it, and all know."""
        every = self.config.audit.every
        return every > 0 and (self.iteration + 1) % every == 0

    def _observe(self, slots: Tensor, rolled: Rollout) -> None:
        """Tell the order how far each group's rewards differed, on every process the same."""
        slot_F = slots[rolled.finalists.group_N]
        told = self.ranks.gather([(rolled.finalists.value_N, slot_F)])
        rewards, slot = (torch.cat(parts) for parts in zip(*told, strict=True))
        found = group_statistics(rewards, slot, self.config.prompts.per_iteration)
        self.order.observe(self.iteration, found.std_P.where(found.count_P >= 2, torch.nan).tolist())

    def _audit(self, prompts: Sequence[Prompt], key: NoiseKey, meter: Meter) -> Audit:
        """A prompt of this iteration, another place of it every time, under a slot that no trained group has."""
        count = len(prompts)
        prompt = prompts[self.iteration // self.config.audit.every % count]

        def sample(its_meter: Meter) -> Audit:
            parts = self.plan, self.sampling, self.select, key, its_meter, self.how
            return audit(self.policy, self.reward, prompt, count, *parts)

        with self.policy.weights(self.objective.settings.rollout_weights):
            return self.within_memory(sample, meter)

    def _learn_of_previews(self, rolled: Rollout, found: Audit | None) -> None:
        """The probe is watched on the audit before it learns from it, and knows the same on every process."""
        probe = self.how.probe
        if probe is None:
            return
        new = probe_examples(rolled.trajectories, rolled.condition, rolled.survivors.ranking_N)
        if found is not None:
            new |= found.lessons
        watched = self.ranks.gather([found.probe_agreement() if found is not None else None])
        for agreement in watched:
            if agreement is not None:
                probe.watch(agreement)
        everyones = {slot: lesson for told in self.ranks.gather([new]) for slot, lesson in told.items()}
        probe.learn([lesson for _, lesson in sorted(everyones.items())])  # in one order, whoever sampled which

    def _check_previews(self, record: Mapping[str, Any]) -> None:
        """Of the audit, if there was one; all processes hear of it."""
        if self._audit_due():
            found = [value for name, value in record.items() if name.startswith("preview/rank_correlation@")]
            self.checks.agreement(self._number, self.ranks.gather([found])[0])

    def _judge_plan(self, found: Audit | None) -> dict[str, Any]:
        """What the main process makes of the plan after an audit; every process takes the plan that it chooses."""
        if not self._audit_due():
            return {}
        if found is not None:
            self.judge.watch(found.used_agreement(), self.totals.counted, self.totals.seconds)
        verdict = self.ranks.gather([self.judge.verdict(self.plan, self.select, self.how) if found else None])[0]
        if verdict is None:
            return {}
        self.plan = verdict.plan
        return {"plan/value": verdict.plan_value, "plan/survivors": self.plan.survivors, "plan/path": verdict.path}

    def _record(
        self, tally: Tally, meter: Meter, audited: Meter, found: Audit | None, seconds: float
    ) -> dict[str, Any]:
        spent, watched = (self._over_ranks(m.cost) for m in (meter, audited))
        self.totals.counted += spent
        self.totals.audited += watched
        stages = {name: meter.seconds.get(name, 0.0) for name in _STAGES}
        stages["other"] = max(0.0, seconds - sum(stages.values()))
        stages["overlapped"] = max(0.0, sum(stages.values()) - seconds)
        self.totals.add_seconds(stages)
        record: dict[str, Any] = {"iteration": self.iteration, "seconds": seconds, **tally.over(self.ranks)}
        record |= self.order.metrics()
        record |= {f"rollout/{name}": value for name, value in asdict(spent).items()}
        record["rollout/survivors"] = self.plan.survivors * self.config.prompts.per_iteration
        record["update/lr"] = self.optimizer.param_groups[0]["lr"]
        record |= {f"time/{name}": value for name, value in stages.items()}
        if found is not None:
            record["audit/nfe"] = watched.nfe
            record |= self._agreement(found)
        return record

    def _agreement(self, found: Audit) -> dict[str, Any]:
        """How well the previews of the plan's points ranked the audit group, and the probe beside them."""
        used, probe = found.used_agreement(), found.probe_agreement()
        record: dict[str, Any] = {}
        for point in self.plan.active_points():
            record[f"preview/rank_correlation@{point.step}"] = used[point.step]
            record[f"preview/hit_rate@{point.step}"] = found.hit_rate(point.step, point.keep)
            if probe is not None:
                record[f"probe/rank_correlation@{point.step}"] = probe[point.step]
        return record

    def _over_ranks(self, cost: Cost) -> Cost:
        names = list(asdict(cost))
        total = self.ranks.sum(torch.tensor([getattr(cost, n) for n in names], dtype=torch.int64)).tolist()
        return Cost(**dict(zip(names, total, strict=True)))

    def check_frozen(self) -> None:
        checks.check_frozen(self.policy, self._frozen)

    def state_dict(self) -> dict[str, Any]:
        """Of the main process whole; all must ask for it, since some weights may be shared out."""
        return {
            "iteration": self.iteration,
            "policy": all_gathered(self.policy.state_dict(), self.ranks.is_main),
            "optimizer": all_gathered(self.optimizer.state_dict(), self.ranks.is_main),
            "loss_scale": self.loss_scale.state_dict(),
            "order": self.order.state_dict(),
            "totals": self.totals.state_dict(),
            "plan": asdict(self.plan),
            "judge": self.judge.state_dict(),
            "checks": self.checks.state_dict(),
            "probe": None if self.how.probe is None else self.how.probe.state_dict(),
        }

    def _moments(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """An optimizer's saved state with what belongs to weights that are shared out shared out alike."""
        if isinstance(self.optimizer, PartitionedAdamW):
            return dict(saved)  # of which it takes its part itself, so that the whole is never on the device
        parameters = list(self.policy.trainable.values())
        state = {
            i: {
                name: as_shared(t, parameters[i]) if isinstance(t, Tensor) and t.shape == parameters[i].shape else t
                for name, t in found.items()
            }
            for i, found in saved["state"].items()
        }
        return {**saved, "state": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, by the settings of this trainer's own configuration where they are others than the saved one's."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        own_weights = self.policy.named_weights.names
        self.policy.load_state_dict(state["policy"])
        for name in (EMA, *self.objective.settings.averages):
            if name in own_weights and name not in self.policy.named_weights:  # an average that begins only now
                self.policy.named_weights.snapshot(name)
        self.optimizer.load_state_dict(self._moments(state["optimizer"]))
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self.loss_scale.load_state_dict(state.get("loss_scale", {}))
        self.order.load_state_dict(state["order"])
        self.totals.load_state_dict(state["totals"])
        saved = plan_from(state["plan"])
        if self.config.plan.adaptive and saved.group_size == self.plan.group_size:
            self.plan = saved
        self.judge.load_state_dict(state["judge"])
        self.checks.load_state_dict(state["checks"])
        if self.how.probe is not None and state["probe"] is not None:
            self.how.probe.load_state_dict(state["probe"])
        self.iteration = state["iteration"]
