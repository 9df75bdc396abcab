"""The translation of another framework's settings. Each has a rule and ends in exactly one list, so none is lost."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from progrpo.config import Config, check, from_dict
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


@dataclass(frozen=True)
class Translation:
    """The configuration that a file of settings asks for, and the outcome of each setting."""

    config: Config
    rows: tuple[Row, ...]


def to_fields(fields: Mapping[str, object], note: str = "") -> Outcome:
    """The outcome of a setting that these fields of ours take up."""
    shown = ", ".join(f"{path} {_shortened(value)}" for path, value in fields.items())
    return Outcome("translated", "; ".join(filter(None, (shown, note))), fields)


def not_needed(why: str) -> Outcome:
    return Outcome("not needed here", why)


def no_equal(why: str, fields: Mapping[str, object] | None = None) -> Outcome:
    return Outcome("no equal here", why, fields or {})


MOST_SETTINGS = 10_000
_MOST_DEPTH = 32
_MOST_BYTES = 1_000_000


def read_bytes(path: Path) -> bytes:
    """The content of a settings file. ValueError if there is no file, it cannot be read, or it is too large."""
    if not os.path.isfile(path):
        raise ValueError(f"{named(path)} is no file; give the path of the settings")
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{named(path)} cannot be read: {error.strerror}") from None
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{named(path)} is no settings file: over {_MOST_BYTES // 10**6} MB")
    return content


def flatten(data: object) -> dict[str, object]:
    """The settings of nested objects by dotted names; those in a list of objects are named `name[0].part`.

    An empty object is itself a value. ValueError if there are more settings than any configuration has. Items of lists
    count too, so that data whose parts are shared many times, or contain themselves, are refused.
    """
    settings: dict[str, object] = {}
    count = 0
    for name, value in _leaves(data, "", 0):
        settings[name] = value
        for _ in walk(value):
            count += 1
            if count > MOST_SETTINGS:
                raise ValueError(f"there are more than {MOST_SETTINGS:,} settings, so this is no configuration")
    return settings


def walk(value: object) -> Iterator[object]:
    """The value, and the values that its lists and objects contain; without end if it contains itself."""
    stack = [iter([value])]
    while stack:
        for item in stack[-1]:
            yield item
            if isinstance(item, Mapping | list | tuple):
                stack.append(iter(item.values() if isinstance(item, Mapping) else item))
                break
        else:
            stack.pop()


def _leaves(value: object, name: str, depth: int) -> Iterator[tuple[str, object]]:
    if depth > _MOST_DEPTH:
        raise ValueError(f"{named(name)} holds settings in one another without end")
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{name}[{i}]", depth + 1)
    else:
        yield name, value


# --- rules that many settings share -----------------------------------------------------------------------------------


def to_field(path: str, note: str = "") -> Rule:
    """The rule of a setting for which we have a field of the same meaning."""
    return lambda setting: to_fields({path: setting.value}, note)


def to_choice(path: str, choices: Mapping[str, object]) -> Rule:
    """The rule of a setting for which we have a field of the same meaning, with other names for its values."""
    return lambda setting: to_fields({path: setting.one_of(choices)})


def mixed_precision(setting: Setting) -> Outcome:
    """The outcome of accelerate's `mixed_precision`."""
    dtype = setting.one_of({"fp16": "float16", "bf16": "bfloat16", "no": "float32"})
    return to_fields({"model.dtype": dtype}, "losses are scaled, as there" if dtype == "float16" else "")


def lora_to_train_further(setting: Setting) -> Outcome:
    """The outcome of a LoRA that is trained further; in all frameworks the reference is the model without it."""
    return to_fields(
        {"model.lora": setting.text()},
        "it keeps its rank, alpha and layers; a KL is measured from the model with it, there from the model without",
    )


def group_outcome(size: object, pairs: bool, note: str = "no pruning; --plan.preset standard prunes") -> Outcome:
    """The outcome of a group's size, without pruning. Where `pairs` are learnt, they are a group's best and worst."""
    fields: dict[str, object] = {"plan.preset": "custom", "plan.group_size": size}
    if not pairs:
        return to_fields(fields, note)
    if isinstance(size, int) and size > 2:
        fields["plan.final_keep"] = 2
    return to_fields(fields, "the best and the worst of a group are its pair")


def part_of(path: str) -> Rule:
    """The rule of a setting that enters a field of ours which another setting's rule sets."""
    return lambda setting: counted_in(path)


def counted_in(path: str) -> Outcome:
    return Outcome("translated", f"counted in {path}")


def ignored(why: str) -> Rule:
    return lambda setting: not_needed(why)


def only_at(*values: object, why: str, otherwise: str) -> Rule:
    """The rule of a setting that is not needed at these values and has no equal at any other."""
    return lambda setting: not_needed(why) if setting.value in values else no_equal(otherwise)


UNIPC_LEVELS = (
    "its levels are .999 (1 - i / T) before the shift; ours are Euler's, from 1 to .001, with the model's own shift"
)
"""The difference of Wan's scheduler in both frameworks."""


