"""Settings: frozen dataclasses that declare a field once, with its default, its rule and its help text.

A room's settings stand in its own `settings.py`, without torch. `progrpo.config` composes them.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from progrpo.messages import is_one_line, named, nearest, quoted

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

# --- declaring a field ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A condition on a field's value beyond its type, and its text as it ends the sentence "FIELD must be ...".

    `hint` gives a clause about a value that breaks it, such as the nearest right one; without it there is none.
    """

    holds: Callable[[Any], object]
    text: str
    hint: Callable[[Any], str] = lambda value: ""

    def or_empty(self, effect: str = "") -> Rule:
        """The rule for a field that may also be None; `effect` says what None does."""
        return Rule(lambda value: value is None or self.holds(value), f"{self.text}, or empty{effect}")


def at_least(low: float) -> Rule:
    return Rule(lambda value: low <= value < math.inf, f"at least {low}")


def above(low: float) -> Rule:
    return Rule(lambda value: low < value < math.inf, f"above {low}")


def between(low: float, high: float) -> Rule:
    return Rule(lambda value: low <= value <= high, f"between {low:,} and {high:,}")


def matches(pattern: str, text: str) -> Rule:
    return Rule(lambda value: re.fullmatch(pattern, value), text)


FINITE = Rule(math.isfinite, "a finite number")
FRACTION = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
SHARE = Rule(lambda value: 0 < value <= 1, "above 0 and at most 1")
NUM_STEPS = between(1, 1000)  # diffusion models have a thousand levels, and flow models need no more
DEVICE_PATTERN = r"auto|(cpu|cuda|mps|xpu|npu|hpu)(:\d{1,2})?"
DEVICE = matches(DEVICE_PATTERN, "auto, or a device by torch's name, such as cpu or cuda:0")


def setting(default: T, rule: Rule) -> T:
    """A field with a default and a rule that its values keep."""
    return field(default=default, metadata={"rule": rule})


class Values(dict[str, object]):
    """A JSON object whose fields only the user's own code knows."""

    @classmethod
    def from_text(cls, text: str) -> Values:
        """Read JSON. ValueError for a text that holds no JSON object."""
        try:
            data = from_json(text)
        except ValueError as error:
            raise ValueError(f"{quoted(text)} is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f'{quoted(text)} is not a JSON object, such as {{"beta": 1}}')
        return cls(data)

    def to_text(self) -> str:
        """Write JSON that `from_text` reads."""
        return json.dumps(self)

    def __hash__(self) -> int:  # type: ignore[override]  # settings are frozen, and keys of caches
        return hash(self.to_text())


field_types: Callable[[type], Mapping[str, Any]] = cache(get_type_hints)
"""The type of each field of a class. It is kept, since Python compiles every annotation to know it."""


# --- checking values --------------------------------------------------------------------------------------------------


def flat(settings: DataclassInstance, prefix: str = "") -> Iterator[tuple[str, object, Rule | None]]:
    """Yield path, value and rule of every field, also of nested settings and of lists of settings."""
    for f in fields(settings):
        path, value = prefix + f.name, getattr(settings, f.name)
        yield path, value, f.metadata.get("rule")
        if is_dataclass(value) and not isinstance(value, type):
            yield from flat(value, f"{path}.")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if is_dataclass(item) and not isinstance(item, type):
                    yield from flat(item, f"{path}[{i}].")


def check_rules(settings: DataclassInstance, prefix: str = "") -> None:
    """Raise ValueError, one sentence with the field and what it must be, for the first value that breaks a rule."""
    for path, value, rule in flat(settings, prefix):
        if rule is not None and not rule.holds(value):
            raise ValueError(f"{path} must be {rule.text}, not {quoted(value)}{rule.hint(value)}")


def check_kinds(kind: type, value: object, path: str = "config") -> None:
    """Raise ValueError where a section is not of its class.

    A dict in its place would be read by JSON's rules and fail later.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{path} must be a progrpo.config.{kind.__name__}, not {quoted(value)}")
    for name, hint in field_types(kind).items():
        own = f"{path}.{name}".removeprefix("config.")
        listed = next((item for item in get_args(hint) if isinstance(item, type) and is_dataclass(item)), None)
        if isinstance(hint, type) and is_dataclass(hint):
            check_kinds(hint, getattr(value, name), own)
        items = getattr(value, name)
        if listed is not None and isinstance(items, list | tuple):
            for i, item in enumerate(items):
                check_kinds(listed, item, f"{own}[{i}]")


# --- to JSON and back -------------------------------------------------------------------------------------------------


def as_data(value: object) -> object:
    """Settings as dicts, and all else unchanged.

    Unlike `asdict`, it does not copy the objects that Python code has put into fields.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_data(getattr(value, f.name)) for f in fields(value)}
    if type(value) is tuple:
        return tuple(map(as_data, value))
    return list(map(as_data, value)) if type(value) is list else value


