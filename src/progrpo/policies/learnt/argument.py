"""Arguments of a denoiser's call: what each is made of, learnt by comparing calls that differ in one thing.

An argument is the same in all calls, or it depends on the text, on the latents, on the timestep or on the guidance
scale. One that depends on anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from progrpo.policies.learnt.rearranged import in_order, probes, read

LENGTH = ".length"
"""The ending of a tensor of a condition that says how much of a padded one is there."""


@dataclass(frozen=True)
class Given:
    """What a call of B rows is made of; latents (B, N) in the pipeline's order."""

    x_BN: Tensor
    timestep_B: Tensor
    guidance_B: Tensor | None
    condition: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.x_BN)


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


class Argument:
    """The making of one argument, for all rows, for `each` along the first dimension, or in a `list` of rows."""

    rows: str

    def make(self, given: Given) -> Any:
        raise NotImplementedError

    def row(self, value: Any, place: int) -> Any:
        """The value of one row, of a call of several."""
        if self.rows == "list":
            return [value[place]]
        whole = self.rows == "all" or not isinstance(value, Tensor) or value.ndim == 0 or len(value) == 1
        return value if whole else value[place : place + 1]

    def text(self, value: Any, path: str) -> dict[str, Tensor]:
        """The tensors of a prompt that the argument needs, out of a call of one row; each with a first dimension of 1.

        ValueError where what should be the same for all prompts is not.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Fixed(Argument):
    """A value that is the same in all calls: for all rows, for each, or in a list of rows."""

    value: Any
    rows: str = "all"

    def make(self, given: Given) -> Any:
        if self.rows == "list":
            return [self.value] * len(given)
        if self.rows == "each":
            return self.value.expand(len(given), *self.value.shape[1:])
        return self.value

    def text(self, value: Any, path: str) -> dict[str, Tensor]:
        if not _equal(_first(value) if self.rows == "list" else value, self.value):
            raise ValueError(f"{path} differs from what it was for the texts that the pipeline was learnt from")
        return {}


@dataclass(frozen=True, eq=False)
class FromText(Argument):
    """What a prompt gives: a tensor of the condition, padded along `ragged` where its length depends on the text."""

    name: str
    dtype: torch.dtype
    rows: str
    ragged: int | None
    shape: tuple[int, ...]
    """The shape of a row in the condition, with the longest length."""
    source: str = "text"
    """Whether the prompt's `text` gives it or its `picture`."""
    number: bool = False
    """Whether it is a whole number of Python."""

    @property
    def length_name(self) -> str:
        return self.name + LENGTH

    def make(self, given: Given) -> Any:
        if self.rows == "each" and self.ragged is None:
            return self._values(given.condition)
        rows = self.tensors(given.condition)
        if self.number:
            return [int(row) for row in rows] if self.rows == "list" else int(rows[0])
        if self.rows == "list":
            return rows
        return torch.stack(rows) if self.rows == "each" else rows[0]

    def _values(self, condition: Mapping[str, Tensor]) -> Tensor:
        values = condition[self.name]
        return values if self.dtype.is_floating_point else values.to(self.dtype)

    def tensors(self, condition: Mapping[str, Tensor]) -> list[Tensor]:
        """The rows, each of its own length."""
        values = self._values(condition)
        if self.ragged is None:
            return list(values)
        lengths = condition[self.length_name].tolist()
        return [row.narrow(self.ragged, 0, int(length)) for row, length in zip(values, lengths, strict=True)]

    def text(self, value: Any, path: str) -> dict[str, Tensor]:
        row = _row(value, self.rows)
        row = torch.tensor(row) if self.number else row
        if self.ragged is None:
            if tuple(row.shape) != self.shape:
                raise ValueError(f"{path} has the shape {tuple(row.shape)} for this text, and {self.shape} for others")
            return {self.name: row[None]}
        length, most = row.shape[self.ragged], self.shape[self.ragged]
        if length > most:
            raise ValueError(
                f"{path} has a length of {length} for this text, and at most {most} were counted on; shorten it"
            )
        padded = row.new_zeros(self.shape)
        padded.narrow(self.ragged, 0, length).copy_(row)
        return {self.name: padded[None], self.length_name: torch.tensor([length])}


@dataclass(frozen=True, eq=False)
class FromLatents(Argument):
    """The latents in the network's order, with other numbers behind or between them."""

    size: int
    """The number of latents, N."""
    place_M: Tensor
    """The places in the latents and, from N on, in what stands beside them."""
    beside: Fixed | FromText | None
    rows: str
    shape: tuple[int, ...]

    def make(self, given: Given) -> Any:
        x_BN = given.x_BN
        if self.beside is not None:
            x_BN = torch.cat([x_BN, self.beside.make(given).to(x_BN)], 1)
        leaf = in_order(x_BN, self.place_M.to(x_BN.device)).reshape(len(given), *self.shape)
        return list(leaf) if self.rows == "list" else leaf

    def text(self, value: Any, path: str) -> dict[str, Tensor]:
        if self.beside is None:
            return {}
        row = _row(value, self.rows).flatten()
        return self.beside.text(row[(self.place_M >= self.size).to(row.device)][None], path)


@dataclass(frozen=True, eq=False)
class FromTimestep(Argument):
    """The timestep as the network counts it."""

    form: Callable[[Tensor], Tensor]
    rows: str
    tail: tuple[int, ...]

    def make(self, given: Given) -> Any:
        value_B = self.form(given.timestep_B)
        rows = value_B.reshape(-1, *(1 for _ in self.tail)).expand(-1, *self.tail)
        return list(rows) if self.rows == "list" else rows

    def text(self, value: Any, path: str) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True, eq=False)
