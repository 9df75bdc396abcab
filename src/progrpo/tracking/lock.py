"""One run to a folder: `run.lock` names the process that writes there, and is renewed for as long as it does.

A process of this machine is alive or dead, which can be seen. One of another machine, or of another container, is alive if its lock
is renewed while this process watches: no clock of one host is compared with another's. Between looks nobody waits for anybody, so
that a node's death leaves nothing behind that only a person could clear.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NAME = "run.lock"

_JOBS = ("PROGRPO_JOB_ID", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "TORCHELASTIC_RUN_ID")
"""Environment variables with a job's id, which it keeps when its queue starts it anew: our own, Slurm's, PBS', LSF's, SGE's, torchrun's."""
_NO_JOB = ("", "none", "undefined")


@dataclass(frozen=True)
class Pace:
    """Seconds: from one renewal to the next, from one look to the next, and without a renewal until a run counts as dead."""

    renewal: float = 5.0
    look: float = 1.0
    same_job: float = 15.0
    """For a run of the same job: its queue has started this one, so that it ought to be dead."""
    other: float = 60.0


@dataclass(frozen=True)
class Holder:
    """A process that writes to a run folder."""

    pid: int
    host: str
    started: int | None = None
    """In ticks since the machine's start, since numbers of processes come again."""
    place: str | None = None
    """The machine's start and the container, in which `pid` is a process; None where that is not known."""
    job: str | None = None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_here(self, own: Holder) -> bool:
        """Whether its number is one of this machine and container."""
        return self.host == own.host and (self.place == own.place or None in (self.place, own.place))

    def is_of_job(self, own: Holder) -> bool:
        return self.job is not None and self.job == own.job


class LockLostError(ValueError):
    """Another run has taken the folder over, since this one did not renew its lock."""


class Lock:
    """A run folder's lock that is this process' own."""

    def __init__(self, path: Path, own: Holder) -> None:
        self._path, self._own = path, own
        self.lost_to: Holder | None = None

    def renew(self) -> None:
        """Say that this process lives; a lock that somebody deleted is written again. Where another run has it, `lost_to` names that."""
        with suppress(OSError), _opened(self._path) as file:  # where the folder is gone, those who write there say so
            if (holder := _holder(file)) == self._own:
                os.utime(file)
            elif holder is None:
                _write(file, self._own)
            else:
                self.lost_to = holder

    def check(self) -> None:
        """LockLostError where another run has it."""
        if self.lost_to is None:
            self.renew()
        if self.lost_to is not None:
            raise LockLostError(
                f"{self._path.parent} was taken over by {self.lost_to}, to which this run seemed dead; this one ends and writes nothing more"
            )

    def release(self) -> None:
        with suppress(OSError), _opened(self._path, create=False) as file:
            if _holder(file) == self._own:
                self._path.unlink()


@contextmanager
def only_writer(
    folder: Path,
    say: Callable[[str], None] = lambda _: None,
    pace: Pace = Pace(),
) -> Iterator[Lock]:
    """Run the block as the only one that writes to `folder`, which is made if need be; its lock is renewed by a thread.

    ValueError while another run does. The lock of one that is dead is taken over: at once where that is known, else when it was not
    renewed for as long as `pace` says. `say` hears of the wait and of what came of it.
    """
    own = _this_process()
    lock = Lock(folder / NAME, own)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(folder / NAME, own, say, pace)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written to: {error.strerror}; mend that, or name another folder"
        ) from error
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(lock, pace.renewal, ended), daemon=True)
    heart.start()
    try:
        yield lock
    finally:
        ended.set()
        heart.join()
        lock.release()


def _beat(lock: Lock, seconds: float, ended: threading.Event) -> None:
    while not ended.wait(seconds) and lock.lost_to is None:
        lock.renew()


