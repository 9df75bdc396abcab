"""SIGINT and SIGTERM end a run between two iterations, with everything saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from progrpo.training.distributed import Ranks

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """While it is entered, the first of these signals is noted and not obeyed; a second SIGINT is a KeyboardInterrupt at once.

    In another thread than the main one, where Python has no say over signals, it notes nothing.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._noted = ranks, 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
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
        self._noted = number