class FromGuidance(Argument):
    """The guidance scale, times a factor, as an input of the network."""

    factor: float
    rows: str = "each"

    def make(self, given: Given) -> Any:
        assert given.guidance_B is not None
        return given.guidance_B * self.factor

    def text(self, value: Any, path: str) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True, eq=False)
class Parts(Argument):
    """A dictionary, list or tuple of arguments."""

    kind: type
    parts: dict[Any, Argument]

    def make(self, given: Given) -> Any:
        made = {key: part.make(given) for key, part in self.parts.items()}
        return made if self.kind is dict else self.kind(made.values())

    def row(self, value: Any, place: int) -> Any:
        parts = {key: part.row(value[key], place) for key, part in self.parts.items()}
        return parts if self.kind is dict else self.kind(parts.values())

    def text(self, value: Any, path: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for key, part in self.parts.items():
            tensors |= part.text(value[key], f"{path}.{key}" if path else str(key))
        return tensors


def leaves(argument: Argument) -> list[Argument]:
    """The arguments that are made of no others."""
    if not isinstance(argument, Parts):
        return [argument]
    return [leaf for part in argument.parts.values() for leaf in leaves(part)]


# --- how they are learnt ----------------------------------------------------------------------------------------------


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
    item = _first(base) if rows == "list" else base
    varied = {
        "text": calls.texts,
        "picture": calls.pictures,
        "scale": calls.scales,
        "t": calls.times,
        "x": calls.latents,
    }
    depends = {name: any(not _equal(value, base) for value in values) for name, values in varied.items()}
    kinds = {name for name, does in depends.items() if does}
    if not kinds:
        return Fixed(item, rows)
    number = isinstance(item, int) and not isinstance(item, bool)
    if not isinstance(item, Tensor) and not (number and kinds == {"text"}):
        raise ValueError(f"{path} is no tensor and depends on {' and '.join(sorted(kinds))}")
    if kinds in ({"text"}, {"picture"}):
        return _learn_text(calls, path, rows, number)
    if kinds == {"t"}:
        return _learn_timestep(calls, probe, path, rows)
    if kinds == {"scale"}:
        return FromGuidance(_learn_factor(calls, probe, path))
    if kinds in ({"x"}, {"x", "text"}, {"x", "picture"}):
        return _learn_latents(calls, probe, path, rows)
    raise ValueError(f"{path} depends on {' and '.join(sorted(kinds))} at once")


def _learn_text(calls: Calls, path: str, rows: str, number: bool) -> FromText:
    values = [_row(value, rows) for value in (calls.base, *calls.texts, *calls.pictures)]
    source = "text" if any(not _equal(value, calls.base) for value in calls.texts) else "picture"
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


def _learn_latents(calls: Calls, probe: Probe, path: str, rows: str) -> FromLatents:
    row = _row(calls.base, rows)
    order = read(probes(probe.size), torch.stack([_row(value, rows).flatten() for value in calls.latents]))
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
    sources = {"text": calls.texts, "picture": calls.pictures}
    by = [
        source
        for source, values in sources.items()
        if any(not _equal(_row(value, rows).flatten()[~touched_M], numbers) for value in values)
    ]
    if by:
        beside = FromText(f"{path}.beside", row.dtype, "each", None, (untouched,), by[0])
    else:
        beside = Fixed(numbers[None], "each")
    return FromLatents(size, place_M, beside, rows, tuple(row.shape))


def _learn_timestep(calls: Calls, probe: Probe, path: str, rows: str) -> FromTimestep:
    values = [_row(value, rows if rows == "list" else "all").double().flatten() for value in calls.times]
    if any((value != value[0]).any() for value in values):
        raise ValueError(f"{path} holds several timesteps at once")
    seen = torch.stack([value[0] for value in values]).cpu()
    item = _first(calls.base) if rows == "list" else calls.base
    tail = tuple(item.shape) if rows == "list" else tuple(item.shape[1:])
    return FromTimestep(_timestep_form(probe, seen, path), "list" if rows == "list" else "each", tail)


def _timestep_form(probe: Probe, seen: Tensor, path: str) -> Callable[[Tensor], Tensor]:
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
        if torch.allclose(form(t).double(), seen, rtol=1e-2 if seen.dtype == torch.bfloat16 else 1e-5, atol=1e-5):
            return form
    raise ValueError(f"{path} follows the timestep by no straight line")


def _learn_factor(calls: Calls, probe: Probe, path: str) -> float:
    values = [float(value.double().mean()) for value in calls.scales]
    factor = values[0] / probe.scales[0]
    if any(abs(value - factor * scale) > 1e-2 * abs(value) for value, scale in zip(values, probe.scales, strict=True)):
        raise ValueError(f"{path} is no multiple of the guidance scale")
    return float(round(factor)) if abs(factor - round(factor)) < 1e-2 and round(factor) else factor


def _row(value: Any, rows: str) -> Any:
    return value if rows == "all" else value[0]


def _first(values: Sequence[Any]) -> Any:
    return values[0]


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are the same; tensors by shape and numbers."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and bool(a == b)


def renamed(argument: Argument, names: Mapping[str, str]) -> Argument:
    """The argument with other names for the tensors of a condition."""
    if isinstance(argument, Parts):
        return replace(argument, parts={key: renamed(part, names) for key, part in argument.parts.items()})
    if isinstance(argument, FromText) and argument.name in names:
        return replace(argument, name=names[argument.name])
    return argument
