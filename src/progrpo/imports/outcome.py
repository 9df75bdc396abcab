"""A setting of another framework, and what becomes of it: the outcome of its rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from progrpo.messages import named, quoted

T = TypeVar("T")
Status = Literal["translated", "not needed here", "no equal here", "could not be read"]
STATUSES: tuple[Status, ...] = ("translated", "not needed here", "no equal here", "could not be read")


@dataclass(frozen=True)
class Outcome:
    """The result of a setting's rule.

    `fields` are the fields of ours that it sets, by path (`sampling.noise_level`, `reward.terms[0].name`).
    """

    status: Status
    note: str = ""
    fields: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """A setting of the source by its dotted name; `all` holds every setting of the source."""

    name: str
    value: object
    all: Mapping[str, object]

    def number(self, other: str = "") -> float:
        """The number that this setting, or the setting `other`, has as its value. ValueError if it is no number."""
        name = other or self.name
        if name not in self.all:
            raise ValueError(
                f"{named(name)} could not be read, and {named(self.name)} depends on it; write it as a number"
            )
        value = self.all[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
            raise ValueError(f"{named(name)} must be a number, not {quoted(value)}")
        return value

    def count(self, other: str = "") -> int:
        """Read a whole number of at least 1, as `number` does."""
        value = self.number(other)
        if value < 1 or value != int(value):
            raise ValueError(f"{named(other or self.name)} must be a whole number of at least 1, not {quoted(value)}")
        return int(value)

    def text(self) -> str:
        """The value as a text. ValueError if it is none."""
        if not isinstance(self.value, str):
            raise ValueError(f"{named(self.name)} must be a text, not {quoted(self.value)}")
        return self.value

    def one_of(self, choices: Mapping[str, T]) -> T:
        """The choice that the value, in small letters, names. ValueError, with the choices, if it names none."""
        text = str(self.value).lower()
        if text not in choices:
            raise ValueError(f"{named(self.name)} must be one of {', '.join(choices)}, not {quoted(self.value)}")
        return choices[text]


Rule = Callable[[Setting], Outcome]


@dataclass(frozen=True)
class Row:
    """A setting with its value and its outcome."""

    name: str
    value: object
    outcome: Outcome


@dataclass(frozen=True)
class Unread:
    """The place and text of an expression that could not be read; it stands where its value would."""

    file: str
    line: int
    text: str

    @property
    def outcome(self) -> Outcome:
        return Outcome("could not be read", f"{self.file}, line {self.line}; our default holds")


def to_fields(fields: Mapping[str, object], note: str = "") -> Outcome:
    """The outcome of a setting that these fields of ours take up."""
    shown = ", ".join(f"{path} {shortened(value)}" for path, value in fields.items())
    return Outcome("translated", "; ".join(filter(None, (shown, note))), fields)


def not_needed(why: str) -> Outcome:
    return Outcome("not needed here", why)


def no_equal(why: str, fields: Mapping[str, object] | None = None) -> Outcome:
    return Outcome("no equal here", why, fields or {})


def counted_in(path: str) -> Outcome:
    return Outcome("translated", f"counted in {path}")


_LONGEST_TEXT = 44


def shortened(value: object) -> str:
    """The value as a text of at most `_LONGEST_TEXT` characters."""
    if isinstance(value, float):
        text = f"{value:g}"
    else:
        text = value if isinstance(value, str) and value.isprintable() else quoted(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:13]}...{text[3 - _LONGEST_TEXT + 13 :]}"
