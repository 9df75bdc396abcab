"""Arguments of a denoiser's call: what each is made of, and how it is made anew for other rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from progrpo.policies.learnt.rearranged import in_order

LENGTH = ".length"
"""The ending of a tensor of a condition that says how much of a padded one is there."""


@dataclass(frozen=True)
class Given:
    """The inputs of a call of B rows; latents (B, N) in the pipeline's order."""

    x_BN: Tensor
    timestep_B: Tensor
    guidance_B: Tensor | None
    condition: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.x_BN)


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
        if not equal(value[0] if self.rows == "list" else value, self.value):
            raise ValueError(f"{path} differs from what it was for the texts that the pipeline was learnt from")
        return {}


@dataclass(frozen=True, eq=False)
class FromText(Argument):
    """A tensor of the condition that a prompt gives, padded along `ragged` where its length depends on the text."""

    name: str
    dtype: torch.dtype
    rows: str
    ragged: int | None
    shape: tuple[int, ...]
    """The shape of a row in the condition, with the longest length."""
    source: str = "text"
    """Whether the prompt's `text` gives it, its `picture`, or `both` together."""
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
        row = row_of(value, self.rows)
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
        row = row_of(value, self.rows).flatten()
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


def renamed(argument: Argument, names: Mapping[str, str]) -> Argument:
    """The argument with other names for the tensors of a condition."""
    if isinstance(argument, Parts):
        return replace(argument, parts={key: renamed(part, names) for key, part in argument.parts.items()})
    if isinstance(argument, FromText) and argument.name in names:
        return replace(argument, name=names[argument.name])
    return argument


def row_of(value: Any, rows: str) -> Any:
    """The first row of a value that is one for `all` rows, for `each`, or in a `list`."""
    return value if rows == "all" else value[0]


def equal(a: Any, b: Any) -> bool:
    """Whether two values are the same; tensors by shape and numbers."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)