def from_json(text: str) -> object:
    """Read JSON data. ValueError also for a field that is given twice, and for endless nesting."""
    try:
        data: object = json.loads(text, object_pairs_hook=_without_duplicates)
        return data
    except RecursionError:
        raise ValueError("lists or objects are nested without end") from None


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in data if names.count(name) > 1)
        raise ValueError(f"{named(duplicate)} is given twice; leave one out")
    return data


@cache
def field_paths(kind: type[DataclassInstance], prefix: str = "") -> tuple[str, ...]:
    """The paths of all fields, as the command line and messages name them: `seed`, `sampling.noise_level`, ..."""
    hints = field_types(kind)
    nested = [field_paths(hints[f.name], f"{prefix}{f.name}.") for f in fields(kind) if is_dataclass(hints[f.name])]
    own = [prefix + f.name for f in fields(kind) if not is_dataclass(hints[f.name])]
    return (*own, *(path for paths in nested for path in paths))


def read_settings(kind: type[T], data: object, prefix: str = "", options: Sequence[str] = ()) -> T:
    """The settings that JSON data describe; missing fields keep their defaults.

    ValueError on a value of another type, and on an unknown field, with the nearest right name among its own fields
    and `options`, the paths that the command line knows.
    """
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{prefix.rstrip('.') or 'a configuration'} must be an object of named fields, not {quoted(data)}"
        )
    all_hints = field_types(kind)
    own = fields(cast("type[DataclassInstance]", kind))
    hints = {f.name: all_hints[f.name] for f in own}
    for name in data:
        if name not in hints:
            close = _close_to(kind, prefix, name, hints, options) if isinstance(name, str) else ""
            raise ValueError(f"{prefix}{named(name)} is not a field{close}")
    required = [f.name for f in own if f.default is MISSING and f.default_factory is MISSING]
    for name in required:
        if name not in data:
            raise ValueError(f"{prefix}{name} is missing; every {kind.__name__} needs one")
    return kind(**{name: _read(hints[name], value, prefix + name, options) for name, value in data.items()})


def _close_to(kind: type, prefix: str, name: str, hints: Iterable[str], options: Sequence[str]) -> str:
    if hasattr(kind, "from_text"):  # an item of a list, whose fields are no options of the command line
        return nearest(name, hints) or f"; a reward has {', '.join(hints)}"
    return nearest(prefix + name, [*(prefix + hint for hint in hints), *options])


def _read(kind: object, value: object, path: str, options: Sequence[str]) -> object:
    """A JSON value as the field type `kind`, which may turn a list into a tuple and a whole number into a float."""
    if isinstance(value, str) and (from_text := getattr(kind, "from_text", None)):
        return from_text(value)
    if is_dataclass(kind):
        return read_settings(cast(type, kind), value, path + ".", options)
    if kind is Values and isinstance(value, Mapping):
        return Values(value)
    choices = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        if str in choices and isinstance(value, str):  # built-in names, or the user's own
            return _read(str, value, path, options)
        if value is None and types.NoneType in choices:
            return None
        return _read(_of_shape(choices, value), value, path, options)
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        kinds = (choices[0],) * len(value) if choices[-1] is Ellipsis else choices
        if len(kinds) == len(value):
            items = enumerate(zip(kinds, value, strict=True))
            return tuple(_read(item_kind, item, f"{path}[{i}]", options) for i, (item_kind, item) in items)
    if isinstance(value, int) and abs(value) >= _HUGE:
        raise ValueError(f"{path} must be below 2**63, not {quoted(value)}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, str) and not (len(value) <= _LONG and is_one_line(value)):
        raise ValueError(f"{path} must be a text of one line, {_LONG} characters at most, not {quoted(value)}")
    if value in choices if get_origin(kind) is Literal else _is_plain(kind, value):
        return value
    raise ValueError(f"{path} must be {_describe_type(kind)}, not {quoted(value)}")


def _of_shape(choices: Sequence[object], value: object) -> object:
    """The type of a union that a value is read as: a list as the union's tuple, if it has one."""
    kinds = [kind for kind in choices if kind is not types.NoneType]
    matching = [kind for kind in kinds if (get_origin(kind) is tuple) == isinstance(value, list | tuple)]
    return (matching or kinds)[0]


_HUGE = 2**63  # the first whole number that torch's integers do not hold
_LONG = 4096  # the longest path of most systems


def _is_plain(kind: object, value: object) -> bool:
    return (
        isinstance(kind, type)
        and get_origin(kind) is None
        and isinstance(value, kind)
        and (kind is bool or not isinstance(value, bool))
    )


_TYPE_NAMES: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Values: "an object",
}


def _describe_type(kind: object) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        items = get_args(kind)
        return "a list" if items[-1] is Ellipsis else f"a list of {len(items)}"
    return _TYPE_NAMES[kind]
