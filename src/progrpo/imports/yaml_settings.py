"""YAML files of settings, read by the safe loader alone."""

from __future__ import annotations

from pathlib import Path

import yaml

from progrpo.imports.files import MOST_SETTINGS, read_bytes
from progrpo.messages import named


class _Loader(yaml.SafeLoader):
    """The safe loader, with a limit on objects that are merged (`<<`) into one, which could take work without end."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_SETTINGS:
            raise ValueError("too many objects are merged into one another")


def parse_yaml(content: str | bytes) -> object:
    """The value that a YAML text means. ValueError for a text that is none, or that has no end."""
    try:
        return yaml.load(content, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


def read_yaml(path: Path) -> dict[object, object]:
    """The settings of a YAML file as nested objects. ValueError, one sentence, if it holds none."""
    content = read_bytes(path)
    try:
        data = parse_yaml(content)
        if not isinstance(data, dict) or not data:
            raise ValueError("it holds no settings by name")
    except ValueError as error:
        raise ValueError(f"{named(path)} is no settings file: {error}") from None
    return data
