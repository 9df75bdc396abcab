"""One run to a folder: `run.lock` names the process that writes there, for as long as it does."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAME = "run.lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Run the block as the only one that writes to `folder`, which is made if need be.

    ValueError while another process does, or one of another host may; the lock of a process that is dead is taken over.
    """
    lock, own = folder / NAME, _this_process()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _opened(lock) as file:
            holder = _holder(file)
            if holder is not None:
                _require_dead(holder, own, lock)
            _write(file, json.dumps(own).encode())
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written to: {error.strerror}; mend that, or name another folder"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError), _opened(lock, create=False) as file:
            if _holder(file) == own:
                lock.unlink()


@contextmanager
def _opened(lock: Path, create: bool = True) -> Iterator[int]:
    """The lock file, which nobody else has open in here at this moment."""
    while True:
        file = os.open(lock, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        try:
            with suppress(
                OSError
            ):  # a file system without locks: two that start in the same instant would not see each other
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, lock):
                yield file
                return
        finally:
            os.close(file)  # which lets go


def _is_at(file: int, path: Path) -> bool:
    """Whether it was not deleted between being opened and being locked."""
    return path.exists() and os.path.samestat(os.fstat(file), path.stat())


def _holder(file: int) -> Mapping[str, Any] | None:
    """Who is named; None in a new file, and in one whose writer was killed before a word of it."""
    try:
        found = json.loads(os.pread(file, 4096, 0))
    except (ValueError, RecursionError):
        return None
    named = isinstance(found, dict) and found.keys() == {"pid", "host", "started"}
    return found if named and isinstance(found["pid"], int) and 0 < found["pid"] < 2**31 else None


def _write(file: int, data: bytes) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, data, 0)
    os.fsync(file)


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}


def _require_dead(holder: Mapping[str, Any], own: Mapping[str, Any], lock: Path) -> None:
    who = f"process {holder['pid']} on {holder['host']}"
    if holder["host"] != own["host"]:
        raise ValueError(f"{lock.parent} is being written to by {who}; if that run is dead, delete {lock}")
    if _alive(holder["pid"], holder["started"]):
        raise ValueError(f"{lock.parent} is being written to by {who}; wait until it ends, or name another folder")


def _alive(pid: int, started: int | None) -> bool:
    """Whether the process is there and is not another one that was given the same number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, and there
        pass
    now = _started(pid)
    return now is None or started is None or now == started


def _started(pid: int) -> int | None:
    """When a process began, in the kernel's ticks since the machine did; None where that is not known (without Linux' /proc)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] == "Z" else int(fields[19])  # a zombie is dead, and equals nobody
