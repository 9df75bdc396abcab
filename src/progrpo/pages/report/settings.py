"""The settings of the run, with which it can be repeated: the command, the configuration and the versions."""

from __future__ import annotations

from collections.abc import Mapping

from progrpo.pages.page import escape, note, pairs, section
from progrpo.pages.run_data import RunData


def write(data: RunData) -> str:
    command, versions = data.summary.get("command"), data.summary.get("versions")
    blocks = [
        f"<pre>{escape(command)}</pre>" if command else "",
        f"<details><summary>Configuration</summary>{pairs(_flat(data.config))}</details>",
        f"<details><summary>Versions</summary>{pairs(versions)}</details>"
        if versions
        else note("No versions are recorded."),
    ]
    return section("settings", "Settings", "", "".join(blocks))


def _flat(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings under dotted names."""
    settings: dict[str, object] = {}
    for name, value in config.items():
        settings |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return settings
