"""The wait policy of the threads of OpenMP and OpenBLAS, which must be set before torch and numpy load them."""

from __future__ import annotations

from collections.abc import MutableMapping

SPINS = 5000
"""The rounds for which a thread of GNU's OpenMP spins before it sleeps (benchmarks/busy.py)."""
BLAS_TIMEOUT = 12
"""The power of two of processor cycles for which a thread of OpenBLAS spins before it sleeps; its own is 26."""
_USERS_OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def set_wait_policy(environment: MutableMapping[str, str]) -> None:
    """Set how long threads spin at a barrier, unless the user has.

    GNU's OpenMP, which torch uses on Linux, and OpenBLAS, which numpy and scipy use, spin for milliseconds. If other
    processes use the cores too, spinning threads keep the thread that they wait for from a core.
    """
    environment.setdefault("OPENBLAS_THREAD_TIMEOUT", str(BLAS_TIMEOUT))
    if not any(name in environment for name in _USERS_OWN):
        environment["GOMP_SPINCOUNT"] = str(SPINS)
