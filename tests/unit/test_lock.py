"""One run to a folder."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import MarkerSoftFileLock

import progrpo
from progrpo.durable import LockLostError
from progrpo.tracking.lock import NAME, Pace, is_held, last_renewal, only_writer
from tests.support.locks import record

PACE = Pace(renewal=0.05, look=0.02, lease=0.9)
PATIENT = Pace(look=0.02)
HOLD = """
import sys, time
from pathlib import Path
from progrpo.tracking.lock import Pace, only_writer
with only_writer(Path(sys.argv[1]), pace=Pace(renewal=0.05)):
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


def owner(folder):
    held = MarkerSoftFileLock(folder / NAME).owner
    assert held is not None
    return held


def test_the_lock_is_there_for_as_long_as_the_block(tmp_path):
    with only_writer(tmp_path / "new" / "run") as lock:
        lock.check()
        assert owner(tmp_path / "new" / "run").pid == os.getpid()
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_it_goes_when_the_run_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), only_writer(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_is_refused_while_the_first_lives(tmp_path, holder):
    sentence = f"{tmp_path} is being written to by process {holder.pid} on {socket.gethostname()}; wait until it ends"
    with pytest.raises(ValueError, match=sentence), only_writer(tmp_path, pace=PATIENT):
        raise AssertionError("two write")
    assert owner(tmp_path).pid == holder.pid


def test_the_lock_of_a_killed_run_is_taken_over_at_once(tmp_path, holder):
    holder.kill()
    holder.wait()
    start = time.monotonic()
    with only_writer(tmp_path):
        assert owner(tmp_path).pid == os.getpid() and time.monotonic() - start < PATIENT.lease / 2


def test_a_zombie_counts_as_dead_after_the_lease(tmp_path, holder):
    """Killed, and not yet waited for by who started it."""
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    (tmp_path / NAME).write_text((tmp_path / NAME).read_text().replace("duration=60.0", "duration=0.9"))
    with only_writer(tmp_path, pace=PACE):
        pass


def test_a_number_that_was_given_to_another_process_is_no_lock(tmp_path):
    with only_writer(tmp_path):
        mine = (tmp_path / NAME).read_text()
    (tmp_path / NAME).write_text(re.sub(r"start=(\d+)", lambda start: f"start={int(start[1]) - 1}", mine))
    with only_writer(tmp_path):
        pass


# --- of another machine -----------------------------------------------------------------------------------------------


def test_another_hosts_run_that_lives_is_seen_to(tmp_path):
    lock, over = tmp_path / NAME, threading.Event()
    lock.write_text(record())

    def renew():
        while not over.wait(0.05):
            os.utime(lock)

    thread = threading.Thread(target=renew)
    thread.start()
    said: list[str] = []
    sentence = f"{tmp_path} is being written to by process 7 on elsewhere; wait until it ends"
    try:
        with pytest.raises(ValueError, match=sentence), only_writer(tmp_path, said.append, PATIENT):
            raise AssertionError("two write")
    finally:
        over.set()
        thread.join()
    assert lock.read_text() == record()
    assert said == [
        f"{tmp_path} is locked by process 7 on elsewhere; going on in 60 s, unless that run renews its lock"
    ]


@pytest.mark.parametrize("skew", [-86_400, 0, 86_400])
def test_another_hosts_run_that_is_dead_is_taken_over_whatever_its_clock_says(tmp_path, skew):
    said: list[str] = []
    (tmp_path / NAME).write_text(record(lease=PACE.lease))
    os.utime(tmp_path / NAME, (time.time() + skew,) * 2)
    start = time.monotonic()
    with only_writer(tmp_path, said.append, PACE):
        assert PACE.lease <= time.monotonic() - start < 20 * PACE.lease
        assert owner(tmp_path).pid == os.getpid()
    assert said[-1] == f"{tmp_path} is taken over: process 7 on elsewhere is dead, or has not renewed its lock"


def test_a_container_of_this_hosts_name_is_another_place(tmp_path):
    """Its processes' numbers say nothing here."""
    (tmp_path / NAME).write_text(record(host=f"{socket.gethostname()}?pidns-1", lease=PACE.lease))
    said: list[str] = []
    with only_writer(tmp_path, said.append, PACE):
        pass
    assert f"is locked by process 7 on {socket.gethostname()};" in said[0] and len(said) == 2


def test_the_lock_is_renewed_while_it_is_held(tmp_path):
    with only_writer(tmp_path, pace=PACE):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = time.monotonic() + 10
        while last_renewal(tmp_path) == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / NAME).stat().st_mtime > 0


