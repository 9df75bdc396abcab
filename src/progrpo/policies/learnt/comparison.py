"""Learning of an argument of a denoiser's call, by comparing calls that differ in one thing.

An argument is the same in all calls, or it depends on the text, on the latents, on the timestep or on the guidance
scale. One that depends on anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from progrpo.policies.learnt.argument import (
    Argument,
    Fixed,
    FromGuidance,
    FromLatents,
    FromText,
    FromTimestep,
    Parts,
    equal,
    row_of,
)
from progrpo.policies.learnt.rearranged import probes, read


@dataclass(frozen=True)
class Calls:
    """One argument, or a part of one, in calls that differ in one thing from `base`, which has one row."""

    base: Any
    pair: Any
    """A call of two equal rows; None where the pipeline makes none."""
    texts: list[Any]
    pictures: list[Any]
    """With another picture to change; none for a pipeline that changes no pictures."""
    scales: list[Any]
    """With guidance scales, for a network that takes it as an input."""
    times: list[Any]
    latents: list[Any]
    """With the values of `rearranged.probes` as latents."""

    def part(self, of: Callable[[Any], Any]) -> Calls:
        lists = (self.texts, self.pictures, self.scales, self.times, self.latents)
        pair = None if self.pair is None else of(self.pair)
        return Calls(of(self.base), pair, *([of(value) for value in values] for values in lists))


@dataclass(frozen=True)
class Probe:
    """The values by which calls differ."""

    size: int
    """The number of latents."""
    timesteps: Tensor
    scales: tuple[float, ...]
    num_train_timesteps: int


def learn(calls: Calls, probe: Probe, path: str = "") -> Argument:
    """The making of an argument. ValueError, a part of a sentence, where it is of no known kind."""
    base, pair = calls.base, calls.pair
    if isinstance(base, Mapping):
        return Parts(dict, {key: _part(calls, probe, path, key) for key in base})
    if isinstance(base, list | tuple):
        if len(base) == 1 and isinstance(base, list) and (pair is None or len(pair) == 2):
            return _learn_leaf(calls, probe, path, "list")
        kind = list if isinstance(base, list) else tuple
        if _sizes(calls) != {len(base)}:
            raise ValueError(f"{path} has another number of parts in each call")
        return Parts(kind, {place: _part(calls, probe, path, place) for place in range(len(base))})
    return _learn_leaf(calls, probe, path, _rows_of(base, pair))


def _part(calls: Calls, probe: Probe, path: str, key: Any) -> Argument:
    return learn(calls.part(lambda value: value[key]), probe, f"{path}.{key}" if path else str(key))


def _sizes(calls: Calls) -> set[int]:
    lists = (calls.texts, calls.pictures, calls.scales, calls.times, calls.latents)
    return {len(value) for value in (calls.base, *(value for values in lists for value in values))}


def _rows_of(base: Any, pair: Any) -> str:
    if not isinstance(base, Tensor) or base.ndim == 0:
        return "all"
    if pair is None:
        return "each" if base.shape[0] == 1 else "all"
    return "each" if base.shape[0] == 1 and pair.shape == (2, *base.shape[1:]) else "all"


def _learn_leaf(calls: Calls, probe: Probe, path: str, rows: str) -> Argument:
    base = calls.base
    item = base[0] if rows == "list" else base
    varied = {
        "text": calls.texts,
        "picture": calls.pictures,
        "scale": calls.scales,
        "t": calls.times,
        "x": calls.latents,
    }
    depends = {name: any(not equal(value, base) for value in values) for name, values in varied.items()}
    kinds = {name for name, does in depends.items() if does}
    if not kinds:
        return Fixed(item, rows)
    number = isinstance(item, int) and not isinstance(item, bool)
    if not isinstance(item, Tensor) and not (number and kinds == {"text"}):
        raise ValueError(f"{path} is no tensor and depends on {' and '.join(sorted(kinds))}")
    if kinds <= {"text", "picture"}:
        return _learn_text(calls, path, rows, number)
    if kinds == {"t"}:
        return _learn_timestep(calls, probe, path, rows)
    if kinds == {"scale"}:
        return FromGuidance(_learn_factor(calls, probe, path))
    if "x" in kinds and kinds <= {"x", "text", "picture"}:
        return _learn_latents(calls, probe, path, rows)
    raise ValueError(f"{path} depends on {' and '.join(sorted(kinds))} at once")


def _learn_text(calls: Calls, path: str, rows: str, number: bool) -> FromText:
    values = [row_of(value, rows) for value in (calls.base, *calls.texts, *calls.pictures)]
    source = _source(calls, lambda value: value)
    if number:
        return FromText(path, torch.int64, rows, None, (), source, number=True)
    first, shapes = values[0], [tuple(value.shape) for value in values]
    if len({len(shape) for shape in shapes}) > 1:
        raise ValueError(f"{path} has another number of dimensions for each text")
    varied = [dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    if len(varied) > 1 or (rows == "all" and not varied):
        raise ValueError(f"{path} is one for all rows and depends on the text")
    shape = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    return FromText(path, first.dtype, rows, varied[0] if varied else None, shape, source)


def _source(calls: Calls, of: Callable[[Any], Any]) -> str:
    """The source of this part of an argument: `text`, `picture`, `both`, or empty where no prompt gives it."""
    by = [
        source
        for source, values in (("text", calls.texts), ("picture", calls.pictures))
        if any(not equal(of(value), of(calls.base)) for value in values)
    ]
    return "both" if len(by) == 2 else "".join(by)


def _learn_latents(calls: Calls, probe: Probe, path: str, rows: str) -> FromLatents:
    row = row_of(calls.base, rows)
    order = read(probes(probe.size), torch.stack([row_of(value, rows).flatten() for value in calls.latents]))
    if order is None or not (order.factor_M[order.touched_M] == 1).all() or order.offset_M[order.touched_M].any():
        raise ValueError(f"{path} is made of the latents by more than another order of their numbers")
    touched_M, size = order.touched_M, probe.size
    untouched = int((~touched_M).sum())
    place_M = order.place_M.clone()
    place_M[~touched_M] = size + torch.arange(untouched)
    if not untouched:
        return FromLatents(size, place_M, None, rows, tuple(row.shape))
    numbers = row.flatten()[~touched_M.to(row.device)]
    beside: Fixed | FromText
    source = _source(calls, lambda value: row_of(value, rows).flatten()[~touched_M])
    if source:
        beside = FromText(f"{path}.beside", row.dtype, "each", None, (untouched,), source)
    else:
        beside = Fixed(numbers[None], "each")
    return FromLatents(size, place_M, beside, rows, tuple(row.shape))


def _learn_timestep(calls: Calls, probe: Probe, path: str, rows: str) -> FromTimestep:
    values = [row_of(value, rows if rows == "list" else "all").double().flatten() for value in calls.times]
    if any((value != value[0]).any() for value in values):
        raise ValueError(f"{path} holds several timesteps at once")
    seen = torch.stack([value[0] for value in values]).cpu()
    item = calls.base[0] if rows == "list" else calls.base
    tail = tuple(item.shape) if rows == "list" else tuple(item.shape[1:])
    low = item.dtype in (torch.bfloat16, torch.float16)
    return FromTimestep(_timestep_form(probe, seen, path, low), "list" if rows == "list" else "each", tail)


def _timestep_form(probe: Probe, seen: Tensor, path: str, low: bool) -> Callable[[Tensor], Tensor]:
    """The timestep as the network counts it, of what was seen, rounded to half of the digits if `low`."""
    count, t = probe.num_train_timesteps, probe.timesteps.float()
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t / count,
        lambda t: (count - t) / count,
        lambda t: 1 - t / count,
        lambda t: count - t,
    ]
    for form in forms:
        if torch.equal(form(t).double(), seen):
            return form
    slope, start = torch.linalg.lstsq(torch.stack([t, torch.ones_like(t)], 1).double(), seen[:, None]).solution[:, 0]
    slope, start = float(slope), float(start)
    for form in (*forms, lambda t: slope * t, lambda t: slope * t + start):
        if torch.allclose(form(t).double(), seen, rtol=1e-2 if low else 1e-5, atol=1e-5):
            return form
    raise ValueError(f"{path} follows the timestep by no straight line")


def _learn_factor(calls: Calls, probe: Probe, path: str) -> float:
    values = [float(value.double().mean()) for value in calls.scales]
    factor = values[0] / probe.scales[0]
    if any(abs(value - factor * scale) > 1e-2 * abs(value) for value, scale in zip(values, probe.scales, strict=True)):
        raise ValueError(f"{path} is no multiple of the guidance scale")
    return float(round(factor)) if abs(factor - round(factor)) < 1e-2 and round(factor) else factor
