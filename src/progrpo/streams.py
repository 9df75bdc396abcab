"""Standard output and error whose failures end nothing.

A print fails if the terminal is closed, a pipe has no reader, the disk is full or the encoding lacks a character. It
may stand in this package, in a library's progress bar or in a user's reward. A run must not end for that.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO, cast

_STANDARD = (1, 2)


class _Nowhere(io.TextIOBase, TextIO):
    """A stream that drops all text."""

    def write(self, text: str) -> int:
        return len(text)


class Tolerant:
    """A text stream that drops what it cannot write. All other attributes are those of the wrapped stream.

    `stream` is None where Python has none, as in a process without a console.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = _Nowhere() if stream is None else stream
        self.failure: Exception | None = None
        """The first error of a write or flush; None if there was none."""

    def write(self, text: str) -> int:
        self._attempt(lambda: _write(self.stream, text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def isatty(self) -> bool:
        with suppress(OSError, ValueError):
            return self.stream.isatty()
        return False

    def _attempt(self, work: Callable[[], object]) -> None:
        try:
            work()
        except (OSError, ValueError) as error:  # a ValueError if the stream is closed
            self.failure = self.failure or error

    if not TYPE_CHECKING:  # a type checker would find every attribute here

        def __getattr__(self, name):
            return getattr(self.stream, name)


def _write(stream: TextIO, text: str) -> None:
    """Write the text, with Python's escapes for characters that the encoding lacks."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


def tolerant(stream: TextIO | None) -> TextIO:
    """The stream, wrapped so that it drops what it cannot write."""
    return cast(TextIO, stream if isinstance(stream, Tolerant) else Tolerant(stream))


def failure_of(stream: TextIO) -> Exception | None:
    """The first error of a tolerant stream. None for any other stream."""
    return stream.failure if isinstance(stream, Tolerant) else None


def make_streams_tolerant() -> None:
    """Make standard output and error tolerant for the rest of the process."""
    sys.stdout, sys.stderr = tolerant(sys.stdout), tolerant(sys.stderr)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Run the block with tolerant standard output and error."""
    before = sys.stdout, sys.stderr
    make_streams_tolerant()
    during = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for stream in during:
            stream.flush()
        # streams that the block has put there stay
        sys.stdout = before[0] if sys.stdout is during[0] else sys.stdout
        sys.stderr = before[1] if sys.stderr is during[1] else sys.stderr


def occupy_standard_descriptors() -> None:
    """Open the null device at each of 0, 1 and 2 that is closed. Else a file would get that number, and all prints."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= max(_STANDARD):
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def release_standard_descriptors() -> None:
    """Redirect streams that cannot be written to the null device, so that Python exits without an error message."""
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
