"""The event loop of async rewards: one for the whole process, so that clients and locks made once serve every call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

_STUCK = 5.0  # seconds after which a loop that does not turn is taken to be blocked for good


def finished(awaitable: Awaitable[T], timeout: float | None = None) -> T:
    """Wait for an awaitable on that loop. After `timeout` seconds it is cancelled, and TimeoutError is raised.

    It is also cancelled where the wait is interrupted. An async reward that asks another one, which would wait for
    itself, gets a loop of its own.
    """
    loop = _loop()
    if loop.is_own_thread():
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, _awaited(awaitable)).result()
    future = loop.submit(awaitable)
    try:
        return future.result(timeout)
    except TimeoutError:
        if future.done():  # the awaitable's own TimeoutError
            raise
        future.cancel()
        _leave_if_stuck(loop)
        raise TimeoutError("no answer in time") from None
    finally:
        future.cancel()


class _Loop:
    """An event loop that turns in a thread of its own until the process ends."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._turn, name="async rewards", daemon=True)
        self._thread.start()

    def submit(self, awaitable: Awaitable[T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(_awaited(awaitable), self._loop)

    def is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def is_alive(self) -> bool:
        """Whether its thread runs; it does not in a fork of the process that made it."""
        return self._thread.is_alive()

    def turns(self) -> bool:
        turned = threading.Event()
        self._loop.call_soon_threadsafe(turned.set)
        return turned.wait(_STUCK)

    def _turn(self) -> None:
        asyncio.set_event_loop(self._loop)
        while True:
            with suppress(SystemExit, KeyboardInterrupt):  # which asyncio passes on to a caller, and to its loop
                self._loop.run_forever()


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable


_current: _Loop | None = None
_lock = threading.Lock()


def _loop() -> _Loop:
    global _current
    with _lock:
        if _current is None or not _current.is_alive():
            _current = _Loop()
        return _current


def _leave_if_stuck(loop: _Loop) -> None:
    """Give later calls a new loop where a call blocks this one without awaiting."""
    global _current
    if not loop.turns():
        with _lock:
            _current = None if _current is loop else _current
