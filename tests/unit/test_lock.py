"""One run to a folder."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import progrpo
from progrpo.tracking.lock import NAME, LockLostError, Pace, is_held, only_writer

PACE = Pace(renewal=0.05, look=0.02, same_job=0.3, other=0.9)
PATIENT = Pace(look=0.02)
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


# --- of another machine -----------------------------------------------------------------------------------------------


@pytest.fixture
def renewing(tmp_path):
    """A lock of another host that is renewed as long as the test goes on."""
    lock, over = tmp_path / NAME, threading.Event()
    lock.write_text(own(host="elsewhere", pid=1))

    def renew():
        while not over.wait(0.05):
            os.utime(lock)

    thread = threading.Thread(target=renew)
    thread.start()
    yield lock
    over.set()
    thread.join()


def test_another_hosts_run_that_lives_is_seen_to(tmp_path, renewing):
    said: list[str] = []
    sentence = f"{tmp_path} is being written to by process 1 on elsewhere; wait until it ends"
    with pytest.raises(ValueError, match=sentence), only_writer(tmp_path, said.append, PATIENT):
        raise AssertionError("two write")
    assert json.loads(renewing.read_text())["host"] == "elsewhere"
    assert said == [
        f"{tmp_path} is locked by process 1 on elsewhere; going on in 60 s, unless that run renews its lock"
    ]


@pytest.mark.parametrize("skew", [-86_400, 0, 86_400])
def test_another_hosts_run_that_is_dead_is_taken_over_whatever_its_clock_says(tmp_path, skew):
    said: list[str] = []
    (tmp_path / NAME).write_text(own(host="elsewhere", pid=1))
    os.utime(tmp_path / NAME, (time.time() + skew,) * 2)
    start = time.monotonic()
    with only_writer(tmp_path, said.append, PACE):
        assert PACE.other <= time.monotonic() - start < 10 * PACE.other
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert said[-1] == f"{tmp_path} is taken over: process 1 on elsewhere has not renewed its lock for 0.9 s"


@pytest.mark.parametrize(
    ("variable", "before", "now", "pace"),
    [
        ("SLURM_JOB_ID", "77", "77", "same_job"),
        ("SLURM_JOB_ID", "76", "77", "other"),
        ("PROGRPO_JOB_ID", "pod", "pod", "same_job"),
        ("PBS_JOBID", "7.host", "7.host", "same_job"),
        ("LSB_JOBID", "7", "7", "same_job"),
        ("JOB_ID", "7", "7", "same_job"),
        ("TORCHELASTIC_RUN_ID", "run1", "run1", "same_job"),
        ("TORCHELASTIC_RUN_ID", "none", "none", "other"),
    ],
)
def test_a_job_that_is_queued_anew_takes_over_sooner(tmp_path, monkeypatch, variable, before, now, pace):
    for name in ("SLURM_JOB_ID", "PROGRPO_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, before)
    with only_writer(tmp_path):
        left = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(left | {"host": "node17", "pid": 4242, "place": "another"}))
    monkeypatch.setenv(variable, now)
    said: list[str] = []
    with only_writer(tmp_path, said.append, PACE):
        pass
    assert f"for {getattr(PACE, pace):g} s" in said[-1]


def test_a_job_whose_tasks_both_start_the_run_has_one_that_is_refused(tmp_path, monkeypatch, renewing):
    """Such as `srun progrpo train` on two nodes: the job's id is the same, and both live."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    renewing.write_text(own(host="elsewhere", pid=1, job="SLURM_JOB_ID 77"))
    with pytest.raises(ValueError, match="is being written to"), only_writer(tmp_path, pace=PATIENT):
        pass


def test_a_container_of_this_hosts_name_is_another_place(tmp_path):
    """Its processes' numbers say nothing here."""
    (tmp_path / NAME).write_text(own(place="another container"))
    said: list[str] = []
    with only_writer(tmp_path, said.append, PACE):
        pass
    assert len(said) == 2


def test_the_lock_is_renewed_while_it_is_held(tmp_path):
    with only_writer(tmp_path, pace=PACE):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / NAME).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / NAME).stat().st_mtime > 0


def test_a_lock_that_somebody_deleted_is_there_again(tmp_path):
    with only_writer(tmp_path) as lock:
        (tmp_path / NAME).unlink()
        lock.check()
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_who_was_taken_for_dead_learns_it_before_it_writes(tmp_path):
    with only_writer(tmp_path, pace=PACE) as lock:
        lock.check()
        (tmp_path / NAME).write_text(own(host="elsewhere", pid=1))
        sentence = f"{tmp_path} was taken over by process 1 on elsewhere, to which this run seemed dead"
        with pytest.raises(LockLostError, match=sentence):
            lock.check()
    assert json.loads((tmp_path / NAME).read_text())["host"] == "elsewhere"


def test_of_two_that_wait_for_the_same_lock_one_has_it(tmp_path):
    (tmp_path / NAME).write_text(own(host="elsewhere", pid=1))
    ready, done, entered, refused = threading.Barrier(2), threading.Event(), [], []

    def start():
        ready.wait()
        try:
            with only_writer(tmp_path, pace=PACE):
                entered.append(1)
                done.wait(10)
        except ValueError:
            refused.append(1)
            done.set()

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(entered), len(refused)) == (1, 1)


def test_whether_a_run_writes_there_can_be_asked(tmp_path, holder):
    assert is_held(tmp_path)
    holder.kill()
    holder.wait()
    assert not is_held(tmp_path) and not is_held(tmp_path / "nowhere")
    (tmp_path / NAME).write_text(own(host="elsewhere", pid=1))
    assert is_held(tmp_path) and not is_held(tmp_path, lasting=-1)


# --- the file ---------------------------------------------------------------------------------------------------------


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


def test_the_slurm_script_goes_on_where_there_is_a_checkpoint_and_begins_anew_elsewhere(tmp_path):
    script = (Path(progrpo.__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
    lines = re.findall(r"^(?:RUN=|ARGS=|compgen ).*$", script, re.MULTILINE)
    told = "\n".join([*lines, 'echo "${ARGS[@]}"']).replace("/shared/runs", str(tmp_path))

    def arguments() -> list[str]:
        environment = {**os.environ, "SLURM_JOB_ID": "77"}
        return subprocess.run(
            ["bash", "-c", told], env=environment, check=True, capture_output=True, text=True
        ).stdout.split()

    assert len(lines) == 3 and arguments()[:4] == ["sd35m-pickscore", "--out", f"{tmp_path}/77", "--overwrite"]
    (tmp_path / "77" / "checkpoints" / "iteration_000005.writing").mkdir(parents=True)  # killed in its first checkpoint
    assert "--overwrite" in arguments()
    (tmp_path / "77" / "checkpoints" / "iteration_000010").mkdir()
    assert arguments() == ["--resume", f"{tmp_path}/77"]
