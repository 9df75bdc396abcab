"""The settings of the run, with which it can be repeated: the command, the configuration and the versions."""

from __future__ import annotations

from progrpo.pages.page import escape, note, pairs, section
from progrpo.pages.run_data import RunData, flat


def write(data: RunData) -> str:
    command, versions = data.summary.get("command"), data.summary.get("versions")
    blocks = [
        f"<pre>{escape(command)}</pre>" if command else "",
        f"<details><summary>Configuration</summary>{pairs(flat(data.config))}</details>",
        f"<details><summary>Versions</summary>{pairs(versions)}</details>"
        if versions
        else note("No versions are recorded."),
    ]
    return section("settings", "Settings", "", "".join(blocks))
