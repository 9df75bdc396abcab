"""Groups over several processes, here threads that wait for each other: who survives, and where members lie."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from progrpo.config import Config, SamplingSettings
from progrpo.rewards.function import FunctionReward
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.prune import survivors
from progrpo.rollout.rollout import rollout
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sharding import (
    NOT_SHARDED,
    GroupSharding,
    in_widest_groups,
    own_share,
    rebalanced,
    sharded_survivors,
    transfers,
)
from progrpo.training.build import sampling_from
from progrpo.types import Prompt, Rollout, Trajectories, Transition
from tests.support.grids import SELECTORS
from tests.support.rewards import mixture_of_one


class Member:
    """One of `world` threads that gather from each other as processes do."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.world, self._barrier, self._table = rank, world, barrier, table

    def gather(self, items: list[Any]) -> list[Any]:
        self._table[self.rank] = items
        self._barrier.wait(60)
        gathered = [item for part in self._table for item in part]
        self._barrier.wait(60)
        return gathered


def each(world: int, work: Callable[[Member], Any]) -> list[Any]:
    barrier, table = threading.Barrier(world), [None] * world
    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(work, [Member(rank, world, barrier, table) for rank in range(world)]))


def whole(counts: list[int]) -> Trajectories:
    """Groups of so many members, whose latents say who they are."""
    group = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    member = torch.cat([torch.arange(count) for count in counts])
    x = (100.0 * group + member).reshape(-1, 1, 1, 1)
    step = Transition(0, x + 0.25, x + 0.5, x.flatten() + 0.75)
    return Trajectories(group, group, member, x, output_NCHW=-x, path=(step,))


@pytest.mark.parametrize("counts", list(product((0, 1, 4, 9), repeat=3)))
def test_transfers_even_numbers_out_and_move_as_few_as_possible(counts):
    after, moved = list(counts), 0
    for giver, taker, count in transfers(counts):
        after[giver] -= count
        after[taker] += count
        moved += count
    assert max(after) - min(after) <= 1 and sum(after) == sum(counts)
    share, more = divmod(sum(counts), 3)
    fewest = min(
        sum(max(0, c - share - extra) for c, extra in zip(counts, extras, strict=True))
        for extras in product((0, 1), repeat=3)
        if sum(extras) == more
    )
    assert moved == fewest


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("world", [2, 3])
def test_all_choose_together_what_one_would(selector, world):
    batch, seeds, select = whole([5, 3, 6]), torch.arange(3), SELECTORS[selector]
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=len(batch)))
    scores[4] = torch.nan
    rows = survivors(batch.group_N, scores, 3, select, seeds)
    expected = [(g, m) for g, m in zip(batch.group_N[rows].tolist(), batch.member_N[rows].tolist(), strict=True)]

    def work(member: Member) -> Trajectories:
        mine = own_share(batch, member)
        own = sharded_survivors(mine, scores[member.rank :: world], 3, select, seeds, member)
        return rebalanced(mine.take(own), member)

    parts = each(world, work)
    chosen = [(g, m) for p in parts for g, m in zip(p.group_N.tolist(), p.member_N.tolist(), strict=True)]
    assert sorted(chosen) == expected
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:  # whoever moved took all that is known of it along, and rows are in order
        who = list(zip(part.group_N.tolist(), part.member_N.tolist(), strict=True))
        assert who == sorted(who)
        x = (100.0 * part.group_N + part.member_N).reshape(-1, 1, 1, 1)
        assert part.output_NCHW is not None
        assert torch.equal(part.x_NCHW, x) and torch.equal(part.output_NCHW, -x)
        assert torch.equal(part.path[0].x_next_NCHW, x + 0.5)
        assert torch.equal(part.path[0].log_prob_N, x.flatten() + 0.75)


@pytest.mark.parametrize("world", [2, 3])
def test_a_rollout_of_several_is_that_of_one(tiny_policy, world):
    """Of one group, too: what is moved to a process that has none of its own is finished there."""
    plan = Plan(5, (PrunePoint(0, 4), PrunePoint(2, 3)), final_keep=2)
    key, slots = NoiseKey(0, 0), torch.tensor([3])
    prompts = [Prompt("red cat")]

    def redness(images: Any, texts: Any) -> list[float]:
        return [float(np.asarray(image)[..., 0].mean()) for image in images]

    policies = [tiny_policy() for _ in range(world)]  # not within threads, where libraries' tricks to load them collide

    def sample(sharding: GroupSharding) -> tuple[Rollout, Meter]:
        policy, meter = policies[sharding.rank], Meter()
        sampling = sampling_from(config, policy, "transitions", 0)
        sampler = Sampler(policy, mixture_of_one(FunctionReward(redness)), sampling, plan, sharding=sharding)
        return rollout(sampler, prompts, slots, key, meter), meter

    config = Config(sampling=SamplingSettings(num_inference_steps=4, microbatch=1))  # one row a call: bit for bit
    (one, alone_meter), parts = sample(NOT_SHARDED), each(world, sample)
    rows = sorted(
        (m, rewards, x)
        for rolled, _ in parts
        for m, rewards, x in zip(
            rolled.trajectories.member_N.tolist(),
            rolled.survivors.value_N.tolist(),
            rolled.trajectories.x_NCHW.flatten(1).tolist(),
            strict=True,
        )
    )
    assert [m for m, _, _ in rows] == one.trajectories.member_N.tolist()
    assert [r for _, r, _ in rows] == one.survivors.value_N.tolist()
    assert torch.equal(torch.tensor([x for _, _, x in rows]), one.trajectories.x_NCHW.flatten(1))
    path = [t for rolled, _ in parts for t in rolled.trajectories.path[0].log_prob_N.tolist()]
    assert sorted(path) == sorted(one.trajectories.path[0].log_prob_N.tolist())
    assert sum(m.cost.nfe for _, m in parts) == alone_meter.cost.nfe == 1 * (5 + 4 + 4 + 3)
    assert sum(m.cost.reward_calls for _, m in parts) == alone_meter.cost.reward_calls


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("verdicts", [False, True])
def test_groups_that_several_deal_out_are_stopped_as_by_one(world, verdicts):
    batch = whole([6] * 7)
    scores = torch.from_numpy(np.random.default_rng(2).normal(size=len(batch)))
    if verdicts:  # with many ties
        scores = (scores > 0.8).double()
    scores[6:11] = torch.nan

    for keep in range(1, 7):
        expected = in_widest_groups(batch, scores, keep, NOT_SHARDED)
        assert len(batch.slot_N[expected].unique()) == keep

        def work(member: Member, keep: int = keep) -> list[int]:
            own = batch.slot_N % member.world == member.rank  # as processes are dealt their prompts
            mine = batch.take(own.nonzero().flatten())
            return mine.slot_N[in_widest_groups(mine, scores[own], keep, member)].tolist()

        assert sorted(slot for part in each(world, work) for slot in part) == batch.slot_N[expected].tolist()
