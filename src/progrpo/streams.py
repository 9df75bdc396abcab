"""Standard output and error that take nothing down with them.

A closed terminal, a pipe whose reader is gone, a full disk or a character that the encoding lacks makes a print fail, wherever it
stands: in this package, in a library's progress bar, in a user's reward. What a process works on does not end with its words.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

_STANDARD = (1, 2)


class _Nowhere(io.TextIOBase, TextIO):
    def write(self, text: str) -> int:
        return len(text)


class Tolerant:
    """A text stream that drops what it cannot write. Whatever else is asked of it, the stream below answers.

    `failure` is the first error of a write or flush, None where all words were taken. `stream` is None where Python has none, as
    in a process without a console.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = _Nowhere() if stream is None else stream
        self.failure: Exception | None = None

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
        except (OSError, ValueError) as error:  # a ValueError where it is closed
            self.failure = self.failure or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _write(stream: TextIO, text: str) -> None:
    """Characters that the stream's encoding lacks are written as Python's escapes."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


def tolerant(stream: TextIO | None) -> TextIO:
    """The stream, as one that drops what it cannot write."""
    return cast(TextIO, stream if isinstance(stream, Tolerant) else Tolerant(stream))


def failure_of(stream: TextIO) -> Exception | None:
    """Why a stream did not take all of its words, so far as that is known."""
    return stream.failure if isinstance(stream, Tolerant) else None


def make_streams_tolerant() -> None:
    """As `tolerant_streams`, for the rest of the process."""
    sys.stdout, sys.stderr = tolerant(sys.stdout), tolerant(sys.stderr)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Run the block with a standard output and a standard error that drop what they cannot write."""
    before = sys.stdout, sys.stderr
    make_streams_tolerant()
    during = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for stream in during:
            stream.flush()
        # and not other ones that the block has put there
        sys.stdout = before[0] if sys.stdout is during[0] else sys.stdout
        sys.stderr = before[1] if sys.stderr is during[1] else sys.stderr


def occupy_standard_descriptors() -> None:
    """Open the null device at each of 0, 1 and 2 that is closed: the next file would get that number, and every stray word."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= max(_STANDARD):
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def release_standard_descriptors() -> None:
    """Turn those that cannot be written to the null device, before Python ends and complains of what they still hold."""
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