def with_prefixes(names: Iterable[str], rules: Mapping[str, Rule], prefixes: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rules, and the rule of a prefix for each name without a rule that begins with it."""
    known = {_without_keys(name) for name in names}
    of_prefixes = {name: rule for name in known for prefix, rule in prefixes.items() if name.startswith(prefix)}
    return {**of_prefixes, **rules}


def _without_keys(name: str) -> str:
    """The name as rules have it, with empty brackets."""
    return re.sub(r"\[[^]]*\]", "[]", name)


# --- rewards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NearestReward:
    """Our reward that is nearest to one of another framework, whose value is `factor` times ours.

    `difference` is a clause with any other difference; empty if there is none.
    """

    name: str
    factor: float = 1.0
    difference: str = ""


def reward_outcome(
    place: str, own: str, nearest: NearestReward | None, weight: float | None, what: str = ""
) -> Outcome:
    """The outcome of a reward that becomes the term `own` at `place`.

    Its weight, if any, is converted so that both frameworks add the same numbers. A reward without an equal still gets
    a term: the nearest of ours, or a function that the user writes. `what` describes what that function computes.
    """
    factor = nearest.factor if nearest else 1.0
    fields: dict[str, object] = {f"{place}.name": own}
    if weight is not None:
        fields[f"{place}.weight"] = weight if factor == 1 else round(weight * factor, 9)
    scale = ""
    if factor != 1 and weight is not None:
        scale = f"weight {weight:g} there, whose reward is {factor:.6g} times ours"
    if nearest is None:
        described = f" ({what})" if what else ""
        return no_equal(
            f"no built-in reward{described}; the configuration names {own}, a function for you to write"
            " (docs/rewards.md)",
            fields,
        )
    if nearest.difference:
        return no_equal("; ".join(filter(None, (f"{own} is nearest: {nearest.difference}", scale))), fields)
    return to_fields(fields, scale)


# --- all of them together ---------------------------------------------------------------------------------------------


def translate(
    source: Path,
    settings: Mapping[str, object],
    rules: Mapping[str, Rule],
    unread: Iterable[Row] = (),
    defaults: Container[str] = (),
) -> Translation:
    """A checked configuration from a file's settings and their rules.

    A rule's name has `[]` where settings have an index or a key in brackets. A setting without a rule has no equal.
    `defaults` are names of settings that the file leaves out; they are listed as defaults. `unread` are settings that
    could not be read. ValueError, one sentence with the file and the setting or field, if a rule does not know a value
    or the configuration cannot be run.
    """
    rows = list(unread)
    data: dict[str | int, object] = {}
    written: set[str] = set()
    try:
        for name, value in settings.items():
            rule = rules.get(_without_keys(name), _unknown)
            outcome = rule(Setting(name, value, settings))
            rows.append(Row(f"{name} (its default)" if name in defaults else name, value, outcome))
            for path, ours in outcome.fields.items():
                _put(data, path, ours)
                written.add(path.partition("[")[0])
        for path, what in _NEEDED.items():
            if path not in written and not (path == "prompts.source" and "prompts.pairs" in written):
                rows.append(Row(what, None, no_equal(f"the file names none that can be used; give --{path}")))
        config = from_dict({str(key): _with_lists(value) for key, value in data.items()})
        check(config)
    except ValueError as error:
        raise ValueError(f"{named(source)} asks for what cannot be run here: {error}") from None
    return Translation(config, tuple(rows))


# Fields whose defaults are of the built-in world, which no file of another framework means.
_NEEDED = {"model.path": "a model", "prompts.source": "a prompt file", "reward.terms": "a reward"}


def _unknown(setting: Setting) -> Outcome:
    return no_equal("not a setting that this import knows")


def _put(data: dict[str | int, object], path: str, value: object) -> None:
    *parents, last = [int(step) if step.isdigit() else step for step in re.findall(r"[^.\[\]]+", path)]
    for step in parents:
        child = data.setdefault(step, {})
        assert isinstance(child, dict), f"two settings write {path}"
        data = child
    assert last not in data, f"two settings write {path}"
    data[last] = value


def _with_lists(data: object) -> object:
    """Replace each object whose keys are numbers by a list in the order of the keys."""
    if not isinstance(data, dict):
        return data
    if data and all(isinstance(key, int) for key in data):
        return [_with_lists(data[key]) for key in sorted(data)]
    return {key: _with_lists(value) for key, value in data.items()}


# --- printing ---------------------------------------------------------------------------------------------------------


def as_tables(translation: Translation) -> str:
    """A table for each status that occurs: name, value and note of each setting."""
    rows = translation.rows
    name_width = max((len(named(row.name)) for row in rows), default=0)
    value_width = max((len(_shortened(row.value)) for row in rows), default=0)
    lines = []
    for status in STATUSES:
        listed = [row for row in rows if row.outcome.status == status]
        if listed:
            lines += ["", f"{status} ({len(listed)})"]
        for row in listed:
            name, value = named(row.name), _shortened(row.value)
            lines.append(f"  {name:<{name_width}}  {value:<{value_width}}  {row.outcome.note}".rstrip())
    return "\n".join(lines[1:])


_LONGEST = 44


def _shortened(value: object) -> str:
    """The value as a text of at most `_LONGEST` characters."""
    if isinstance(value, float):
        text = f"{value:g}"
    else:
        text = value if isinstance(value, str) and value.isprintable() else quoted(value)
    return text if len(text) <= _LONGEST else f"{text[:13]}...{text[3 - _LONGEST + 13 :]}"
