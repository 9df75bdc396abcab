"""The lock of a run folder: `run.lock` is a lease of filelock, which the process that writes there renews.

The lock of a dead process of this machine and container is free at once. Any other lock is free when it has not been
renewed for the time of the lease. This process measures that time itself, so clocks of different hosts are never
compared. No lock outlives its process for good: after the death of a node nobody has to remove a file by hand.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import MarkerSoftFileLock, OwnerRecord, SoftFileLease, Timeout

from progrpo.durable import LockLostError

NAME = "run.lock"


@dataclass(frozen=True)
class Pace:
    """The times of the lock, in seconds. All processes that want a folder have the same `lease`."""

    renewal: float = 2.0
    """The time between two renewals."""
    look: float = 0.5
    """The time between two looks at somebody else's lock."""
    lease: float = 60.0
    """The time without a renewal after which a run counts as dead."""


class Lock:
    """A run folder's lock that this process holds."""

    def __init__(self, lease: SoftFileLease) -> None:
        self._lease = lease

    @property
    def is_lost(self) -> bool:
        """Whether another run has the lock, or somebody deleted it."""
        return self._lease.compromise is not None or not self._lease.is_lock_held_by_us

    def check(self) -> None:
        """LockLostError if the lock is lost."""
        if not self.is_lost:
            return
        owner = self._lease.owner
        whose = "was left without its run.lock" if owner is None else f"was taken over by {_named(owner)}"
        raise LockLostError(
            f"{Path(self._lease.lock_file).parent} {whose}: this run seemed dead, or somebody deleted its lock; it ends"
            " and writes nothing more"
        )


@contextmanager
def only_writer(
    folder: Path,
    say: Callable[[str], None] = lambda _: None,
    pace: Pace = Pace(),
) -> Iterator[Lock]:
    """Hold the lock of `folder`, which is created if needed, during the block. A thread renews it.

    ValueError while another run writes there. The lock of a dead run is taken over: at once if its death is known,
    else after the lease without a renewal. `say` is called with messages about the wait.
    """
    lease = SoftFileLease(
        folder / NAME, lease_duration=pace.lease, heartbeat_interval=pace.renewal, thread_local=False, mode=0o666
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(lease, say, pace)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written to: {error.strerror}; mend that, or name another folder"
        ) from error
    try:
        yield Lock(lease)
    finally:
        lease.release()


def is_held(folder: Path, lasting: float = 300.0) -> bool:
    """Whether a run writes to the folder. A process that is not known to be dead must have renewed within `lasting`
    seconds. The death of one is known two renewals later.
    """
    owner = MarkerSoftFileLock(folder / NAME).owner
    renewed = last_renewal(folder)
    if owner is None or renewed is None:
        return False
    age = time.time() - renewed
    return age < (2 * Pace().renewal if _is_gone(owner) else lasting)


def last_renewal(folder: Path) -> float | None:
    """The time of the last sign of life of the run that holds the folder, or held it when it was killed."""
    try:
        return (folder / NAME).stat().st_mtime
    except OSError:
        return None


def _take(lease: SoftFileLease, say: Callable[[str], None], pace: Pace) -> None:
    """Acquire the lease as soon as nobody else holds it. ValueError as soon as its holder renews it."""
    folder = Path(lease.lock_file).parent
    seen: tuple[OwnerRecord | None, float | None] | None = None
    since = time.monotonic()
    while True:
        try:
            lease.acquire(blocking=False)
        except Timeout:
            pass
        else:
            if seen is not None and seen[0] is not None:
                say(f"{folder} is taken over: {_named(seen[0])} is dead, or has not renewed its lock")
            return
        owner, renewed = lease.owner, last_renewal(folder)
        if owner is not None and seen is not None and seen[0] == owner and seen[1] != renewed:
            raise ValueError(
                f"{folder} is being written to by {_named(owner)}; wait until it ends, or name another folder"
            )
        if owner is None and time.monotonic() - since > pace.lease:
            raise ValueError(f"{lease.lock_file} names no process; delete it if no run writes there")
        if seen is None or seen[0] != owner:
            since = time.monotonic()
            if owner is not None:
                say(
                    f"{folder} is locked by {_named(owner)}; going on in {pace.lease:g} s, unless that run renews its"
                    " lock"
                )
        seen = owner, renewed
        time.sleep(pace.look)


def _named(owner: OwnerRecord) -> str:
    return f"process {owner.pid} on {_host(owner)}"


def _host(owner: OwnerRecord) -> str:
    """The host's name. filelock adds the namespace of the process's number after a `?`."""
    return owner.hostname.partition("?")[0]


def _is_gone(owner: OwnerRecord) -> bool:
    """Whether the owner's machine is this one, and no process has its number here."""
    return _host(owner) == socket.gethostname() and not psutil.pid_exists(owner.pid)
