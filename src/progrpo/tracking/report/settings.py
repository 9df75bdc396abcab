"""How to run it again: the command, every setting, the versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from progrpo.tracking.report.page import escape, note, pairs, section
from progrpo.tracking.report.run import Run


def write(run: Run) -> str:
    command, versions = run.summary.get("command"), run.summary.get("versions")
    parts = [
        f"<pre>{escape(command)}</pre>" if command else "",
        f"<details><summary>Configuration</summary>{pairs(_flat(run.config))}</details>",
        f"<details><summary>Versions</summary>{pairs(versions)}</details>"
        if versions
        else note("No versions are recorded."),
    ]
    return section("settings", "Settings", "", "".join(parts))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return out
