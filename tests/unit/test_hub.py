"""The reasons that are given where the hub gave nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
from itertools import pairwise

import httpx2
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

from progrpo.policies.hub import reason_of


def in_turn(*errors: Exception) -> Exception:
    """The last of exceptions of which each came of the one before, as the hub's library and diffusers raise them."""
    for before, error in pairwise(errors):
        error.__cause__ = before
    return errors[-1]


UNREACHED = (
    socket.gaierror(-2, "Name or service not known"),
    httpx2.ConnectError("[Errno -2] Name or service not known"),
    LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub"),
    OSError("nobody/nothing does not appear to have a file named model_index.json."),
)


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (
            UNREACHED,
            "the hub cannot be reached ([Errno -2] Name or service not known); try again with a network, or give a"
            " folder",
        ),
        ((TimeoutError("timed\nout"), *UNREACHED[1:]), "the hub cannot be reached (timed out);"),
        ((OfflineModeIsEnabled("offline mode is enabled"), *UNREACHED[2:]), "the hub cannot be reached (offline mode"),
        (
            (EntryNotFoundError("404"), UNREACHED[-1]),
            "nobody/nothing does not appear to have a file named model_index.",
        ),
    ],
)
def test_a_hub_that_cannot_be_reached_differs_from_one_without_the_file(errors, said, tmp_path):
    assert reason_of(in_turn(*errors), "nobody/nothing").startswith(said)
    assert reason_of(errors[-1], tmp_path) == str(
        UNREACHED[-1]
    )  # a folder's own fault, whatever the libraries asked for


def test_the_command_line_does_not_log_every_attempt():
    script = (
        "from progrpo.cli import main; main(['--version']);"
        " from huggingface_hub.utils import logging as l; print(l.get_verbosity())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "40"  # errors alone
