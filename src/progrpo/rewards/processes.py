"""A reward in processes of its own, for one whose time goes into Python."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from progrpo.rewards.base import Reward, RewardSettings, Score, check
from progrpo.streams import make_streams_tolerant
from progrpo.types import Prompt

_GRACE = 5.0  # seconds in which processes end themselves

_here: Reward | None = None  # of a worker: loaded once when it starts


def _load(make: Callable[[str, RewardSettings], Reward], name: str, settings: RewardSettings) -> None:
    global _here
    _belong_to_the_run()
    _here = make(name, settings)


def _belong_to_the_run() -> None:
    """A terminal's and a scheduler's signals reach every process: the run says when this one ends, or ends without a word of it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    make_streams_tolerant()
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    """Else a killed run would leave this process, and what it holds of a GPU, behind."""
    if (run := multiprocessing.parent_process()) is not None:
        run.join()
        os._exit(1)


def _score(pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
    assert _here is not None
    return _here.score(pictures_NHWC, prompts)


def _check(prompts: Sequence[Prompt]) -> None:
    assert _here is not None
    check(_here, prompts)


class InProcesses:
    """The reward `make(name, settings)`, loaded in each of `count` processes; pictures are dealt among them in order.

    An error in a process is raised here, as it was there.
    """

    def __init__(
        self,
        make: Callable[[str, RewardSettings], Reward],
        name: str,
        count: int,
        settings: RewardSettings,
        video: bool = False,
    ) -> None:
        """`video`: the reward is given videos whole."""
        self._count, self.video = count, video
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._pool = ProcessPoolExecutor(count, context, initializer=_load, initargs=(make, name, settings))

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        # a reward sees which columns there are: a part must not lack one because its own prompts do
        names = {name for prompt in prompts for name in prompt.columns}
        prompts = [Prompt(p.text, {name: p.columns.get(name) for name in names}) for p in prompts]
        rows = [part for part in np.array_split(np.arange(len(prompts)), self._count) if len(part)]
        asked = [self._pool.submit(_score, pictures_NHWC[part], [prompts[i] for i in part]) for part in rows]
        return [score for answer in asked for score in answer.result()]

    def check(self, prompts: Sequence[Prompt]) -> None:
        # in one of them: what it loads to tell is loaded there anyway
        self._pool.submit(_check, list(prompts)).result()

    def close(self) -> None:
        """Also where one hangs, which would keep the program from ending."""
        workers = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        until = time.monotonic() + _GRACE
        for worker in workers:
            worker.join(max(0.0, until - time.monotonic()))
            worker.kill()
