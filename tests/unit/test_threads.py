"""The wait policy of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from progrpo.threads import SPINS, set_wait_policy


def test_threads_that_wait_go_to_sleep_soon():
    environment = {"PATH": "/bin"}
    set_wait_policy(environment)
    assert environment == {"PATH": "/bin", "GOMP_SPINCOUNT": str(SPINS)}


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_has_set_stays(name):
    environment = {name: "as the user has it"}
    set_wait_policy(environment)
    assert environment == {name: "as the user has it"}


def test_it_is_set_before_torch_is_loaded():
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    script = "import os, sys, progrpo; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(SPINS), "False"]
