"""Updates of the weights by an experience: microbatches, gradients over all processes, the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from progrpo.config import OptimSettings
from progrpo.objectives.base import Experience, Loss, Objective
from progrpo.packing import padded, update_batches, whole_block_batches
from progrpo.policies.base import Policy
from progrpo.policies.sharded import gathered
from progrpo.training.distributed import Ranks, Tally
from progrpo.training.loss_scale import LossScale
from progrpo.training.memory import Microbatch
from progrpo.training.noise_scale import (
    GradientMoments,
    NoiseScale,
    add_gradients,
    gradient_moments,
    take_gradients,
)

_DEVIATION = "update/ratio_max_deviation"


@dataclass(frozen=True)
class Packing:
    """Items of a microbatch at most, or with `one_shape` (a compiled network) exactly."""

    microbatch: int
    one_shape: bool = False

    def batches(self, experience: Experience, per_trajectory: int) -> list[Tensor]:
        """The items of N trajectories, draw by draw, as microbatches."""
        if experience.group_size_N is not None:
            lengths = torch.bincount(experience.trajectories.group_N).tolist() * per_trajectory
            batches = whole_block_batches(lengths, self.microbatch)
            return [padded(items, self.microbatch) for items in batches] if self.one_shape else batches
        return update_batches(len(experience) * per_trajectory, self.microbatch, self.one_shape)


@dataclass(frozen=True)
class Updated:
    """The metrics of an iteration's optimizer steps, and the number of items trained."""

    tally: Tally
    items: int

    @property
    def skipped(self) -> int:
        """Steps that were not taken, since their loss or gradient was not finite."""
        return int(self.tally.maxima["update/skipped"])


@dataclass(frozen=True)
class _Share:
    """The rows of one optimizer step that have an advantage; the numbers of items and such rows in all processes.

    Where the noise scale is measured the rows are in two `parts`, and `prompts` has the number of prompts of each in
    all processes, with those that have no such row. Parts are of prompts, or with `halves_members` of the members of
    each prompt, so that a part counts as half of the prompts.
    """

    parts: tuple[Tensor, ...]
    items: float
    telling: float
    prompts: tuple[float, float] | None = None
    halves_members: bool = False

    def __len__(self) -> int:
        return sum(map(len, self.parts))


@dataclass(frozen=True)
class _Passed:
    """The results of the passes over a share, beside the gradient of its last part."""

    tally: Tally
    first: list[Tensor | None] | None
    """The gradients of the first of two parts."""


@dataclass(frozen=True)
class _Gradient:
    """A step's gradient, alike on all processes: its norm before clipping, and whether every loss is finite."""

    norm: float
    finite_loss: bool
    moments: GradientMoments | None

    @property
    def usable(self) -> bool:
        return self.finite_loss and math.isfinite(self.norm)

    @property
    def overflows(self) -> bool:
        return self.finite_loss and not math.isfinite(self.norm)


