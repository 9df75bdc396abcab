"""Signals that end a run between two iterations, with everything saved: SIGINT, SIGTERM, a queue's notices."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

from progrpo.training.distributed import Ranks

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_UNLESS_TAKEN = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Signals that kill a process which neither handles nor ignores them: a closed terminal, a queue's notice, a CPU limit.
"""


class Stop:
    """A context that notes the first of these signals and prints what will happen.

    A SIGINT after that ends the run at once.

    A SIGHUP that is ignored, as under nohup, stays ignored, and a user's own handler for a queue's notice stays in
    place. In another thread than the main one, where Python cannot handle signals, nothing is noted.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._noted = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            free = [number for number in _UNLESS_TAKEN if signal.getsignal(number) is signal.SIG_DFL]
            self._before = {number: signal.signal(number, self._note) for number in (*_SIGNALS, *free)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave

    def asked(self) -> signal.Signals | None:
        """The signal that a process was sent, the same on all; None without one."""
        noted = max(self._ranks.gather([self._noted]))
        return signal.Signals(noted) if noted else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._noted and self._ranks.is_main:
            message = (
                f"progrpo: {signal.Signals(number).name}: the run ends, with all saved, as soon as this iteration or"
                " evaluation is done; Ctrl-C from now on ends it at once, and what is not saved is lost\n"
            )
            with suppress(OSError, ValueError):  # the terminal may be gone
                if sys.__stderr__ is not None:  # else its number may be a file's
                    os.write(sys.__stderr__.fileno(), message.encode())  # print may be in the middle of another line
        self._noted = number
