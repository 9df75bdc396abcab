"""One run to a folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from progrpo.tracking.lock import NAME, only_writer

HOLD = """
import sys, time
from pathlib import Path
from progrpo.tracking.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder, until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def own(**changes):
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": None} | changes)


def test_the_lock_is_there_for_as_long_as_the_block(tmp_path):
    with only_writer(tmp_path / "new" / "run"):
        found = json.loads((tmp_path / "new" / "run" / NAME).read_text())
        assert (found["pid"], found["host"]) == (os.getpid(), socket.gethostname())
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_it_goes_when_the_run_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), only_writer(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_is_refused_while_the_first_lives(tmp_path, holder):
    sentence = f"{tmp_path} is being written to by process {holder.pid} on {socket.gethostname()}; wait until it ends"
    with pytest.raises(ValueError, match=sentence), only_writer(tmp_path):
        raise AssertionError("two write")
    assert json.loads((tmp_path / NAME).read_text())["pid"] == holder.pid


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path, holder):
    holder.kill()
    holder.wait()
    with only_writer(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_zombie_is_dead(tmp_path, holder):
    """Killed, and not yet waited for by who started it."""
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with only_writer(tmp_path):
        pass


def test_a_number_that_was_given_to_another_process_is_no_lock(tmp_path):
    with only_writer(tmp_path):
        mine = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(mine | {"started": mine["started"] - 1}))
    with only_writer(tmp_path):
        pass
    (tmp_path / NAME).write_text(json.dumps(mine))
    with pytest.raises(ValueError, match="is being written to"), only_writer(tmp_path):
        pass


def test_another_hosts_run_may_live(tmp_path):
    (tmp_path / NAME).write_text(own(host="elsewhere", pid=1))
    sentence = f"process 1 on elsewhere; if that run is dead, delete {tmp_path / NAME}"
    with pytest.raises(ValueError, match=sentence), only_writer(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[" * 4000, "3", '{"pid": 1}', own(pid=-1), own(pid="1"), own(pid=2**70)])
def test_what_names_nobody_is_no_lock(tmp_path, content):
    """Killed between making the file and writing to it; or a stranger's file."""
    (tmp_path / NAME).write_text(content)
    with only_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_run_that_took_over_is_not_deleted(tmp_path):
    """By one that was declared dead by hand, and is not."""
    with only_writer(tmp_path):
        (tmp_path / NAME).write_text(own(pid=1))
    assert json.loads((tmp_path / NAME).read_text())["pid"] == 1


def test_a_file_that_was_deleted_before_it_could_be_locked_is_left(tmp_path, monkeypatch):
    """By the run that ended just then: who locks what has no name would be seen by nobody."""
    lock = fcntl.flock
    locked: list[int] = []

    def late(file, how):
        if not locked:
            (tmp_path / NAME).unlink()
        locked.append(file)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with only_writer(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid() and len(locked) == 2


def test_of_many_that_start_at_once_one_wins(tmp_path):
    """Each sees the stale lock of a dead process."""
    (tmp_path / NAME).write_text(own(pid=2**31 - 1))
    ready, done, entered, refused = threading.Barrier(8), threading.Event(), [], []

    def start():
        ready.wait()
        try:
            with only_writer(tmp_path):
                entered.append(1)
                done.wait()
        except ValueError:
            refused.append(1)
        if len(refused) == 7:
            done.set()

    threads = [threading.Thread(target=start, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(entered), len(refused)) == (1, 7)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    sentence = "file/run cannot be written to: Not a directory; mend that"
    with pytest.raises(ValueError, match=sentence), only_writer(tmp_path / "file" / "run"):
        pass
