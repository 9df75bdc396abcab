"""The event loop on which async rewards run: one for all of a process, so that clients and locks made once serve every call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

_STUCK = 5.0  # seconds after which a loop that does not turn is taken to be blocked for good


def finished(answer: Awaitable[Any], timeout: float | None = None) -> Any:
    """What an awaitable comes to on that loop. After `timeout` seconds it is cancelled, and this a TimeoutError.

    It is cancelled too where the wait is interrupted. An async reward that asks another one, which would wait for itself, gets a
    loop of its own.
    """
    loop = _loop()
    if loop.is_own_thread():
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, _awaited(answer)).result()
    asked = loop.submit(answer)
    try:
        return asked.result(timeout)
    except TimeoutError:
        if asked.done():  # its own
            raise
        asked.cancel()
        _leave_if_stuck(loop)
        raise TimeoutError("no answer in time") from None
    finally:
        asked.cancel()


class _Loop:
    """An event loop that turns in a thread of its own until the process ends."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._turn, name="async rewards", daemon=True)
        self._thread.start()

    def submit(self, answer: Awaitable[Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(_awaited(answer), self._loop)

    def is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def is_alive(self) -> bool:
        """False in a fork of the process that made it."""
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


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


_current: _Loop | None = None
_one = threading.Lock()


def _loop() -> _Loop:
    global _current
    with _one:
        if _current is None or not _current.is_alive():
            _current = _Loop()
        return _current


def _leave_if_stuck(loop: _Loop) -> None:
    """A loop that a call blocks without awaiting serves none after it: they get a new one."""
    global _current
    if not loop.turns():
        with _one:
            _current = None if _current is loop else _current
