"""A reward in processes of its own, for rewards that spend their time in Python."""

from __future__ import annotations

import ast
import atexit
import copy
import functools
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from progrpo.messages import keep_place, named, quoted
from progrpo.rewards.base import Refusal, Reward, Score
from progrpo.rewards.settings import RewardTerm
from progrpo.streams import make_streams_tolerant
from progrpo.types import Prompt

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

_GRACE = 5.0  # seconds in which processes end themselves
_SLACK = 1.0  # seconds after the time limit in which a call may still end itself

T = TypeVar("T")

Load = Callable[[RewardTerm], Reward]
"""A function of a module, so that processes can import it."""


class ProcessPoolReward(Reward):
    """A reward that is loaded in each of `term.processes` processes. Pictures are dealt among them in order.

    An error in a process is raised here. Where a process ends, all processes are replaced, and each call under way
    raises LostWorkerError; a retry may help. They are also replaced where a call takes longer than `term.timeout`, once
    all have loaded the reward.
    """

    def __init__(self, load: Load, term: RewardTerm, loaded: Reward) -> None:
        """Start the processes. `loaded` is the reward as this process has it. Refusal where new processes cannot have
        it.
        """
        _check_script(term.name)
        self.video = loaded.video
        self.needed = loaded.needed
        self.version = loaded.version
        self._term = term
        self._start = functools.partial(_Workers, term.processes, functools.partial(load, term))
        self._workers = self._start()
        self._lock = threading.Lock()
        self._closed = False

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        # a reward sees which columns there are: a share must not lack one because its own prompts do
        names = {name for prompt in prompts for name in prompt.columns}
        prompts = [Prompt(p.text, {name: p.columns.get(name) for name in names}) for p in prompts]
        shares = [rows for rows in np.array_split(np.arange(len(prompts)), self._term.processes) if len(rows)]
        calls = [functools.partial(_score, pictures_NHWC[rows], [prompts[i] for i in rows]) for rows in shares]
        return [score for scores in self._answers(calls, self._term.timeout) for score in scores]

    def check(self, prompts: Sequence[Prompt]) -> None:
        name = self._term.name
        _refuse_unsendable(name, prompts)
        call = functools.partial(_check, list(prompts))  # in one process, which must load the reward anyway
        with suppress(LostWorkerError):  # once may be chance
            self._answers([call], None)
            return
        try:
            self._answers([call], None)
        except LostWorkerError as error:
            raise Refusal(
                f"reward {name!r}: its processes end before they have scored anything ({error}); if each of them runs"
                ' the script that starts this run again, put what it does under `if __name__ == "__main__":`'
            ) from None

    def close(self) -> None:
        """End the processes, also one that hangs: it would keep the program from ending."""
        with self._lock:
            self._closed = True
            self._workers.end(_GRACE)

    def _answers(self, calls: Sequence[Callable[[], T]], timeout: float | None) -> list[T]:
        workers, futures = self._submitted(calls)
        if timeout is not None and not _all_done(futures, timeout + _SLACK):
            running = [not future.cancel() and future.running() for future in futures]
            if any(running) and workers.all_begun():
                workers.stuck = True
                self._replace(workers, 0.0)
            raise TimeoutError(f"no answer in {timeout:g} s")
        try:
            return [future.result() for future in futures]
        except BrokenProcessPool:
            if workers.stuck:  # in another call
                return self._answers(calls, timeout)
            raise LostWorkerError(self._replace(workers, _GRACE)) from None

    def _submitted(self, calls: Sequence[Callable[[], T]]) -> tuple[_Workers, list[Future[T]]]:
        workers = self._workers
        try:
            return workers, workers.submit(calls)
        except BrokenProcessPool:  # a process has ended since the last call; nothing was lost
            self._replace(workers, _GRACE)
            return self._workers, self._workers.submit(calls)

    def _replace(self, workers: _Workers, grace: float) -> str:
        """Replace these processes, unless another call has done so. Return how one of them ended."""
        with self._lock:
            if workers is self._workers and not self._closed:
                workers.end(grace)  # before new ones start, to free what they hold
                self._workers = self._start()
            return workers.ending