def is_held(folder: Path, lasting: float = 300.0) -> bool:
    """Whether a run seems to write there: of another machine's, whether its lock was renewed in the last `lasting` seconds by this one's clock."""
    try:
        with (folder / NAME).open("rb") as file:
            holder, age = _holder(file.fileno()), time.time() - os.fstat(file.fileno()).st_mtime
    except OSError:
        return False
    if holder is None:
        return False
    return _alive(holder) if holder.is_here(_this_process()) else age < lasting


# --- taking it --------------------------------------------------------------------------------------------------------


def _take(path: Path, own: Holder, say: Callable[[str], None], pace: Pace) -> None:
    """Write `own` into the lock, once nobody else has it."""
    seen: tuple[Holder, int] | None = None
    since = 0.0
    while True:
        with _opened(path) as file:
            holder, renewed = _holder(file), os.fstat(file).st_mtime_ns
            if holder is None or _is_free(holder, own, path):
                return _write(file, own)
            if seen is not None and seen[0] == holder and seen[1] != renewed:
                raise _refusal(path, holder)
            patience = pace.same_job if holder.is_of_job(own) else pace.other
            if seen != (holder, renewed):
                seen, since = (holder, renewed), time.monotonic()
                say(f"{path.parent} is locked by {holder}; going on in {patience:g} s, unless that run renews its lock")
            elif time.monotonic() - since >= patience:
                say(f"{path.parent} is taken over: {holder} has not renewed its lock for {patience:g} s")
                return _write(file, own)
        time.sleep(pace.look)


def _is_free(holder: Holder, own: Holder, path: Path) -> bool:
    """Whether it is known that the holder is dead. ValueError where it is known that it lives."""
    if not holder.is_here(own):
        return False
    if _alive(holder):
        raise _refusal(path, holder)
    return True


def _refusal(path: Path, holder: Holder) -> ValueError:
    return ValueError(f"{path.parent} is being written to by {holder}; wait until it ends, or name another folder")


# --- the file ---------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(lock: Path, create: bool = True) -> Iterator[int]:
    """The lock file, which nobody else has open in here at this moment; opening it also asks a file server what it is now."""
    while True:
        file = os.open(lock, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        try:
            with suppress(
                OSError
            ):  # a file system without locks: of two that start at the same instant one finds it lost
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, lock):
                yield file
                return
        finally:
            os.close(file)  # which lets go


def _is_at(file: int, path: Path) -> bool:
    """Whether it was not deleted between being opened and being locked."""
    return path.exists() and os.path.samestat(os.fstat(file), path.stat())


def _holder(file: int) -> Holder | None:
    """Who is named; None in a new file, and in one whose writer was killed before a word of it."""
    try:
        found = json.loads(os.pread(file, 4096, 0))
    except (ValueError, RecursionError):
        return None
    return _read(found) if isinstance(found, dict) and {"pid", "host", "started"} <= found.keys() else None


def _read(found: dict[str, Any]) -> Holder | None:
    pid = found["pid"]
    if not (isinstance(pid, int) and 0 < pid < 2**31):
        return None
    return Holder(pid, str(found["host"]), found["started"], found.get("place"), found.get("job"))


def _write(file: int, holder: Holder) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(asdict(holder)).encode(), 0)
    os.fsync(file)


# --- processes --------------------------------------------------------------------------------------------------------


def _this_process() -> Holder:
    return Holder(os.getpid(), socket.gethostname(), _started(os.getpid()), _place(), _job())


def _place() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _job() -> str | None:
    for name in _JOBS:
        if os.environ.get(name, "").lower() not in _NO_JOB:
            return f"{name} {os.environ[name]}"
    return None


def _alive(holder: Holder) -> bool:
    """Whether a process of this machine is there and is not another one that was given the same number."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, and there
        pass
    now = _started(holder.pid)
    return now is None or holder.started is None or now == holder.started


def _started(pid: int) -> int | None:
    """When a process began, in the kernel's ticks since the machine did; None where that is not known (without Linux' /proc)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] == "Z" else int(fields[19])  # a zombie is dead, and equals nobody
