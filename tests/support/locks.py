"""Records of `run.lock` as filelock writes them, for processes that are not there."""

from __future__ import annotations

from progrpo.tracking.lock import Pace


def record(host: str = "elsewhere", pid: int = 7, lease: float = Pace().lease) -> str:
    """The lock of a process of another machine."""
    return f"filelock/2\npid={pid}\nhost={host}\nmode=lease\ntoken=0123\nduration={lease!r}\n"