def _all_done(futures: Sequence[Future[T]], seconds: float) -> bool:
    """Whether all calls are answered, cancelled or lost within so many seconds."""
    deadline = time.monotonic() + seconds
    for future in futures:
        try:
            future.exception(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            return False
        except CancelledError:
            continue
    return True


class LostWorkerError(RuntimeError):
    """The end of a process that was scoring."""


class _Workers:
    """The processes that have the reward, until one of them ends or hangs."""

    def __init__(self, count: int, load: Callable[[], Reward]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._count = count
        self._begun = context.Value("i", 0)
        self._pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(self._begun, load))
        self.stuck = False
        self.ending = "a process ended"

    def submit(self, calls: Sequence[Callable[[], T]]) -> list[Future[T]]:
        return [self._pool.submit(call) for call in calls]

    def all_begun(self) -> bool:
        return self._begun.value == self._count

    def end(self, grace: float) -> None:
        processes = list((self._pool._processes or {}).values())
        manager = cast("threading.Thread | None", self._pool._executor_manager_thread)
        self._pool.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + grace
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if manager is not None:  # it may have asked for an exit code first, which only one can
            manager.join(min(grace, 0.5))
        self.ending = _ending([process.exitcode for process in processes])
        for process in processes:
            process.kill()


def _ending(codes: Sequence[int | None]) -> str:
    """A clause on how the first of these processes ended. The pool itself ends the others by SIGTERM."""
    code = next((code for code in codes if code not in (None, 0, -signal.SIGTERM)), None)
    if code is None:
        return "a process ended"
    if code > 0:
        return f"a process ended with exit code {code}"
    cause = ", as where memory runs out" if code == -signal.SIGKILL else ""
    return f"a process was ended by {signal.Signals(-code).name}{cause}"


def _refuse_unsendable(reward: str, prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        for column, value in prompt.columns.items():
            try:
                pickle.dumps(value)
            except Exception:  # pickle raises many kinds
                raise Refusal(
                    f"reward {reward!r}: the column {column!r} cannot be sent to its processes, for {quoted(value)}"
                    " cannot be pickled; leave out processes, or give the prompts plain values"
                ) from None


# --- the script that starts a run -------------------------------------------------------------------------------------


def _check_script(reward: str) -> None:
    """Refuse a main script that new processes cannot import, or that would start the run again in each of them."""
    script = _script()
    if script is None and reward.startswith("__main__:"):
        raise Refusal(
            f"reward {reward!r}: its processes do not have what a notebook defines; put it into a module of its own,"
            " my_rewards.py, and name it my_rewards:function"
        )
    if script is not None and not os.path.exists(script):
        raise Refusal(
            f"reward {reward!r}: its processes cannot import {named(script)}, which starts this run; write it into"
            " a file and run that"
        )
    if line := _unguarded_line():
        raise Refusal(
            f"reward {reward!r}: each of its processes would run {named(line)} again, which starts this run; put that"
            ' line, and whatever else the script is to do once, under `if __name__ == "__main__":`'
        )


def _script() -> str | None:
    """The file of the main script, which new processes import. None in a notebook, and where they import nothing."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", "")
    return None if name.endswith("__main__") else getattr(main, "__file__", None)


def _unguarded_line() -> str | None:
    """The line at which the main script is now, if a new process that imports the script would reach it too."""
    main, file = sys.modules["__main__"], _script()
    if file is None:
        return None
    frame = inspect.currentframe()
    while frame is not None and not (frame.f_globals is vars(main) and frame.f_code.co_name == "<module>"):
        frame = frame.f_back
    if frame is None or _is_conditional(file, frame.f_lineno):
        return None
    return f"{Path(file).name}, line {frame.f_lineno}"


def _is_conditional(file: str, line: int) -> bool:
    """Whether this line of a Python file stands under an `if`. True also where the file cannot be read."""
    try:
        nodes = ast.walk(ast.parse(Path(file).read_bytes()))
    except (OSError, SyntaxError, ValueError):
        return True
    return any(isinstance(n, ast.If | ast.Match) and n.lineno <= line <= (n.end_lineno or line) for n in nodes)


# --- in a process -----------------------------------------------------------------------------------------------------

_load: Callable[[], Reward]


def _begin(begun: Synchronized[int], load: Callable[[], Reward]) -> None:
    global _load
    _load = load
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all processes; the run decides
        signal.signal(number, signal.SIG_IGN)
    make_streams_tolerant()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(BaseException):  # the first call will raise it
        _reward().check([])
    with begun.get_lock():
        begun.value += 1


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # nobody is left to ask


@functools.cache
def _reward() -> Reward:
    reward = _load()
    atexit.register(_close, reward)
    return reward


def _close(reward: Reward) -> None:
    with suppress(Exception):  # all scores are there, and nobody reads what a process prints as it ends
        reward.close()


def _score(pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
    with _sendable():
        return _reward().score(pictures_NHWC, prompts)


def _check(prompts: Sequence[Prompt]) -> None:
    with _sendable():
        _reward().check(prompts)


@contextmanager
def _sendable() -> Iterator[None]:
    """Replace an error that cannot be pickled, and would break the pool, by one that can. Both say where it arose."""
    try:
        yield
    except BaseException as error:
        keep_place(of=error, within=error)
        try:
            copy.copy(error)  # which makes it anew from its arguments, as unpickling does
            pickle.dumps(error)
        except Exception:
            plain = RuntimeError(f"{type(error).__name__}: {error}")
            keep_place(of=error, within=plain)
            raise plain from None
        raise
