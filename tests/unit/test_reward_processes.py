"""A reward in processes of its own gives what it gives here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import progrpo
from progrpo.rewards.base import Refusal
from progrpo.rewards.load import load_reward
from progrpo.rewards.patient import Patient
from progrpo.rewards.processes import InProcesses
from progrpo.types import Prompt

MODULE = "my_processed_reward"
REWARD = '''
import os
import time

import numpy as np

loaded = [os.getpid()]


def mean(images, prompts, target):
    return [None if p == "none" else float(np.asarray(i).mean()) + t for i, p, t in zip(images, prompts, target)]


def where(images, prompts):
    """The process that scored each, which was loaded once there."""
    assert loaded == [os.getpid()]
    return [float(os.getpid())] * len(images)


def lengths(images, prompts):
    return [float(len(video)) for video in images]


lengths.video = True


def hangs(images, prompts):
    time.sleep(1000)


def fails(images, prompts):
    if "bad" in prompts:
        raise ZeroDivisionError("of my own making")
    return [1.0] * len(images)
'''
PICTURES = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
PROMPTS = [Prompt("none" if i == 3 else f"{i}", {"target": 1000 * i}) for i in range(7)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which has the user's module in it."""
    (tmp_path / f"{MODULE}.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop(MODULE, None)


@contextmanager
def processes(name: str, count: int) -> Iterator[Any]:
    reward = load_reward(f"{MODULE}:{name}", processes=count)
    assert isinstance(reward, InProcesses)
    try:
        yield reward
    finally:
        reward.close()


def test_scores_are_those_of_this_process_in_order(here):
    alone = load_reward(f"{MODULE}:mean")
    with processes("mean", 2) as reward:
        for rows in (slice(None), slice(0, 1), slice(2, 5)):
            found = reward.score(PICTURES[rows], PROMPTS[rows])
            assert found == alone.score(PICTURES[rows], PROMPTS[rows])
        assert reward.score(PICTURES[:0], []) == []
        assert [s.value is None for s in reward.score(PICTURES, PROMPTS)] == [i == 3 for i in range(7)]


@pytest.mark.parametrize(("name", "video"), [("lengths", True), ("mean", False)])
def test_whether_it_is_given_whole_videos_is_known_here(here, name, video):
    with processes(name, 1) as reward:
        assert reward.video == video


def test_more_processes_than_pictures_are_no_trouble(here):
    with processes("mean", 3) as reward:
        assert reward.score(PICTURES[:2], PROMPTS[:2]) == load_reward(f"{MODULE}:mean").score(PICTURES[:2], PROMPTS[:2])


def test_pictures_are_scored_elsewhere_and_the_reward_is_loaded_once_a_process(here):
    with processes("where", 2) as reward:
        seen = {s.value for _ in range(3) for s in reward.score(PICTURES, PROMPTS)}
    assert 1 <= len(seen) <= 2 and os.getpid() not in seen


def test_an_error_in_a_process_is_raised_here_and_the_next_call_is_answered(here):
    with processes("fails", 2) as reward:
        with pytest.raises(ZeroDivisionError, match="of my own making"):
            reward.score(PICTURES, [Prompt("good")] * 6 + [Prompt("bad")])
        assert len(reward.score(PICTURES, [Prompt("good")] * 7)) == 7


def test_processes_that_hang_are_ended(here, monkeypatch):
    monkeypatch.setattr("progrpo.rewards.processes._GRACE", 0.1)
    reward = load_reward(f"{MODULE}:hangs", processes=1)
    assert isinstance(reward, InProcesses)
    (score,) = Patient(reward, retries=0, timeout=0.1).score(PICTURES[:1], PROMPTS[:1])
    assert score.error == "TimeoutError: no answer in 0.1 s"
    (worker,) = reward._pool._processes.values()
    reward.close()
    worker.join(20)
    assert not worker.is_alive()


def test_a_column_that_a_prompt_lacks_is_said_by_a_process(here):
    with processes("mean", 1) as reward:
        reward.check(PROMPTS)
        with pytest.raises(Refusal, match="mean takes 'target', but the prompt 'bare' has no column of that name"):
            reward.check([*PROMPTS, Prompt("bare")])


def test_a_wrong_name_is_refused_before_any_process_starts(here):
    with pytest.raises(ValueError, match="has no function or class 'absent'"):
        load_reward(f"{MODULE}:absent", processes=2)
    with pytest.raises(ValueError, match="neither built in"):
        load_reward("absent", processes=2)


def test_a_signal_to_all_processes_is_left_to_the_run(here):
    """A closed terminal, Ctrl-C and a scheduler's end of time reach them too, while the run finishes its iteration."""
    with processes("where", 1) as reward:
        (first,) = reward.score(PICTURES[:1], PROMPTS[:1])
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            os.kill(int(first.value), number)
        assert reward.score(PICTURES[:1], PROMPTS[:1]) == [first]


def test_processes_end_with_a_run_that_is_killed(here):
    """What they hold of a GPU would be missing in the run that goes on."""
    script = (
        "import time, numpy as np\nfrom progrpo.rewards.load import load_reward\nfrom progrpo.types import Prompt\n"
        "if __name__ == '__main__':\n"
        f"    reward = load_reward('{MODULE}:where', processes=1)\n"
        "    print(int(reward.score(np.zeros((1, 4, 4, 3), np.uint8), [Prompt('a')])[0].value), flush=True)\n"
        "    time.sleep(60)\n"
    )
    (here / "run.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": f"{Path(progrpo.__file__).parents[1]}{os.pathsep}{here}"}
    run = subprocess.Popen([sys.executable, "run.py"], stdout=subprocess.PIPE, text=True, env=environment)
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    run.kill()
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 20
    while runs(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not runs(worker)


def runs(process: int) -> bool:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
