"""A reward that may fail: tried again, given so much time, and what fails in the end is missing, picture by picture."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from progrpo.rewards.base import Refusal, Reward, RewardWrapper, Score
from progrpo.types import Prompt

_HOPELESS = 8  # single pictures that fail before the first success: the reward is down, not a picture bad
_HANGING = 4  # calls that were given up and still run
# What ends a call and the run. Anything else that a reward's author let through is a failure: also a SystemExit, which would end the
# run without a word, a request that was cancelled, and a panic of a library in Rust
_ENDS = (Refusal, KeyboardInterrupt)


class RetryingReward(RewardWrapper):
    """Calls `reward`, again after `backoff` 1, 2, 4, ... seconds where that raises, `retries` times.

    Pictures whose score has an `error` are asked about again likewise. Of a call that keeps raising each picture is asked about
    alone, so that a bad one costs no other. A call that takes more than `timeout` seconds has failed; it is left to itself, and
    its pictures are not asked about alone. A reward that ranks a group (`groupwise`) is asked about all of it again, and never
    about a picture alone: places in a part of it are others. A Refusal and a KeyboardInterrupt are raised.
    """

    def __init__(
        self,
        reward: Reward,
        retries: int = 2,
        timeout: float | None = None,
        backoff: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(reward)
        self._retries, self._timeout = retries, timeout
        self._backoff, self._sleep = backoff, sleep
        self._calls: list[threading.Thread] = []

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        found, rows = [Score(None)] * len(prompts), list(range(len(prompts)))
        failure: BaseException | None = None
        for attempt in range(self._retries + 1):
            if attempt:
                self._sleep(self._backoff * 2 ** (attempt - 1) * (0.5 + random.random()))
            try:
                scores, failure = self._in_time(pictures_NHWC[rows], [prompts[i] for i in rows]), None
            except _ENDS:
                raise
            except BaseException as error:
                scores, failure = [_failed(error)] * len(rows), error
            for i, score in zip(rows, scores, strict=True):
                found[i] = score
            failed = [i for i in rows if found[i].error is not None]
            if not failed:
                return found
            rows = rows if self.groupwise else failed
        if failure is not None and not isinstance(failure, TimeoutError) and len(rows) > 1 and not self.groupwise:
            for i, score in zip(rows, self._one_by_one(pictures_NHWC[rows], [prompts[i] for i in rows]), strict=True):
                found[i] = score
        return found

    def _one_by_one(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        scores: list[Score] = []
        for i in range(len(prompts)):
            try:
                scores += self._in_time(pictures_NHWC[i : i + 1], prompts[i : i + 1])
            except _ENDS:
                raise
            except BaseException as error:
                scores.append(_failed(error))
                down = len(scores) >= _HOPELESS and all(s.error for s in scores)
                if down or isinstance(error, TimeoutError):
                    return scores + [_failed(error)] * (len(prompts) - len(scores))
        return scores

    def _in_time(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        if self._timeout is None:
            return self._reward.score(pictures_NHWC, prompts)
        self._calls = [call for call in self._calls if call.is_alive()]
        if len(self._calls) >= _HANGING:
            raise TimeoutError(f"{_HANGING} earlier calls still hang; in processes of its own such calls are ended")
        answer: list[list[Score]] = []
        failure: list[BaseException] = []

        def ask() -> None:
            try:
                answer.append(self._reward.score(pictures_NHWC, prompts))
            except BaseException as error:
                failure.append(error)

        call = threading.Thread(target=ask, daemon=True)  # one that hangs must not keep the program from ending
        call.start()
        call.join(self._timeout)
        if answer:
            return answer[0]
        if failure:
            raise failure[0]
        self._calls.append(call)
        raise TimeoutError(f"no answer in {self._timeout:g} s")


def _failed(error: BaseException) -> Score:
    return Score(None, error=f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
