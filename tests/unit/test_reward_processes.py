"""A reward in processes of its own gives what it gives here."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from progrpo.rewards.base import Refusal, WrongAnswer
from progrpo.rewards.load import load_reward
from progrpo.rewards.processes import ProcessPoolReward
from progrpo.rewards.retrying import RetryingReward
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

MODULE = "my_processed_reward"
IMPORTS = "from progrpo.rewards.load import load_reward\nfrom progrpo.rewards.settings import RewardTerm\n"
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
    reward = load_reward(RewardTerm(f"{MODULE}:{name}", processes=count))
    assert isinstance(reward, ProcessPoolReward)
    try:
        yield reward
    finally:
        reward.close()


def test_scores_are_those_of_this_process_in_order(here):
    alone = load_reward(RewardTerm(f"{MODULE}:mean"))
    with processes("mean", 2) as reward:
        for rows in (slice(None), slice(0, 1), slice(2, 5)):
            scores = reward.score(PICTURES[rows], PROMPTS[rows])
            assert scores == alone.score(PICTURES[rows], PROMPTS[rows])
        assert reward.score(PICTURES[:0], []) == []
        assert [s.value is None for s in reward.score(PICTURES, PROMPTS)] == [i == 3 for i in range(7)]


@pytest.mark.parametrize(("name", "video"), [("lengths", True), ("mean", False)])
def test_whether_it_is_given_whole_videos_is_known_here(here, name, video):
    with processes(name, 1) as reward:
        assert reward.video == video


def test_more_processes_than_pictures_are_no_trouble(here):
    with processes("mean", 3) as reward:
        assert reward.score(PICTURES[:2], PROMPTS[:2]) == load_reward(RewardTerm(f"{MODULE}:mean")).score(
            PICTURES[:2], PROMPTS[:2]
        )


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
    reward = load_reward(RewardTerm(f"{MODULE}:hangs", processes=1))
    assert isinstance(reward, ProcessPoolReward)
    (score,) = RetryingReward(reward, retries=0, timeout=0.1).score(PICTURES[:1], PROMPTS[:1])
    assert score.error == "TimeoutError: no answer in 0.1 s"
    (worker,) = reward._workers._pool._processes.values()
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
        load_reward(RewardTerm(f"{MODULE}:absent", processes=2))
    with pytest.raises(ValueError, match="neither built in"):
        load_reward(RewardTerm("absent", processes=2))


def test_what_a_terminal_sends_to_all_processes_is_left_to_the_run(here):
    """Ctrl-C and a hang-up, while the run finishes its iteration."""
    with processes("where", 1) as reward:
        (first,) = reward.score(PICTURES[:1], PROMPTS[:1])
        for number in (signal.SIGHUP, signal.SIGINT):
            os.kill(int(first.value), number)
        assert reward.score(PICTURES[:1], PROMPTS[:1]) == [first]


# --- processes that end -----------------------------------------------------------------------------------------------

MORTAL = '''
import asyncio
import os
import signal
import sys
import time
from pathlib import Path

pid = os.getpid()


def pixel(image):
    return float(image.getpixel((0, 0))[0])


def dies_once(images, prompts):
    """Killed at the first call of all, as by the kernel where memory runs out."""
    if "bad" in prompts and not Path("died").exists():
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [pixel(image) for image in images]


def dies_always(images, prompts):
    if "bad" in prompts:
        os._exit(7)
    return [pixel(image) for image in images]


def hangs_once(images, prompts):
    if "bad" in prompts and not Path("hung").exists():
        Path("hung").touch()
        time.sleep(1000)
    return [pixel(image) for image in images]


class Picky(Exception):
    """It cannot be made from its own arguments, and so not be sent."""

    def __init__(self, *, why):
        super().__init__(why)


def errs(images, prompts):
    if "exit" in prompts:
        sys.exit("no key")
    if "picky" in prompts:
        raise Picky(why="too dark")
    return [[0.0]] * len(images)


class Life:
    async def load(self):
        self.one, self.loop = asyncio.Semaphore(1), asyncio.get_running_loop()

    async def score(self, images, prompts):
        async def score(image):
            async with self.one:
                await asyncio.sleep(0)
                return pixel(image)

        assert asyncio.get_running_loop() is self.loop
        return await asyncio.gather(*map(score, images))

    async def close(self):
        assert asyncio.get_running_loop() is self.loop
        Path(f"closed-{os.getpid()}").touch()


class FailsToLoad:
    def load(self):
        raise OSError("no weights at /x")

    def score(self, images, prompts):
        return [0.0] * len(images)
'''
FIRST = PICTURES[:, 0, 0, 0].astype(float).tolist()
SIX_GOOD = [Prompt("bad" if i == 2 else "good") for i in range(7)]


@pytest.fixture
def mortal(here: Path) -> Path:
    (here / f"{MODULE}.py").write_text(MORTAL)
    return here


def asked_patiently(reward: Any, retries: int = 1, timeout: float | None = None) -> list[Any]:
    return RetryingReward(reward, retries, timeout, sleep=lambda seconds: None).score(PICTURES, SIX_GOOD)


def test_a_process_that_dies_once_is_replaced_and_all_pictures_are_scored(mortal):
    with processes("dies_once", 2) as reward:
        assert [s.value for s in asked_patiently(reward)] == FIRST and Path("died").exists()


def test_a_process_that_dies_between_two_calls_costs_none(mortal):
    with processes("dies_always", 1) as reward:
        good = [Prompt("good")] * 7
        assert [s.value for s in reward.score(PICTURES, good)] == FIRST
        (worker,) = reward._workers._pool._processes.values()
        worker.kill()
        worker.join(20)
        while not reward._workers._pool._broken:
            time.sleep(0.01)
        assert [s.value for s in reward.score(PICTURES, good)] == FIRST


def test_a_picture_that_kills_every_process_is_missing_and_costs_no_other(mortal):
    with processes("dies_always", 2) as reward:
        scores = asked_patiently(reward, retries=0)
    assert [s.value for s in scores] == [None if i == 2 else value for i, value in enumerate(FIRST)]
    assert scores[2].error == "LostWorkerError: a process ended with exit code 7"


def test_a_process_that_hangs_is_replaced_after_its_time(mortal, monkeypatch):
    monkeypatch.setattr("progrpo.rewards.processes._SLACK", 0.2)
    reward: Any = load_reward(RewardTerm(f"{MODULE}:hangs_once", timeout=0.5, processes=1))
    reward.check([])
    (first,) = reward._workers._pool._processes.values()
    with pytest.raises(TimeoutError, match=r"no answer in 0.5 s"):
        reward.score(PICTURES, SIX_GOOD)
    assert [s.value for s in asked_patiently(reward)] == FIRST
    first.join(20)
    assert not first.is_alive()
    reward.close()


def test_whatever_goes_wrong_in_a_process_comes_back_and_it_lives_on(mortal):
    here = RetryingReward(load_reward(RewardTerm(f"{MODULE}:errs")), retries=0)
    with processes("errs", 1) as reward:
        patient = RetryingReward(reward, retries=0)
        for text, error, sent in (("exit", "SystemExit: no key", ""), ("picky", "Picky: too dark", "RuntimeError: ")):
            known = str(here.score(PICTURES[:1], [Prompt(text)])[0].error)
            place = known.removesuffix(error)
            assert re.fullmatch(rf"{MODULE}\.py, line \d+: ", place)
            assert patient.score(PICTURES[:1], [Prompt(text)])[0].error == f"{place}{sent}{error}"
        with pytest.raises(
            WrongAnswer, match=r"^reward errs returned \[0.0\], of type 'list', as the score of picture 0"
        ):
            patient.score(PICTURES, SIX_GOOD)


def test_async_rewards_have_their_life_in_each_process(mortal):
    with processes("Life", 2) as reward:
        assert [[s.value for s in reward.score(PICTURES, SIX_GOOD)] for _ in range(2)] == [FIRST] * 2
    assert len(list(mortal.glob("closed-*"))) == 2


def test_what_cannot_be_loaded_in_a_process_is_refused_in_its_own_words(mortal):
    with processes("FailsToLoad", 1) as reward:
        for _ in range(2):
            with pytest.raises(Refusal, match=r"its load\(\) failed: .*line \d+: OSError: no weights at /x$"):
                reward.check([])


def test_processes_that_all_die_at_their_start_are_refused_in_a_sentence(here):
    (here / f"{MODULE}.py").write_text(
        "import multiprocessing, os\nif multiprocessing.parent_process():\n    os._exit(3)\n\n"
        "def mean(images, prompts):\n    ...\n"
    )
    sentence = r"its processes end before .* \(a process ended with exit code 3\); if each of them runs the script"
    with processes("mean", 1) as reward, pytest.raises(Refusal, match=sentence):
        reward.check([])


def test_a_column_that_cannot_be_sent_to_a_process_is_refused_by_name(here):
    with (
        processes("mean", 1) as reward,
        pytest.raises(Refusal, match=r"the column 'target' cannot be sent to its processes"),
    ):
        reward.check([Prompt("a", {"target": lambda: 1})])


def test_processes_end_with_the_one_that_started_them(here):
    script = here / "starts.py"
    script.write_text(
        f"import os, signal\nimport numpy as np\n{IMPORTS}from progrpo.types import Prompt\n"
        f"if __name__ == '__main__':\n    reward = load_reward(RewardTerm('{MODULE}:where', processes=1))\n"
        "    (score,) = reward.score(np.zeros((1, 2, 2, 3), np.uint8), [Prompt('a')])\n"
        "    print(int(score.value), flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, timeout=60)
    worker, until = int(done.stdout), time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < until
        time.sleep(0.05)


# --- scripts without a guard ------------------------------------------------------------------------------------------

UNGUARDED = """
from pathlib import Path
from progrpo.rewards.load import load_reward
from progrpo.rewards.settings import RewardTerm
Path("began").open("a").write(".")
{call}
"""
CALLS = {
    "plain": "reward = load_reward(RewardTerm('jpeg_compressibility', processes=2))",
    "in a function": "def main():\n    return load_reward(RewardTerm('jpeg_compressibility', processes=2))\n\nmain()",
    "in a loop": "for _ in range(2):\n    load_reward(RewardTerm('jpeg_compressibility',\n        processes=2))",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_script_without_a_guard_is_refused_before_a_process_runs_it_again(here, name):
    (here / "script.py").write_text(UNGUARDED.format(call=CALLS[name]))
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=60)
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith(
        "progrpo.rewards.base.Refusal: reward 'jpeg_compressibility': each of its processes would run script.py, line"
    )
    assert said.endswith('under `if __name__ == "__main__":`') and Path("began").read_text() == "."


def test_a_script_with_a_guard_scores_in_its_processes(here):
    call = (
        "if __name__ == '__main__':\n    import numpy as np\n    from progrpo.types import Prompt\n"
        f"    reward = load_reward(RewardTerm('{MODULE}:where', processes=1))\n"
        "    print(len(reward.score(np.zeros((2, 4, 4, 3), np.uint8), [Prompt('a')] * 2)))\n    reward.close()\n"
    )
    (here / "script.py").write_text(UNGUARDED.format(call=call))
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "2", "")


def test_what_a_notebook_defines_is_refused_to_processes(here):
    code = (
        f"{IMPORTS}def mine(images, prompts): ...\n"
        "assert load_reward(RewardTerm('__main__:mine'))\nload_reward(RewardTerm('__main__:mine', processes=1))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    said = done.stderr.strip().splitlines()[-1]
    assert (
        "reward '__main__:mine': its processes do not have what a notebook defines; put it into a module of its own"
        in said
    )


def test_a_script_that_is_piped_into_python_is_refused_with_a_file_to_write(here):
    code = f"{IMPORTS}load_reward(RewardTerm('jpeg_compressibility', processes=1))\n"
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, timeout=60)
    said = done.stderr.strip().splitlines()[-1]
    assert said.endswith(
        "its processes cannot import <stdin>, which starts this run; write it into a file and run that"
    )


def test_what_a_guarded_script_defines_is_scored_in_its_processes(here):
    (here / "script.py").write_text(
        f"import numpy as np\n{IMPORTS}from progrpo.types import Prompt\n"
        "def mine(images, prompts):\n    return [7.0] * len(images)\n"
        "if __name__ == '__main__':\n    reward = load_reward(RewardTerm('__main__:mine', processes=1))\n"
        "    print(reward.score(np.zeros((1, 4, 4, 3), np.uint8), [Prompt('a')])[0].value)\n    reward.close()\n"
    )
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "7.0"), done.stderr
