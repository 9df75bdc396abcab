"""The wait policy of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from progrpo.threads import BLAS_TIMEOUT, SPINS, set_wait_policy


def test_threads_that_wait_go_to_sleep_soon():
    environment = {"PATH": "/bin"}
    set_wait_policy(environment)
    own = {"GOMP_SPINCOUNT": str(SPINS), "OPENBLAS_THREAD_TIMEOUT": str(BLAS_TIMEOUT)}
    assert environment == {"PATH": "/bin", **own}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("GOMP_SPINCOUNT", {"OPENBLAS_THREAD_TIMEOUT": str(BLAS_TIMEOUT)}),
        ("OMP_WAIT_POLICY", {"OPENBLAS_THREAD_TIMEOUT": str(BLAS_TIMEOUT)}),
        ("OPENBLAS_THREAD_TIMEOUT", {"GOMP_SPINCOUNT": str(SPINS)}),
    ],
)
def test_what_the_user_has_set_stays(name, other):
    environment = {name: "as the user has it"}
    set_wait_policy(environment)
    assert environment == {name: "as the user has it", **other}


def test_it_is_set_before_torch_is_loaded():
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    script = "import os, sys, progrpo; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(SPINS), "False"]
