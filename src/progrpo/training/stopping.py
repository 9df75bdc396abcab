"""SIGINT, SIGTERM and SIGHUP end a run between two iterations, with everything saved."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

from progrpo.training.distributed import Ranks

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """While it is entered, the first of these signals is noted, said and not obeyed; a SIGINT after it is a KeyboardInterrupt at once.

    A SIGHUP that is ignored, as under nohup, stays so. In another thread than the main one, where Python has no say over signals, it
    notes nothing.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._noted = ranks, 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in _SIGNALS if not _is_ignored_hangup(number)]
            self._before = {number: signal.signal(number, self._note) for number in heeded}
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
            with suppress(OSError):  # nobody may be there to read
                os.write(2, said.encode())  # print may be in the middle of another line
        self._noted = number


def _is_ignored_hangup(number: signal.Signals) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
