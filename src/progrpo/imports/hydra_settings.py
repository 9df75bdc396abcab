"""Hydra's settings: files that `defaults` lists compose, overrides, and references between settings.

Nothing is run. Files are composed that lie beside the file, by literal names. Of interpolations, references to other
settings are followed, and the value that an interpolation gives for a missing variable of the environment is taken. All
others could not be read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from progrpo.imports.files import flatten, read_bytes
from progrpo.imports.outcome import Outcome, Row
from progrpo.imports.yaml_settings import parse_yaml, read_yaml
from progrpo.messages import named

_MOST_FILES = 64
_MOST_REFERENCES = 16
_PLAIN = re.compile(r"[A-Za-z][\w./-]*")
"""A text that YAML reads as it stands, but for `_WORDS`; most overrides are such, and the loader is slow."""
_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")


@dataclass
class HydraReading:
    """The settings of files and overrides by dotted names. `unread` are those that could not be read."""

    settings: dict[str, object] = field(default_factory=dict)
    unread: list[Row] = field(default_factory=list)


def read_hydra(path: Path) -> HydraReading:
    """The settings of a file and of the files that its `defaults` name. ValueError if the file cannot be read."""
    composition = _Composition(path.parent)
    settings = _flattened(composition.data_of(path, ""), path)
    return resolve(settings, path.name, composition.unread)


def _flattened(data: object, path: Path) -> dict[str, object]:
    try:
        return flatten(data)
    except ValueError as error:
        raise ValueError(f"{named(path)} is no settings file: {error}") from None


def resolve(settings: Mapping[str, object], file: str, unread: list[Row]) -> HydraReading:
    """The settings with the values that their interpolations mean; `unread` gets those that could not be read."""
    reading = HydraReading(unread=list(unread))
    for name, value in settings.items():
        try:
            reading.settings[name] = _Reference(settings, name).value_of(value)
        except ValueError as error:
            reading.unread.append(Row(name, value, _not_read(f"{file}: {error}; our default holds")))
    return reading


def override_value(text: str) -> object:
    """The value of an override's text, by YAML's rules; the text itself where it is no YAML."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    try:
        return parse_yaml(text)
    except ValueError:
        return text


def _not_read(note: str) -> Outcome:
    return Outcome("could not be read", note)


# --- files ------------------------------------------------------------------------------------------------------------


class _Composition:
    """The composition of a file with those of its defaults, which lie in `root` and below it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.unread: list[Row] = []
        self._files = 0

    def data_of(self, path: Path, package: str) -> dict[str, object]:
        """The nested settings of a file, its defaults included, in the package where it stands."""
        self._files += 1
        if self._files > _MOST_FILES:
            raise ValueError(f"{named(path)}: its defaults name more than {_MOST_FILES} files")
        own = {str(key): value for key, value in read_yaml(path).items()}
        _flattened(own, path)  # aliases may make a short file endless, and merging copies what they share
        entries = own.pop("defaults", [])
        parts = [{} if entry == "_self_" else self._entry(entry, path, i) for i, entry in _entries(entries)]
        selves = [i for i, entry in _entries(entries) if entry == "_self_"]
        here = selves[0] if selves else len(parts)
        merged: dict[str, object] = {}
        for part in [*parts[:here], own, *parts[here:]]:
            _merge(merged, part)
        for name in reversed(package.split(".") if package else []):
            merged = {name: merged}
        return merged

    def _entry(self, entry: object, path: Path, index: int) -> dict[str, object]:
        """The settings of an entry of `defaults`; none, and a row, where its file is not there."""
        place = f"defaults[{index}]"
        group, option = next(iter(entry.items())) if isinstance(entry, Mapping) and len(entry) == 1 else ("", entry)
        if option is None:
            return {}
        words = re.sub(r"^(override|optional) ", "", str(group)).strip()
        folder, _, package = words.partition("@")
        if not isinstance(option, str) or "${" in f"{folder}{option}" or ".." in f"{folder}{option}":
            self.unread.append(Row(place, entry, _not_read(f"{path.name}: no literal name of a file")))
            return {}
        name, _, own_package = option.partition("@")
        start = self.root if folder.startswith("/") or name.startswith("/") else path.parent
        file = start / folder.strip("/") / f"{name.strip('/').removesuffix('.yaml')}.yaml"
        if not os.path.isfile(file):
            self.unread.append(Row(place, entry, _not_read(f"{path.name}: there is no {file.name} beside the file")))
            return {}
        return self.data_of(file, package or own_package or _package(file, folder))


def _entries(entries: object) -> Iterator[tuple[int, object]]:
    return enumerate(entries if isinstance(entries, list) else [entries])


def _package(file: Path, group: str) -> str:
    """The package that a file's first comment names, or that of its group."""
    stated = re.match(rb"\s*#\s*@package\s+([\w.]+)", read_bytes(file))
    package = stated.group(1).decode() if stated else "_group_"
    return {"_global_": "", "_group_": group.strip("/").replace("/", ".")}.get(package, package)


