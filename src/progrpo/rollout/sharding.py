"""Group sharding: the members of a group are sampled by several processes, and selected over all of them.

A process usually samples whole groups. Where a group is too slow for one process, its members are dealt over all: each
scores its share, gets all scores, and selects alike. Noise is keyed by member, so the survivors do not depend on the
process that sampled them. Whole groups are chosen likewise over the groups of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from progrpo.rollout.prune import Selector, survivors, widest_groups
from progrpo.types import Trajectories

T = TypeVar("T")


class GroupSharding(Protocol):
    """The processes that share the members of each group."""

    rank: int
    world: int

    def gather(self, items: list[T]) -> list[T]:
        """Return the lists of all processes, one after another, on each of them."""
        ...


class _NotSharded:
    rank, world = 0, 1

    def gather(self, items: list[T]) -> list[T]:
        return items


NOT_SHARDED: GroupSharding = _NotSharded()
"""The sharding of a process that samples whole groups."""


def own_share(batch: Trajectories, sharding: GroupSharding) -> Trajectories:
    """This process' share of whole groups: every world-th row."""
    return batch.take(torch.arange(sharding.rank, len(batch), sharding.world))


def sharded_survivors(
    batch: Trajectories,
    scores_N: Tensor,
    keep: int,
    selector: Selector,
    seeds_P: Tensor,
    sharding: GroupSharding,
) -> Tensor:
    """The rows of this process' batch that the selector keeps of all processes' M members, ascending."""
    shares = sharding.gather([(batch.group_N, batch.member_N, scores_N)])
    group_M, member_M, scores_M = (torch.cat(columns) for columns in zip(*shares, strict=True))
    sizes = [len(group_N) for group_N, _, _ in shares]
    owner_M = torch.arange(sharding.world).repeat_interleave(torch.tensor(sizes))
    order_M = _order(group_M, member_M)
    kept = order_M[survivors(group_M[order_M], scores_M[order_M], keep, selector, seeds_P)]
    own = kept[owner_M[kept] == sharding.rank] - sum(sizes[: sharding.rank])
    return own.sort().values


def in_widest_groups(batch: Trajectories, scores_N: Tensor, keep: int, peers: GroupSharding) -> Tensor:
    """The mask (N,) of this process' rows in the `keep` groups of all processes whose scores differ most.

    Among equals the lower slot wins, so that the choice does not depend on the number of processes.
    """
    shares = peers.gather([(batch.slot_N, scores_N)])
    slot_M, scores_M = (torch.cat(columns) for columns in zip(*shares, strict=True))
    slots, group_M = slot_M.unique(return_inverse=True)
    order_M = group_M.argsort(stable=True)
    return torch.isin(batch.slot_N, slots[widest_groups(group_M[order_M], scores_M[order_M], keep)])


def rebalanced(batch: Trajectories, sharding: GroupSharding) -> Trajectories:
    """The trajectories of all processes, moved from processes that have more to those that have fewer.

    Numbers then differ by one at most. Rows stay prompt-major, members ascending.
    """
    parcels: dict[int, Trajectories] = {}
    left = len(batch)
    for giver, taker, count in transfers(sharding.gather([left])):
        if giver == sharding.rank:
            parcels[taker] = batch.take(slice(left - count, left)).to("cpu")
            left -= count
    received = [p[sharding.rank] for p in sharding.gather([parcels]) if sharding.rank in p]
    if not parcels and not received:
        return batch
    whole = Trajectories.cat([batch.take(slice(left)), *(part.to(batch.x_NCHW.device) for part in received)])
    return whole.take(_order(whole.group_N, whole.member_N))


def transfers(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """The moves (giver, taker, count) after which counts differ by one at most; as few rows as possible move."""
    share, more = divmod(sum(counts), len(counts))
    # who already has most keeps the one more, or it would move for nothing
    largest = sorted(range(len(counts)), key=lambda i: -counts[i])[:more]
    over = [count - share - (i in largest) for i, count in enumerate(counts)]
    moves, takers = [], [i for i, extra in enumerate(over) if extra < 0]
    for giver, extra in enumerate(over):
        while extra > 0:
            taker = takers[0]
            count = min(extra, -over[taker])
            moves.append((giver, taker, count))
            extra -= count
            over[taker] += count
            if not over[taker]:
                takers.pop(0)
    return moves


def _order(group_N: Tensor, member_N: Tensor) -> Tensor:
    """The order of rows in which they are prompt-major, members ascending."""
    by_member = member_N.argsort(stable=True)
    return by_member[group_N[by_member].argsort(stable=True)]
