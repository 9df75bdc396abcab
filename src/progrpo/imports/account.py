"""What becomes of another framework's settings: each has a rule, each ends in exactly one list, and none is lost in silence."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from progrpo.config import Config, check, from_dict
from progrpo.messages import named, quoted

Fate = Literal["translated", "not needed here", "no equal here", "could not be read"]
FATES: tuple[Fate, ...] = ("translated", "not needed here", "no equal here", "could not be read")


@dataclass(frozen=True)
class Outcome:
    """What became of a setting; `fields` are those of ours that it sets, by path (`sampling.noise_level`, `reward.terms[0].name`)."""

    fate: Fate
    note: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """One setting of the source by its dotted name, beside all the others."""

    name: str
    value: Any
    all: Mapping[str, Any]

    def number(self, other: str = "") -> float:
        """Its own value, or another setting's; ValueError if that is no number."""
        name = other or self.name
        if name not in self.all:
            raise ValueError(
                f"{named(name)} could not be read, and {named(self.name)} is counted by it; write it as a number"
            )
        value = self.all[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
            raise ValueError(f"{named(name)} must be a number, not {quoted(value)}")
        return value

    def count(self, other: str = "") -> int:
        """The same of a whole number from 1 on."""
        value = self.number(other)
        if value < 1 or value != int(value):
            raise ValueError(f"{named(other or self.name)} must be a whole number of at least 1, not {quoted(value)}")
        return int(value)

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise ValueError(f"{named(self.name)} must be a text, not {quoted(self.value)}")
        return self.value

    def one_of(self, choices: Mapping[str, Any]) -> Any:
        """What its text, in small letters, stands for; ValueError, with the choices, if for nothing."""
        text = str(self.value).lower()
        if text not in choices:
            raise ValueError(f"{named(self.name)} must be one of {', '.join(choices)}, not {quoted(self.value)}")
        return choices[text]


Rule = Callable[[Setting], Outcome]


@dataclass(frozen=True)
class Row:
    """A setting with its value and what became of it."""

    name: str
    value: Any
    outcome: Outcome


@dataclass(frozen=True)
class Translation:
    config: Config
    rows: tuple[Row, ...]


def translated(note: str = "", **fields: Any) -> Outcome:
    """Taken up by these fields, whose dots are written as double underscores."""
    return sets({name.replace("__", "."): value for name, value in fields.items()}, note)


def sets(fields: Mapping[str, Any], note: str = "") -> Outcome:
    shown = ", ".join(f"{path} {_in_short(value)}" for path, value in fields.items())
    return Outcome("translated", "; ".join(filter(None, (shown, note))), fields)


def not_needed(why: str) -> Outcome:
    return Outcome("not needed here", why)


def no_equal(why: str, fields: Mapping[str, Any] | None = None) -> Outcome:
    return Outcome("no equal here", why, fields or {})


MOST_SETTINGS, _DEEPEST, _MOST_BYTES = 10_000, 32, 1_000_000


def content_of(path: Path) -> bytes:
    """Of a settings file; ValueError where there is none, it cannot be read, or it is too large to be one."""
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


def flattened(data: Mapping[Any, Any]) -> dict[str, Any]:
    """Every setting by its dotted name; those in a list of objects by `name[0].part`. An empty object is itself a value.

    ValueError if there are more than any configuration has, what lists hold among them, as where parts are shared a hundredfold or
    hold themselves.
    """
    found, count = dict[str, Any](), 0
    for name, value in _leaves(data, "", 0):
        found[name] = value
        for _ in parts(value):
            count += 1
            if count > MOST_SETTINGS:
                raise ValueError(f"there are more than {MOST_SETTINGS:,} settings, so this is no configuration")
    return found


def parts(value: Any) -> Iterator[Any]:
    """A value, and what lists and objects hold, one by one: of what is shared a hundredfold, or holds itself, without end."""
    open_ones = [iter([value])]
    while open_ones:
        for part in open_ones[-1]:
            yield part
            if isinstance(part, Mapping | list | tuple):
                open_ones.append(iter(part.values() if isinstance(part, Mapping) else part))
                break
        else:
            open_ones.pop()


def _leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > _DEEPEST:
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


def to(path: str, note: str = "") -> Rule:
    """Our field of the same meaning."""
    return lambda setting: sets({path: setting.value}, note)


def choice(path: str, choices: Mapping[str, Any]) -> Rule:
    """Our field of the same meaning, whose values have other names."""
    return lambda setting: sets({path: setting.one_of(choices)})


def precision(setting: Setting) -> Outcome:
    """Accelerate's `mixed_precision`."""
    dtype = setting.one_of({"fp16": "float16", "bf16": "bfloat16", "no": "float32"})
    return sets({"model.dtype": dtype}, "losses are scaled, as there" if dtype == "float16" else "")


def continued_lora(setting: Setting) -> Outcome:
    """An adapter that is trained further; in both frameworks a reference is the model without it."""
    return sets(
        {"model.lora": setting.text()},
        "its rank, alpha and layers are its own; a KL is measured from the model with it, there from the one without",
    )


def counted_in(path: str) -> Rule:
    """One of several settings that make a field of ours, which another one's rule sets."""
    return lambda setting: Outcome("translated", f"counted in {path}")


def ignored(why: str) -> Rule:
    return lambda setting: not_needed(why)


def only(*usual: Any, why: str, otherwise: str) -> Rule:
    """Not needed at its usual values, and without an equal at any other."""

    def rule(setting: Setting) -> Outcome:
        return not_needed(why) if setting.value in usual else no_equal(otherwise)

    return rule


UNIPC_LEVELS = (
    "its levels are .999 (1 - i / T) before the shift; ours are Euler's, from 1 to .001, with the model's own shift"
)
"""What Wan's scheduler does in either framework."""


# --- rewards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Near:
    """Our reward that is nearest to one of another framework, whose value is `factor` times ours.

    `differs`: in what they differ besides, a clause; empty if in nothing.
    """

    name: str
    factor: float = 1.0
    differs: str = ""


def reward_outcome(place: str, own: str, near: Near | None, weight: float | None, what: str = "") -> Outcome:
    """A reward as the term `own` at `place`; its weight, if any, is converted so that both frameworks add up the same numbers.

    Without an equal it is named all the same: the nearest of ours, or a function that the user writes (`what` says what of).
    """
    factor = near.factor if near else 1.0
    fields: dict[str, Any] = {f"{place}.name": own}
    if weight is not None:
        fields[f"{place}.weight"] = weight if factor == 1 else round(weight * factor, 9)
    scale = "" if factor == 1 or weight is None else f"weight {weight:g} there, whose reward is {factor:.6g} times ours"
    if near is None:
        why = f"no built-in reward{what and f' ({what})'}; write it as {own} (docs/rewards.md), which the configuration names"
        return no_equal(why, fields)
    if near.differs:
        return no_equal("; ".join(filter(None, (f"{own} is nearest: {near.differs}", scale))), fields)
    return sets(fields, scale)


# --- all of them together ---------------------------------------------------------------------------------------------


def translate(
    source: Path,
    settings: Mapping[str, Any],
    rules: Mapping[str, Rule],
    unread: Iterable[Row] = (),
    defaults: Container[str] = (),
) -> Translation:
    """A checked configuration from a file's settings by their rules; of `defaults` it is said that the file does not name them.

    A rule's name has `[]` where settings have an index or a key in brackets. A setting without a rule has no equal. ValueError, one sentence
    with the file, and the setting or the field of ours, where a value is none that its rule knows, or the whole cannot be run.
    """
    try:
        rows, data, written = list(unread), dict[str | int, Any](), set[str]()
        for name, value in settings.items():
            rule = rules.get(re.sub(r"\[[^]]*\]", "[]", name), _unknown)
            outcome = rule(Setting(name, value, settings))
            rows.append(Row(f"{name} (its default)" if name in defaults else name, value, outcome))
            for path, ours in outcome.fields.items():
                _put(data, path, ours)
                written.add(path.partition("[")[0])
        for path, what in _NEEDED.items():
            if path not in written:
                rows.append(Row(what, None, no_equal(f"none is named that can be taken; give --{path}")))
        config = from_dict(_with_lists(data))
        check(config)
    except ValueError as error:
        raise ValueError(f"{named(source)} asks for what cannot be run here: {error}") from None
    return Translation(config, tuple(rows))


# Fields whose defaults, of the built-in world, nobody means who comes from elsewhere.
_NEEDED = {"model.path": "a model", "prompts.source": "a prompt file", "reward.terms": "a reward"}


def _unknown(setting: Setting) -> Outcome:
    return no_equal("not a setting that this import knows")


def _put(data: dict[str | int, Any], path: str, value: Any) -> None:
    *parents, last = [int(step) if step.isdigit() else step for step in re.findall(r"[^.\[\]]+", path)]
    for step in parents:
        data = data.setdefault(step, {})
    assert last not in data, f"two settings write {path}"
    data[last] = value


def _with_lists(data: Any) -> Any:
    """Objects whose keys are numbers as lists, in the numbers' order."""
    if not isinstance(data, dict):
        return data
    if data and all(isinstance(key, int) for key in data):
        return [_with_lists(data[key]) for key in sorted(data)]
    return {key: _with_lists(value) for key, value in data.items()}


# --- to be read -------------------------------------------------------------------------------------------------------


def in_words(translation: Translation) -> str:
    """A table for each list that is not empty: name, value, and what became of it."""
    rows = translation.rows
    names = max((len(named(row.name)) for row in rows), default=0)
    values = max((len(_in_short(row.value)) for row in rows), default=0)
    lines = []
    for fate in FATES:
        listed = [row for row in rows if row.outcome.fate == fate]
        if listed:
            lines += ["", f"{fate} ({len(listed)})"]
            lines += [
                f"  {named(row.name):<{names}}  {_in_short(row.value):<{values}}  {row.outcome.note}".rstrip()
                for row in listed
            ]
    return "\n".join(lines[1:])


_LONGEST = 44


def _in_short(value: Any) -> str:
    text = (
        f"{value:g}"
        if isinstance(value, float)
        else value
        if isinstance(value, str) and value.isprintable()
        else quoted(value)
    )
    return text if len(text) <= _LONGEST else f"{text[:13]}...{text[3 - _LONGEST + 13 :]}"