class Updater:
    """The updates of a policy's weights by an objective and an optimizer, together with all processes.

    `microbatch` is the number of items of a pass, halved where memory runs out.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        optimizer: Optimizer,
        config: OptimSettings,
        ranks: Ranks,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.policy = policy
        self.objective = objective
        self.optimizer = optimizer
        self.loss_scale = LossScale() if loss_scale is None else loss_scale
        self.noise_scale = NoiseScale()
        self.microbatch = Microbatch(config.items_per_pass, "optim.microbatch")
        self._config = config
        self._ranks = ranks

    def update(self, experience: Experience) -> Updated:
        """Take `updates_per_rollout` optimizer steps, each on its share of every group.

        A step whose loss or gradient is not finite is not taken, and only counted. Where a scaled gradient alone
        overflows, all processes compute it again at half the loss scale.

        The loss is the mean over the trajectories of all processes and their items. Trajectories whose advantage is 0
        are not computed: they count in the mean, and get neither a gradient nor a KL term.
        """
        tally = Tally()
        items = 0
        skipped = 0
        prepared = False
        updates_N = self._update_of_each(experience)
        for number in range(self._config.updates_per_rollout):
            if number:
                experience = experience.detached()
            share = self._share(experience, updates_N == number)
            while True:
                passes = partial(self._passes, experience, share, prepared)
                experience, passed = self.microbatch.run(passes, self._refusal(experience))
                prepared = True
                gradient = self._gradient(passed, share)
                # graphs of the rollout are used up, and take another factor only in the next iteration
                used_up = self._config.reuse_rollout and number == 0
                if not gradient.overflows or not self.loss_scale.lower() or used_up:
                    break
                tally.raise_to("update/rescaled", tally.maxima.get("update/rescaled", 0.0) + 1)
            items += len(share) * self._items_per_trajectory(experience)
            if not gradient.usable:
                skipped += 1
                self.optimizer.zero_grad(set_to_none=True)
                continue
            self.loss_scale.count()
            tally.merge(passed.tally)
            if number == 0 and _DEVIATION in tally.maxima:  # no step was taken yet: what sampled is what is trained
                tally.raise_to("update/on_policy_deviation", tally.maxima[_DEVIATION])
            tally.add("update/grad_norm", gradient.norm, 1)
            if share.telling:  # else momentum alone would move the weights
                self._note(gradient.moments, share.halves_members, tally)
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        tally.raise_to("update/skipped", skipped)
        if self.loss_scale.enabled:
            tally.raise_to("update/loss_scale", self.loss_scale.value)
        return Updated(tally, items)

    def _items_per_trajectory(self, experience: Experience) -> int:
        return self.objective.settings.items_per_trajectory(len(experience.trajectories.path))

    def _share(self, experience: Experience, is_of_step_N: Tensor) -> _Share:
        """The share of an optimizer step; all processes count theirs together."""
        rows = is_of_step_N.nonzero().flatten()
        telling = rows[experience.advantages_N[rows] != 0]
        items = len(rows) * self._items_per_trajectory(experience)
        counts = self._ranks.sum(torch.tensor([items, len(telling)], dtype=torch.float64))
        items_of_all, telling_of_all = counts.tolist()
        slots = self._slots(experience.trajectories.slot_N[rows])
        if len(slots) < 2:
            return _Share((telling,), items_of_all, telling_of_all)
        if self.noise_scale.halves_members:
            is_first = self._half_of_each(experience.take(telling))
            halves = telling[is_first], telling[~is_first]
            return _Share(halves, items_of_all, telling_of_all, (len(slots) / 2, len(slots) / 2), True)
        # kinds of prompts may take turns, so that every other prompt would be a half of one kind
        middle = (len(slots) + 1) // 2
        is_first = experience.trajectories.slot_N[telling] < slots[middle]
        halves = telling[is_first], telling[~is_first]
        return _Share(halves, items_of_all, telling_of_all, (middle, len(slots) - middle))

    def _slots(self, slot_N: Tensor) -> list[int]:
        """The slots of all processes' prompts, ascending; none where the noise scale is not measured."""
        measured = self._config.measures_noise_scale
        if not measured or any(isinstance(p, DTensor) for p in self.policy.trainable.values()):
            return []
        own = slot_N.unique().tolist()
        return sorted({slot for slots in self._ranks.gather([own]) for slot in slots})

    def _update_of_each(self, own: Experience) -> Tensor:
        """The number (N,) of each own row's optimizer step."""
        living, updates = own.trajectories, self._config.updates_per_rollout
        if updates == 1:  # nothing to ask other processes for
            return torch.zeros(len(own), dtype=torch.int64)
        return self._in_whole_groups(partial(update_of_each, updates=updates), living.slot_N, living.member_N)

    def _half_of_each(self, own: Experience) -> Tensor:
        """The mask (N,) of own rows in the first half of their groups."""
        living = own.trajectories
        return self._in_whole_groups(half_of_each, own.advantages_N.cpu(), living.slot_N, living.member_N)

    def _in_whole_groups(self, of_rows: Callable[..., Tensor], *own: Tensor) -> Tensor:
        """The own part of a function of the rows of all processes, which may share a group."""
        shares = self._ranks.gather([own])
        first_own = sum(len(share[0]) for share in shares[: self._ranks.rank])
        of_all = of_rows(*(torch.cat(columns) for columns in zip(*shares, strict=True)))
        return of_all[first_own : first_own + len(own[0])]

    def _note(self, moments: GradientMoments | None, of_members: bool, tally: Tally) -> None:
        if moments is None:
            return
        if of_members:
            self.noise_scale.add_members(moments.noise)
            tally.add("update/gradient_member_noise", moments.noise, 1)
        else:
            self.noise_scale.add(moments)
            tally.add("update/gradient_signal", moments.signal, 1)
            tally.add("update/gradient_noise", moments.noise, 1)

    def _refusal(self, experience: Experience) -> str | None:
        """The reason why passes that run out of memory cannot be made again; None where they can."""
        if self.policy.drain_peer_calls is not None:  # the others are in the midst of theirs
            return (
                "out of memory while processes share the network (model.shard), so that one of them cannot try again;"
                " lower optim.microbatch"
            )
        if experience.attached:  # whose graphs one backward pass uses up
            return (
                "out of memory in an update that goes back through what sampling computed; leave out"
                " optim.reuse_rollout"
            )
        return None

    def _passes(
        self, experience: Experience, share: _Share, prepared: bool, microbatch: int
    ) -> tuple[Experience, _Passed]:
        """Accumulate the gradients of a share; the experience as it was prepared before the first step."""
        self.optimizer.zero_grad(set_to_none=True)  # what passes left that ran out of memory or overflowed
        if not prepared:
            updates = self._config.updates_per_rollout
            if share.halves_members and self.objective.settings.whole_groups:
                updates = max(updates, 2)  # what belongs to a whole group is computed before it is dealt over passes
            experience = self.objective.prepare(self.policy, experience, microbatch, updates)
        packing = Packing(microbatch, self.policy.compiled)
        divisor = share.items / self.loss_scale.value
        tally, first = Tally(), None
        for number, rows in enumerate(share.parts):
            if number:
                first = take_gradients(self.policy.trainable.values())
            tally.merge(self._accumulate(experience.take(rows), divisor, packing))
        return experience, _Passed(tally, first)

    def _accumulate(self, experience: Experience, divisor: float, packing: Packing) -> Tally:
        tally = Tally()
        per_trajectory = self._items_per_trajectory(experience)
        count = len(experience) * per_trajectory
        if experience.attached:
            # a graph spans one transition of every trajectory, whose ratios are 1 by construction: some are computed
            # anew
            tally = self._deviation(experience.detached(), count, packing)
            batches = list(torch.arange(count).split(len(experience))) if count else []
        else:
            batches = packing.batches(experience, per_trajectory)
        for items_B in batches:
            loss = self.objective.loss(self.policy, experience, items_B).first(len(items_B.unique()))
            (loss.total / divisor).backward()
            for name, total in loss.sums.items():
                tally.add(f"update/{name}", total.item(), len(loss.loss_B))
            if not experience.attached:
                tally.merge(_maxima(loss))
        return tally

    @torch.no_grad()
    def _deviation(self, experience: Experience, count: int, packing: Packing) -> Tally:
        """Maxima over one microbatch of items of all transitions."""
        items = torch.arange(count)[:: max(1, count // packing.microbatch)][: packing.microbatch]
        return _maxima(self.objective.loss(self.policy, experience, items)) if count else Tally()

    def _gradient(self, passed: _Passed, share: _Share) -> _Gradient:
        """Sum the gradients over processes, unscale and clip them, in place."""
        parameters = self.policy.trainable.values()
        self._sum_and_unscale()
        moments = None
        if passed.first is not None:
            assert share.prompts is not None
            second = take_gradients(parameters)
            add_gradients(parameters, passed.first)
            self._sum_and_unscale()
            moments = gradient_moments([p.grad for p in parameters], second, share.prompts)
            add_gradients(parameters, second)
        norm = gathered(torch.nn.utils.clip_grad_norm_(parameters, self._config.max_grad_norm)).item()
        not_finite = torch.tensor(float(not math.isfinite(passed.tally.sums.get("update/loss", 0.0))))
        return _Gradient(norm, not self._ranks.sum(not_finite).item(), moments)

    def _sum_and_unscale(self) -> None:
        parameters = self.policy.trainable.values()
        self._ranks.sum_gradients(parameters)
        self.loss_scale.unscale(parameters)


def update_of_each(slot_N: Tensor, member_N: Tensor, updates: int) -> Tensor:
    """The number (N,) of each row's optimizer step. A group is dealt over the steps, so that each has all prompts."""
    return (_place_in_group(slot_N, member_N) + slot_N) % updates


def half_of_each(advantages_N: Tensor, slot_N: Tensor, member_N: Tensor) -> Tensor:
    """The mask (N,) of halves of the groups that are alike.

    By the order of their advantages members are in the first half by the pattern + - - + + - - +, and the other way
    round in every other slot. What a group's members have in common, and what grows with their advantage, is then the
    same in both.
    """
    return ((_place_in_group(slot_N, advantages_N, member_N) + 1) // 2 + slot_N) % 2 == 0


def _place_in_group(slot_N: Tensor, *keys: Tensor) -> Tensor:
    """The place (N,) of each row among those of its slot, sorted by the keys, of which the first counts most."""
    order = torch.arange(len(slot_N))
    for key_N in (*reversed(keys), slot_N):
        order = order[key_N[order].sort(stable=True).indices]
    place_N = torch.empty_like(order)
    place_N[order] = torch.arange(len(order)) - torch.searchsorted(slot_N[order], slot_N[order])
    return place_N


def _maxima(loss: Loss) -> Tally:
    tally = Tally()
    for name, value in loss.maxima.items():
        tally.raise_to(f"update/{name}", value.item())
    return tally