def _merge(data: dict[str, object], more: Mapping[str, object]) -> None:
    """Put settings into others, which they replace where both have a value."""
    for key, value in more.items():
        old = data.get(str(key))
        if isinstance(value, Mapping) and isinstance(old, dict):
            _merge(old, value)
        elif isinstance(value, Mapping):
            data[str(key)] = _copied(value)
        else:
            data[str(key)] = value


def _copied(value: Mapping[object, object]) -> dict[str, object]:
    return {str(key): _copied(part) if isinstance(part, Mapping) else part for key, part in value.items()}


# --- interpolations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reference:
    """A setting whose value may refer to others; `depth` counts the references that led here."""

    settings: Mapping[str, object]
    name: str
    depth: int = 0

    def value_of(self, value: object) -> object:
        """The value, its interpolations replaced. ValueError for an interpolation that is not followed."""
        if isinstance(value, list):
            return [self.value_of(item) for item in value]
        if not isinstance(value, str) or "${" not in value:
            return value
        if self.depth > _MOST_REFERENCES:
            raise ValueError("its interpolations refer to one another without end")
        parts = list(_parts(value))
        if len(parts) == 1:
            return self._meaning(parts[0][2:-1])
        return "".join(self._as_text(part) if part.startswith("${") else part for part in parts)

    def _as_text(self, part: str) -> str:
        value = self._meaning(part[2:-1])
        if not isinstance(value, str | int | float) or (isinstance(value, str) and "${" in value):
            raise ValueError(f"{part} is not a part of a text")
        return str(value)

    def _meaning(self, inside: str) -> object:
        """The value of the interpolation with this text between its braces."""
        resolver, colon, arguments = inside.partition(":")
        first, comma, other = arguments.partition(",")
        deeper = _Reference(self.settings, self.name, self.depth + 1)
        if not colon:
            return self._setting(inside.strip())
        if resolver == "oc.decode":
            decoded = deeper.value_of(arguments)
            return override_value(decoded) if isinstance(decoded, str) else decoded
        if resolver == "oc.env" and comma:
            return deeper.value_of(override_value(other.strip()))
        if resolver == "oc.select" and first.strip() in self.settings:
            return self._setting(first.strip())
        if resolver == "oc.select" and comma:
            return deeper.value_of(override_value(other.strip()))
        raise ValueError(f"the interpolation ${{{inside}}} is not followed")

    def _setting(self, path: str) -> object:
        """The value of another setting, by its dotted name from the top, or from this one's place after dots."""
        dots = len(path) - len(path.lstrip("."))
        parents = self.name.split(".")[:-dots] if dots else []
        name = ".".join([*parents, path.lstrip(".")])
        if name in self.settings:
            return _Reference(self.settings, name, self.depth + 1).value_of(self.settings[name])
        if any(other.startswith(f"{name}.") for other in self.settings):
            return f"${{{path}}}"  # a copy of a whole section, whose settings have rows of their own
        raise ValueError(f"the interpolation ${{{path}}} names no setting of the file")


def _parts(text: str) -> Iterator[str]:
    """The text in parts: interpolations, with the ones inside them, and what stands between."""
    start = depth = 0
    for i, character in enumerate(text):
        opens = text.startswith("${", i)
        if opens and depth == 0 and i > start:
            yield text[start:i]
            start = i
        depth += opens
        if character == "}" and depth:
            depth -= 1
            if depth == 0:
                yield text[start : i + 1]
                start = i + 1
    if depth:
        raise ValueError("an interpolation has no end")
    if start < len(text):
        yield text[start:]
