"""The network's output: the places of what the scheduler gets, which are learnt from calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from progrpo.policies.learnt.call import LONGER_TEXT, TEXT, PipelineCall
from progrpo.policies.learnt.rearranged import in_order, probes, read
from progrpo.policies.learnt.recording import Recording


@dataclass(frozen=True, eq=False)
class Output:
    """The places of what the scheduler gets in the network's output: a path of keys, then numbers of a row."""

    path: tuple[Any, ...]
    listed: bool
    place_N: Tensor
    sign: float
    size: int
    """The numbers of a row of the output, for the text that it was learnt from."""
    from_end: bool = False
    """Whether places are counted from the end of a row, which is longer for a longer text."""

    def read(self, output: Any, rows: int) -> Tensor:
        """The output (B, N) as the scheduler gets it."""
        for key in self.path:
            output = output[key]
        tensor = torch.stack(list(output)) if self.listed else output
        values = tensor.reshape(rows, -1)
        shift = values.shape[1] - self.size if self.from_end else 0
        read = in_order(values, self.place_N.to(tensor.device) + shift)
        return read if self.sign == 1 else read * self.sign


def learn_output(call: PipelineCall, first: Recording, size: int) -> Output:
    """Learn the places of the scheduler's input in the output, after a `first` call with latents of `size` numbers.

    ValueError, a part of a sentence, where it is something else than the output's numbers in another order.
    """
    output = _learnt_from(call, TEXT, first, size)
    longer = call.record(call.options(LONGER_TEXT), last_step=0)
    other = _learnt_from(call, LONGER_TEXT, longer, size) if _size(call, longer) != _size(call, first) else output
    shift = other.size - output.size
    if other.sign != output.sign or not any(torch.equal(other.place_N, output.place_N + by) for by in (0, shift)):
        raise ValueError("its scheduler gets parts of the network's output that depend on the text")
    return replace(output, from_end=not torch.equal(other.place_N, output.place_N))


def _size(call: PipelineCall, recording: Recording) -> int:
    template = call.template(recording.calls[0][0])
    return sum(leaf.numel() for leaf in tree_leaves(template) if isinstance(leaf, Tensor))


def _learnt_from(call: PipelineCall, text: str, first: Recording, size: int) -> Output:
    template = call.template(first.calls[0][0])
    values_KM = probes(_size(call, first))
    recording = call.record(
        call.options(text, len(values_KM)),
        encoded=first.encoded,
        output=lambda step, inputs: _filled(template, values_KM[step]),
        sample=lambda step, sample: sample,
        last_step=len(values_KM) - 1,
    )
    if recording.outputs[0].numel() != size:
        raise ValueError(
            f"its scheduler gets an output of {recording.outputs[0].numel()} numbers where latents have {size}"
        )
    order = read(values_KM, torch.stack([output.flatten() for output in recording.outputs]))
    factors = set() if order is None else set(order.factor_M.tolist())
    if order is None or order.offset_M.any() or not order.touched_M.all() or len(factors) != 1:
        raise ValueError("its scheduler gets something else than the network's output in another order")
    return _placed(call, template, order.place_M, factors.pop())


def _placed(call: PipelineCall, template: Any, place_N: Tensor, sign: float) -> Output:
    start = 0
    for path, leaf in _paths(template):
        if (place_N >= start).all() and (place_N < start + leaf.numel()).all():
            place_N = place_N - start
            listed = _is_list_of_rows(call, path)
            return Output(path[:-1] if listed else path, listed, place_N, sign, leaf.numel())
        start += leaf.numel()
    raise ValueError("its scheduler gets parts of several outputs of the network")


def _is_list_of_rows(call: PipelineCall, path: tuple[Any, ...]) -> bool:
    """Whether the last key counts rows: a call of two has then two of them."""
    if len(path) < 2 or call.pair is None:
        return False
    both = call.template(call.pair)
    for key in path[:-1]:
        both = both[key]
    return isinstance(both, list) and len(both) == 2


def _paths(output: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Tensor]]:
    """The tensors in an output, in the order of `tree_flatten`, with the keys that lead to them."""
    if isinstance(output, Tensor):
        return [(path, output)]
    if isinstance(output, Mapping):
        return [leaf for key in output for leaf in _paths(output[key], (*path, key))]
    if isinstance(output, list | tuple):
        return [leaf for place, part in enumerate(output) for leaf in _paths(part, (*path, place))]
    return []


def _filled(template: Any, values_M: Tensor) -> Any:
    """The output with these numbers, in the order of `_paths`."""
    start = 0

    def fill(leaf: Any) -> Any:
        nonlocal start
        if not isinstance(leaf, Tensor):
            return leaf
        part = values_M[start : start + leaf.numel()].reshape(leaf.shape).to(leaf)
        start += leaf.numel()
        return part

    return tree_map(fill, template)
