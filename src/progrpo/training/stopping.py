"""SIGINT, SIGTERM, SIGHUP and what a queue may send in their place end a run between two iterations, with everything saved."""

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
"""Those that would kill the process where nobody handles or ignores them: a closed terminal's, a queue's notice, a CPU limit's."""


class Stop:
    """While it is entered, the first of these signals is noted, said and not obeyed; a SIGINT after it is a KeyboardInterrupt at once.

    A SIGHUP that is ignored, as under nohup, stays so, and so does a handler of the user's own for a queue's notice. In another thread
    than the main one, where Python has no say over signals, it notes nothing.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._noted = ranks, 0
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
        """The signal that some process was sent, the same on all; None if there was none."""
        noted = max(self._ranks.gather([self._noted]))
        return signal.Signals(noted) if noted else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._noted and self._ranks.is_main:
            said = (
                f"progrpo: {signal.Signals(number).name}: the run ends, with all saved, as soon as this iteration or evaluation is done;"
                " Ctrl-C from now on ends it at once, and what is not saved is lost\n"
            )
            with suppress(OSError, ValueError):  # nobody may be there to read
                if sys.__stderr__ is not None:  # else its number may be a file's
                    os.write(sys.__stderr__.fileno(), said.encode())  # print may be in the middle of another line
        self._noted = number
