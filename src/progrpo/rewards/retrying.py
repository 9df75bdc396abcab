"""A reward that may fail: it is retried, and what still fails is missing, picture by picture."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from progrpo.messages import raised
from progrpo.rewards.base import Refusal, Reward, RewardWrapper, Score
from progrpo.types import Prompt

_HOPELESS = 8  # single pictures that fail before the first success: the reward is down, not a picture bad
_HANGING = 4  # calls that were given up and still run
# Errors that end the run. Anything else is a failed call: also a SystemExit, which would end the run without a
# message, a cancelled request, and a panic of a library in Rust.
_FATAL = (Refusal, KeyboardInterrupt)


class RetryingReward(RewardWrapper):
    """A reward whose failed calls are repeated `retries` times, after 1, 2, 4, ... times `backoff` seconds.

    - Pictures whose score has an `error` are scored again likewise.
    - Where a call keeps raising, each picture is scored alone, so that a bad one costs no other.
    - A call that takes more than `timeout` seconds has failed. It is abandoned, and its pictures are not scored alone.
    - A groupwise reward always scores its whole group again, since a rank within a part of it is another one.
    - Refusal and KeyboardInterrupt are raised.
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
        self._retries = retries
        self._timeout = timeout
        self._backoff = backoff
        self._sleep = sleep
        self._hanging: list[threading.Thread] = []

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        scores = [Score(None)] * len(prompts)
        rows = list(range(len(prompts)))
        error: BaseException | None = None
        for attempt in range(self._retries + 1):
            if attempt:
                self._sleep(self._backoff * 2 ** (attempt - 1) * (0.5 + random.random()))
            error = self._fill(scores, rows, pictures_NHWC, prompts)
            failed = [i for i in rows if scores[i].error is not None]
            if not failed:
                return scores
            rows = rows if self.groupwise else failed
        if error is not None and not isinstance(error, TimeoutError) and len(rows) > 1 and not self.groupwise:
            alone = self._one_by_one(pictures_NHWC[rows], [prompts[i] for i in rows])
            for i, score in zip(rows, alone, strict=True):
                scores[i] = score
        return scores

    def _fill(
        self, scores: list[Score], rows: Sequence[int], pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]
    ) -> BaseException | None:
        """Score these rows into `scores`. Return the error of a call that failed as a whole."""
        error: BaseException | None = None
        try:
            answers = self._in_time(pictures_NHWC[rows], [prompts[i] for i in rows])
        except _FATAL:
            raise
        except BaseException as failure:
            error = failure
            answers = [_failed(failure)] * len(rows)
        for i, score in zip(rows, answers, strict=True):
            scores[i] = score
        return error

    def _one_by_one(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        scores: list[Score] = []
        for i in range(len(prompts)):
            try:
                scores += self._in_time(pictures_NHWC[i : i + 1], prompts[i : i + 1])
            except _FATAL:
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
        self._hanging = [call for call in self._hanging if call.is_alive()]
        if len(self._hanging) >= _HANGING:
            raise TimeoutError(f"{_HANGING} earlier calls still hang; in processes of its own such calls are ended")
        answer: Future[list[Score]] = Future()

        def ask() -> None:
            try:
                answer.set_result(self._reward.score(pictures_NHWC, prompts))
            except BaseException as error:
                answer.set_exception(error)

        call = threading.Thread(target=ask, daemon=True)  # one that hangs must not keep the program from ending
        call.start()
        call.join(self._timeout)
        if answer.done():
            return answer.result()
        self._hanging.append(call)
        raise TimeoutError(f"no answer in {self._timeout:g} s")


def _failed(error: BaseException) -> Score:
    return Score(None, error=raised(error))
