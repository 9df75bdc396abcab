"""Files of settings: their content, and nested settings by dotted names. Too large ones are refused."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from progrpo.messages import named

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
