"""From a rollout to a change of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from progrpo.config import ObjectiveSettings, OptimSettings, microbatch
from progrpo.objectives.advantage import (
    advantages,
    batch_mean_std,
    group_statistics,
    normalised_sum,
    with_quorum,
)
from progrpo.objectives.base import Experience, Loss, Noise, Objective
from progrpo.packing import filled_up, of_update, of_whole_blocks
from progrpo.policies.base import Policy
from progrpo.policies.sharded import gathered
from progrpo.rollout.denoise import Sampling
from progrpo.rollout.sharding import NOT_SHARDED, GroupSharding
from progrpo.training.distributed import Ranks, Tally
from progrpo.training.errors import SelfCheckError
from progrpo.training.loss_scale import LossScale
from progrpo.training.memory import halved, is_out_of_memory
from progrpo.types import GroupScores, Rollout

_DEVIATION = "update/ratio_max_deviation"


@dataclass(frozen=True)
class Packing:
    """Items of a microbatch at most, or with `one_shape` (a compiled network) exactly."""

    microbatch: int
    one_shape: bool = False

    def parts(self, experience: Experience, per_trajectory: int) -> list[Tensor]:
        """The items of N trajectories, draw by draw."""
        if experience.size_N is not None:
            lengths = torch.bincount(experience.trajectories.group_N).tolist() * per_trajectory
            parts = of_whole_blocks(lengths, self.microbatch)
            return [filled_up(part, self.microbatch) for part in parts] if self.one_shape else parts
        return of_update(len(experience) * per_trajectory, self.microbatch, self.one_shape)


def learn_from(
    rollout: Rollout,
    sampling: Sampling,
    noise: Noise,
    objective: ObjectiveSettings,
    adv_clip_max: float,
    ranks: Ranks,
    weights: Mapping[str, float],
    quorum: float = 0.0,
    sharding: GroupSharding = NOT_SHARDED,
) -> tuple[Experience, Tally]:
    """Every survivor whose reward is there, with its advantage; and what the rewards looked like.

    `weights` are those of the rewards that were mixed, by name. A group that misses the `quorum` is left out. Of groups that
    groups are shared out (`sharding`), each knows all rewards, and learns from its own part.
    """
    num_groups, tally = len(rollout.prompts), Tally()
    parts = sharding.gather([rollout.survivors])
    own = torch.arange(len(rollout.group_N)) + sum(len(part.group_N) for part in parts[: sharding.rank])
    whole = GroupScores.cat(parts)
    rewards_N = with_quorum(whole.value_N, whole.group_N, num_groups, quorum)
    statistics = group_statistics(rewards_N, whole.group_N, num_groups)
    all_finalists = GroupScores.cat(sharding.gather([rollout.finalists]))
    finalists = group_statistics(all_finalists.value_N, all_finalists.group_N, num_groups)

    def add_up(moments_3: Tensor) -> Tensor:
        return ranks.sum(moments_3 / sharding.world).cpu()  # each knows what all of those together know

    scale = {"eps": objective.adv_eps, "clip_max": adv_clip_max}
    if objective.advantage == "gdpo":
        rewards_NR = whole.rewards_NR.where(rewards_N.isfinite()[:, None], torch.nan)
        weights_R = torch.tensor(list(weights.values()), dtype=torch.float64)
        values_N = normalised_sum(rewards_NR, weights_R, whole.group_N, num_groups, objective.adv_eps)
        mean, std = batch_mean_std(values_N, add_up)
        taught = group_statistics(values_N, whole.group_N, num_groups)
        advantages_N, observed_N = advantages(values_N, whole.group_N, taught.around(mean), std=std, **scale)
    else:
        batch = objective.advantage == "batch"
        advantages_N, observed_N = advantages(
            rewards_N,
            whole.group_N,
            statistics if objective.baseline == "survivors" else finalists,
            std=batch_mean_std(rewards_N, add_up)[1] if batch else None,
            **scale,
        )
        taught = statistics
    tally.add_finite("reward/mean", rollout.finalists.value_N)
    tally.add_finite("reward/std", statistics.std_P)
    tally.add_finite("reward/strict", rollout.survivors.passed_N)
    if len(weights) > 1:
        for name, values_N in zip(weights, rollout.survivors.rewards_NR.unbind(1), strict=True):
            tally.add_finite(f"reward/mean@{name}", values_N)
    if not rollout.previews:
        tally.add_finite("reward/group_std_full", finalists.std_P)
    tally.count("reward/missing", int((~rollout.finalists.value_N.isfinite()).sum()))
    if sharding.rank == 0:  # what all know is counted once
        tally.count("reward/skipped_groups", num_groups - len(whole.group_N[rewards_N.isfinite()].unique()))
        tally.count("advantage/zero_variance_groups", int((~taught.informative_P).sum()))
    experience = Experience(
        rollout.trajectories,
        advantages_N[own],
        rollout.condition,
        sampling.process,
        noise,
        sampling.guidance_scale,
    )
    return experience.take(observed_N[own].nonzero().flatten()), tally


def update(
    policy: Policy,
    objective: Objective,
    optimizer: Optimizer,
    experience: Experience,
    config: OptimSettings,
    ranks: Ranks,
    scale: LossScale | None = None,
) -> tuple[Tally, int, int]:
    """`updates_per_rollout` optimizer steps, each on its share of every group; what was seen, and items trained.

    A step whose loss or gradient is not finite is not taken, and only counted. Where a scaled gradient alone overflows, all processes
    compute it again at half the `scale`. Where memory runs out, half the microbatch is tried; the last one that was enough is the
    third thing returned.

    The loss is the mean over the trajectories of all processes and their items. Trajectories without an advantage count in that
    mean but are not computed: their group has no variance and teaches nothing.
    """
    tally, items, skipped, parts = Tally(), 0, 0, config.updates_per_rollout
    scale = LossScale() if scale is None else scale
    packing, prepared = Packing(microbatch(config), policy.compiled), False
    for part in range(parts):
        counted: tuple[float, float] | None = None  # once, however often a part is tried: all processes take part in it
        if part:
            experience = experience.detached()
        while True:
            try:
                ready = experience if prepared else objective.prepare(policy, experience, packing.microbatch, parts)
                share = ready.take((_parts(ready, parts) == part).nonzero().flatten())
                per_trajectory = objective.settings.items_per_trajectory(len(share.trajectories.path))
                telling = share.take(share.advantages_N.nonzero().flatten())
                if counted is None:
                    sizes = torch.tensor([len(share) * per_trajectory, len(telling)], dtype=torch.float64)
                    everywhere, taught = counted = tuple(ranks.sum(sizes).tolist())
                seen = _accumulate(policy, objective, telling, everywhere / scale.value, packing)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if policy.drain_peer_calls is not None:  # the others are in the midst of it
                    raise SelfCheckError(
                        "out of memory while processes share the network (model.shard), so that one of them cannot try again;"
                        " lower optim.microbatch"
                    ) from error
                if experience.attached:  # whose graphs are used up, and cannot be gone through again
                    raise SelfCheckError(
                        "out of memory in an update that goes back through what sampling computed; leave out optim.reuse_rollout"
                    ) from error
                optimizer.zero_grad(set_to_none=True)
                packing = replace(packing, microbatch=halved(packing.microbatch, "optim.microbatch"))
                continue
            experience, prepared = ready, True
            gradient = _gradient(policy, seen, config.max_grad_norm, ranks, scale)
            # graphs of the rollout are used up, and go through another factor only in the next iteration
            if not gradient.overflows or not scale.lower() or (config.reuse_rollout and part == 0):
                break
            tally.raise_to("update/rescaled", tally.maxima.get("update/rescaled", 0.0) + 1)
            optimizer.zero_grad(set_to_none=True)
        items += len(telling) * per_trajectory
        if not gradient.usable:
            skipped += 1
            optimizer.zero_grad(set_to_none=True)
            continue
        scale.count()
        tally.merge(seen)
        if part == 0 and _DEVIATION in tally.maxima:  # no step was taken yet: what sampled is what is trained
            tally.raise_to("update/on_policy_deviation", tally.maxima[_DEVIATION])
        tally.add("update/grad_norm", gradient.norm, 1)
        if taught:  # else momentum alone would move the weights
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    tally.raise_to("update/skipped", skipped)
    if scale.enabled:
        tally.raise_to("update/loss_scale", scale.value)
    return tally, items, packing.microbatch


@dataclass(frozen=True)
class _Gradient:
    """A step's gradient, the same on all processes: its norm before it is clipped, and whether the loss is finite everywhere."""

    norm: float
    finite_loss: bool

    @property
    def usable(self) -> bool:
        return self.finite_loss and math.isfinite(self.norm)

    @property
    def overflows(self) -> bool:
        return self.finite_loss and not math.isfinite(self.norm)


