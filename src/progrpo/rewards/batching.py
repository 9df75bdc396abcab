"""Batches of a reward server: pictures of several requests are scored together, by one thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from progrpo.rewards.base import Refusal, Reward, Score, WrongAnswer
from progrpo.types import Prompt

Result = Score | Refusal

_HANGING = 10.0  # seconds that the reward has for its last batches when the server ends


@dataclass(frozen=True, eq=False)
class _Waiting:
    picture_HWC: np.ndarray
    prompt: Prompt
    result: Future[Result]


class Batches:
    """A queue of pictures, and one thread that scores up to `batch_size` of them at a time.

    A batch has one picture size and one set of columns. Where a batch fails, each of its pictures is scored alone, so
    that no request suffers from another's mistake. A WrongAnswer, which is the reward's own mistake, is not repeated.
    """

    def __init__(self, reward: Reward, batch_size: int) -> None:
        self._reward = reward
        self._batch_size = batch_size
        self._queues: dict[Hashable, deque[_Waiting]] = {}
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="reward", daemon=True)
        self._thread.start()

    def submit(self, pictures: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[Future[Result]]:
        items = [_Waiting(picture, prompt, Future()) for picture, prompt in zip(pictures, prompts, strict=True)]
        with self._changed:
            for item in items:
                kind = (item.picture_HWC.shape, frozenset(item.prompt.columns))
                self._queues.setdefault(kind, deque()).append(item)
            self._changed.notify()
        return [item.result for item in items]

    @property
    def waiting(self) -> int:
        """The number of pictures that wait."""
        with self._changed:
            return sum(map(len, self._queues.values()))

    def close(self) -> None:
        """Score what waits, and end the thread. A reward that hangs is abandoned: nobody waits for it any more."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join(_HANGING)

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            self._score(batch)

    def _next(self) -> list[_Waiting] | None:
        """Wait for the next batch. None after `close`, when nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._queues or not self._open)
            if not self._queues:
                return None
            kind = next(iter(self._queues))
            queue = self._queues.pop(kind)
            batch: list[_Waiting] = []
            while queue and len(batch) < self._batch_size:
                item = queue.popleft()
                if item.result.set_running_or_notify_cancel():
                    batch.append(item)
            if queue:
                self._queues[kind] = queue  # behind the other kinds
            return batch

    def _score(self, batch: list[_Waiting]) -> None:
        if not batch:
            return
        try:
            pictures_NHWC = np.stack([item.picture_HWC for item in batch])
            scores = [s.plain() for s in self._reward.score(pictures_NHWC, [item.prompt for item in batch])]
            if len(scores) != len(batch):
                raise WrongAnswer(f"the reward gave {len(scores)} scores for {len(batch)} pictures; return one each")
        except BaseException as error:  # also SystemExit: without this thread no request would be answered
            if len(batch) > 1 and not isinstance(error, WrongAnswer):
                for item in batch:
                    self._score([item])
                return
            failure = error if isinstance(error, Refusal) else Score(None, error=f"{type(error).__name__}: {error}")
            for item in batch:
                item.result.set_result(failure)
        else:
            for item, score in zip(batch, scores, strict=True):
                item.result.set_result(score)
