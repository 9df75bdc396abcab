"""A LoRA in the layout of another tool: matrices by its names, with alpha tensors, and stacked where its layers are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from progrpo.publish.layouts import Config, Layout, Place

Matrices = tuple[Tensor, Tensor]
"""The matrices A (r, I, ...) and B (O, r, ...) of a layer, whose weight changes by B A."""


def without_place(lora: Mapping[str, Matrices], layout: Layout, config: Config) -> list[str]:
    """The layers of a LoRA that the readers of a layout do not take."""
    return sorted(layer for layer in lora if layout.place(layer, config) is None)


def laid_out(lora: Mapping[str, Matrices], layout: Layout, config: Config) -> dict[str, Tensor]:
    """The tensors of a file. Each layer must have a place. Alpha is the rank: the strength is 1 for every reader."""
    modules: dict[str, list[tuple[Place, Matrices]]] = defaultdict(list)
    for layer, matrices in lora.items():
        place = layout.place(layer, config)
        assert place is not None, layer
        modules[place.module].append((place, matrices))
    tensors: dict[str, Tensor] = {}
    for module, parts in sorted(modules.items()):
        first, second = _stacked(parts)
        rank = torch.tensor(float(len(first)))
        tensors |= dict(zip(layout.names(module), (first, second, rank), strict=True))
    return tensors


def _stacked(parts: Sequence[tuple[Place, Matrices]]) -> Matrices:
    """One pair of matrices for a module: those of its layer, or A below A and B beside B, of all ranks together.

    A layer that is stacked in the module without a LoRA has rows of zeros.
    """
    place, (first, second) = parts[0]
    if len(place.heights) == 1:
        return first, torch.cat(second.chunk(2)[::-1]) if place.swapped else second
    unit, rest = divmod(len(second), place.heights[place.part])
    assert not rest, place
    rows = [height * unit for height in place.heights]
    stacked = torch.zeros(sum(rows), sum(len(a) for _, (a, _) in parts))
    column = 0
    for own, (a, b) in parts:
        row = sum(rows[: own.part])
        stacked[row : row + rows[own.part], column : column + len(a)] = b
        column += len(a)
    return torch.cat([a for _, (a, _) in parts]), stacked