def test_who_was_taken_for_dead_learns_it_before_it_writes(tmp_path):
    """Also before the thread that renews the lock next looks at it."""
    with only_writer(tmp_path) as lock:
        (tmp_path / NAME).unlink()
        (tmp_path / NAME).write_text(record())
        with pytest.raises(LockLostError, match=f"{tmp_path} was taken over by process 7 on elsewhere: "):
            lock.check()
    assert (tmp_path / NAME).read_text() == record()


def test_a_lock_that_somebody_deleted_is_lost(tmp_path):
    with only_writer(tmp_path) as lock:
        (tmp_path / NAME).unlink()
        with pytest.raises(LockLostError, match=f"{tmp_path} was left without its run.lock: "):
            lock.check()


def test_whether_a_run_writes_there_can_be_asked(tmp_path, holder):
    assert is_held(tmp_path)
    holder.kill()
    holder.wait()
    os.utime(tmp_path / NAME, (time.time() - 2 * Pace().renewal,) * 2)
    assert not is_held(tmp_path) and not is_held(tmp_path / "nowhere")
    (tmp_path / NAME).write_text(record())
    assert is_held(tmp_path) and not is_held(tmp_path, lasting=-1)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_lock_of_an_older_version_is_no_lock(tmp_path):
    """It names nobody in filelock's format, as a stranger's file does not; filelock takes it over in two seconds."""
    (tmp_path / NAME).write_text('{"pid": 1, "host": "elsewhere", "started": 1}')
    with only_writer(tmp_path, pace=PATIENT):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_empty_lock_can_only_be_deleted_by_hand(tmp_path):
    """As a machine leaves it that loses power between making the file and writing to it."""
    (tmp_path / NAME).touch()
    sentence = f"{tmp_path / NAME} names no process; delete it if no run writes there"
    with pytest.raises(ValueError, match=sentence), only_writer(tmp_path, pace=PACE):
        pass


def test_of_many_that_start_at_once_one_wins(tmp_path):
    """Each sees the lock of a dead process of another machine."""
    (tmp_path / NAME).write_text(record(lease=PACE.lease))
    hold = HOLD.replace("renewal=0.05", "renewal=0.05, look=0.02, lease=0.9")
    processes = [
        subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    deadline = time.monotonic() + 60
    while sum(process.poll() is None for process in processes) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    (winner,) = [process for process in processes if process.poll() is None]
    assert owner(tmp_path).pid == winner.pid
    winner.kill()
    outputs = [process.communicate() for process in processes]
    assert sum(b"held" in out for out, _ in outputs) == 1
    assert sum(b"is being written to by" in err for _, err in outputs) == 3


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    sentence = "file/run cannot be written to: Not a directory; mend that"
    with pytest.raises(ValueError, match=sentence), only_writer(tmp_path / "file" / "run"):
        pass


def test_the_slurm_script_goes_on_where_there_is_a_checkpoint_and_begins_anew_elsewhere(tmp_path):
    script = (Path(progrpo.__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
    lines = re.findall(r"^(?:RUN=|ARGS=|compgen ).*$", script, re.MULTILINE)
    script_lines = "\n".join([*lines, 'echo "${ARGS[@]}"']).replace("/shared/runs", str(tmp_path))

    def arguments() -> list[str]:
        environment = {**os.environ, "SLURM_JOB_ID": "77"}
        return subprocess.run(
            ["bash", "-c", script_lines], env=environment, check=True, capture_output=True, text=True
        ).stdout.split()

    assert len(lines) == 3 and arguments()[:4] == ["sd35m-pickscore", "--out", f"{tmp_path}/77", "--overwrite"]
    (tmp_path / "77" / "checkpoints" / "iteration_000005.writing").mkdir(parents=True)  # killed in its first checkpoint
    assert "--overwrite" in arguments()
    (tmp_path / "77" / "checkpoints" / "iteration_000010").mkdir()
    assert arguments() == ["--resume", f"{tmp_path}/77"]
