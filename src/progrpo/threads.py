"""The wait policy of OpenMP's threads, which must be set before torch loads OpenMP."""

from __future__ import annotations

from collections.abc import MutableMapping

SPINS = 5000
"""The rounds for which a thread of GNU's OpenMP spins before it sleeps (benchmarks/busy.py)."""
_USERS_OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def set_wait_policy(environment: MutableMapping[str, str]) -> None:
    """Set how long threads spin at a barrier, unless the user has.

    GNU's OpenMP, which torch uses on Linux, spins for milliseconds. If other processes use the cores too, spinning
    threads keep the thread that they wait for from a core.
    """
    if not any(name in environment for name in _USERS_OWN):
        environment["GOMP_SPINCOUNT"] = str(SPINS)
