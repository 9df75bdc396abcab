"""The translation of another framework's settings. Each has a rule and ends in exactly one list, so none is lost."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from progrpo.checks import check
from progrpo.config import Config, from_dict
from progrpo.imports.outcome import STATUSES, Outcome, Row, Rule, Setting, no_equal, shortened
from progrpo.messages import named


@dataclass(frozen=True)
class Translation:
    """The configuration that a file of settings asks for, and the outcome of each setting."""

    config: Config
    rows: tuple[Row, ...]


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


def with_prefixes(names: Iterable[str], rules: Mapping[str, Rule], prefixes: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rules, and the rule of a prefix for each name without a rule that begins with it."""
    known = {_without_keys(name) for name in names}
    of_prefixes = {name: rule for name in known for prefix, rule in prefixes.items() if name.startswith(prefix)}
    return {**of_prefixes, **rules}


def _without_keys(name: str) -> str:
    """The name as rules have it, with empty brackets."""
    return re.sub(r"\[[^]]*\]", "[]", name)


def as_tables(translation: Translation) -> str:
    """A table for each status that occurs: name, value and note of each setting."""
    rows = translation.rows
    name_width = max((len(named(row.name)) for row in rows), default=0)
    value_width = max((len(shortened(row.value)) for row in rows), default=0)
    lines = []
    for status in STATUSES:
        listed = [row for row in rows if row.outcome.status == status]
        if listed:
            lines += ["", f"{status} ({len(listed)})"]
        for row in listed:
            name, value = named(row.name), shortened(row.value)
            lines.append(f"  {name:<{name_width}}  {value:<{value_width}}  {row.outcome.note}".rstrip())
    return "\n".join(lines[1:])