def _gradient(policy: Policy, seen: Tally, max_norm: float, ranks: Ranks, scale: LossScale) -> _Gradient:
    """Sum the gradients over processes, unscale and clip them, in place."""
    parameters = policy.trainable.values()
    ranks.sum_gradients(parameters)
    scale.unscale(parameters)
    norm = gathered(torch.nn.utils.clip_grad_norm_(parameters, max_norm)).item()
    lost = torch.tensor(float(not math.isfinite(seen.sums.get("update/loss", 0.0))))
    return _Gradient(norm, not ranks.sum(lost).item())


def _parts(experience: Experience, parts: int) -> Tensor:
    """Which update each trajectory serves: dealt within its group, so that every update sees every prompt."""
    group_N = experience.trajectories.group_N
    place_N = torch.arange(len(group_N)) - torch.searchsorted(group_N, group_N)
    return (place_N + experience.trajectories.slot_N) % parts


def _accumulate(
    policy: Policy, objective: Objective, experience: Experience, everywhere: float, packing: Packing
) -> Tally:
    tally, per_trajectory = Tally(), objective.settings.items_per_trajectory(len(experience.trajectories.path))
    count = len(experience) * per_trajectory
    if experience.attached:
        # a graph spans one transition of every trajectory, and its ratios are 1 by construction: some are computed anew
        tally = _deviation(policy, objective, experience.detached(), count, packing)
        parts = list(torch.arange(count).split(len(experience))) if count else []
    else:
        parts = packing.parts(experience, per_trajectory)
    for items_B in parts:
        loss = objective.loss(policy, experience, items_B).first(len(items_B.unique()))
        (loss.total / everywhere).backward()
        for name, total in loss.sums.items():
            tally.add(f"update/{name}", total.item(), len(loss.loss_B))
        if not experience.attached:
            tally.merge(_peaks(loss))
    return tally


@torch.no_grad()
def _deviation(policy: Policy, objective: Objective, experience: Experience, count: int, packing: Packing) -> Tally:
    """Maxima over one microbatch of items of all transitions."""
    items = torch.arange(count)[:: max(1, count // packing.microbatch)][: packing.microbatch]
    return _peaks(objective.loss(policy, experience, items)) if count else Tally()


def _peaks(loss: Loss) -> Tally:
    tally = Tally()
    for name, value in loss.maxima.items():
        tally.raise_to(f"update/{name}", value.item())
    return tally
