"""The lock of a run folder: `run.lock` names the process that writes there, which renews it until it ends.

Whether a process of this machine is alive can be looked up. A process of another machine or container is alive if it
renews its lock while this process watches, so clocks of different hosts are never compared. No lock outlives its
process for good: after the death of a node nobody has to remove a file by hand.
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

NAME = "run.lock"

_JOBS = ("PROGRPO_JOB_ID", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "TORCHELASTIC_RUN_ID")
"""The environment variables with a job's id, which stays the same when its queue restarts it.

They are our own and those of Slurm, PBS, LSF, SGE and torchrun.
"""
_NO_JOB = ("", "none", "undefined")


@dataclass(frozen=True)
class Pace:
    """The times of the lock, in seconds."""

    renewal: float = 5.0
    """The time between two renewals."""
    look: float = 1.0
    """The time between two looks at somebody else's lock."""
    same_job: float = 15.0
    """The time without a renewal after which a run of the same job counts as dead: its queue started this one."""
    other: float = 60.0
    """The time without a renewal after which any other run counts as dead."""


@dataclass(frozen=True)
class Holder:
    """A process that writes to a run folder."""

    pid: int
    host: str
    started: int | None = None
    """The start of the process in ticks since the machine's start. Process numbers are used again."""
    place: str | None = None
    """The start of the machine and the container in which `pid` counts. None if it is not known."""
    job: str | None = None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_here(self, own: Holder) -> bool:
        """Whether the process belongs to this machine and container."""
        return self.host == own.host and (self.place == own.place or None in (self.place, own.place))

    def is_of_job(self, own: Holder) -> bool:
        return self.job is not None and self.job == own.job


class LockLostError(ValueError):
    """Another run has taken over the folder, because this one did not renew its lock."""


class Lock:
    """A run folder's lock that this process holds."""

    def __init__(self, path: Path, own: Holder) -> None:
        self._path = path
        self._own = own
        self.lost_to: Holder | None = None
        """The process that has taken over the lock."""

    def renew(self) -> None:
        """Renew the lock, or set `lost_to`. A lock that somebody deleted is written again."""
        with suppress(OSError), _opened(self._path) as file:  # the run's writers report a folder that is gone
            if (holder := _holder(file)) == self._own:
                os.utime(file)
            elif holder is None:
                _write(file, self._own)
            else:
                self.lost_to = holder

    def check(self) -> None:
        """Renew the lock. LockLostError if another run has it."""
        if self.lost_to is None:
            self.renew()
        if self.lost_to is not None:
            raise LockLostError(
                f"{self._path.parent} was taken over by {self.lost_to}, to which this run seemed dead; this one ends"
                " and writes nothing more"
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
    """Hold the lock of `folder`, which is created if needed, during the block. A thread renews it.

    ValueError while another run writes there. The lock of a dead run is taken over: at once if its death is known,
    else after the time without a renewal that `pace` sets. `say` is called with messages about the wait.
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
    """Whether a run writes to the folder. Another machine's lock must be renewed within `lasting` seconds."""
    try:
        with (folder / NAME).open("rb") as file:
            holder, age = _holder(file.fileno()), time.time() - os.fstat(file.fileno()).st_mtime
    except OSError:
        return False
    if holder is None:
        return False
    return _alive(holder) if holder.is_here(_this_process()) else age < lasting


def last_renewal(folder: Path) -> float | None:
    """The time of the last sign of life of the run that holds the folder, or held it when it was killed."""
    try:
        return (folder / NAME).stat().st_mtime
    except OSError:
        return None


# --- taking the lock --------------------------------------------------------------------------------------------------


def _take(path: Path, own: Holder, say: Callable[[str], None], pace: Pace) -> None:
    """Write `own` into the lock as soon as nobody else holds it."""
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
    """Whether the holder is known to be dead. ValueError if it is known to be alive."""
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
    """The lock file, opened by this process alone. Opening it also makes a file server send its newest contents."""
    while True:
        file = os.open(lock, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        try:
            # on a file system without locks, one of two runs that start at the same instant finds the lock lost
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, lock):
                yield file
                return
        finally:
            os.close(file)  # this also releases its lock


def _is_at(file: int, path: Path) -> bool:
    """Whether the file was not deleted between being opened and being locked."""
    return path.exists() and os.path.samestat(os.fstat(file), path.stat())


def _holder(file: int) -> Holder | None:
    """The process that the file names. None for a new file, and if its writer was killed before it wrote a name."""
    try:
        data = json.loads(os.pread(file, 4096, 0))
    except (ValueError, RecursionError):
        return None
    if not (isinstance(data, dict) and {"pid", "host", "started"} <= data.keys()):
        return None
    pid = data["pid"]
    if not (isinstance(pid, int) and 0 < pid < 2**31):
        return None
    return Holder(pid, str(data["host"]), data["started"], data.get("place"), data.get("job"))


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
    """Whether a process of this machine is running, and is not another one with the same number."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user's
        pass
    now = _started(holder.pid)
    return now is None or holder.started is None or now == holder.started


def _started(pid: int) -> int | None:
    """The start of a process in ticks since the machine's start. None if it is not known (without Linux' /proc)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] == "Z" else int(fields[19])  # a zombie is dead: -1 equals no start
