"""A network with a few of its equal blocks in the place of all, from which the whole is calculated.

A transformer has tens of blocks of one size. What n of them take is linear in n: FLOPs and weights are sums over
blocks, and memory peaks at the last one, beside what the others keep. So networks with two and with three blocks say
what any number of blocks takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

from torch import nn

FEW = 2


@dataclass(frozen=True)
class Stack:
    """Equal blocks that follow each other: their network, their list, the place of the first, and their number."""

    network: str
    blocks: str
    start: int
    count: int


def stacks_of(networks: Mapping[str, nn.Module]) -> list[Stack]:
    """The stacks of more than three equal blocks; none where they are not all alike, or of a U-Net.

    Among blocks of two kinds memory may peak at either, so that few do not say at which. The lists of a U-Net depend on
    each other's lengths.
    """
    stacks, kinds = [], set()
    for network, name, blocks in _lists(networks):
        start = 0
        for kind, run in groupby(blocks, _kind):
            count = len(list(run))
            if count > FEW + 1:
                stacks.append(Stack(network, name, start, count))
                kinds.add((kind, count))
            start += count
    return stacks if len(kinds) == 1 else []


def _lists(networks: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, nn.ModuleList]]:
    for network, module in networks.items():
        if not hasattr(module, "mid_block"):
            yield from ((network, name, c) for name, c in module.named_children() if isinstance(c, nn.ModuleList))


def _kind(block: nn.Module) -> tuple[Any, ...]:
    return (type(block), *((name, tuple(p.shape), p.dtype) for name, p in block.named_parameters()))


def are_adapted_alike(networks: Mapping[str, nn.Module], stacks: list[Stack], ends: Iterable[str]) -> bool:
    """Whether each ending of names, as of a LoRA's layers, means the same layers in all blocks of each stack."""
    for stack in stacks:
        blocks = getattr(networks[stack.network], stack.blocks)[stack.start : stack.start + stack.count]
        inner = [name for name, _ in blocks[0].named_modules() if name]
        for end in ends:
            meant = {
                tuple(name for name in inner if fnmatchcase(f".{stack.blocks}.{place}.{name}", f"*.{end}"))
                for place in range(stack.start, stack.start + stack.count)
            }
            if len(meant) > 1:
                return False
    return True


def with_blocks(networks: Mapping[str, nn.Module], stacks: list[Stack], count: int) -> dict[str, nn.Module]:
    """Copies of the networks with so many blocks of each stack."""
    copies = {name: deepcopy(network) for name, network in networks.items()}
    for stack in stacks:
        own = getattr(copies[stack.network], stack.blocks)
        kept = [*own[: stack.start + count], *own[stack.start + stack.count :]]
        setattr(copies[stack.network], stack.blocks, nn.ModuleList(kept))
    return copies
