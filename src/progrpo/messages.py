"""The form of a user's values, names and errors in messages: on one line, and short."""

from __future__ import annotations

import difflib
import os
import traceback
import unicodedata
from collections.abc import Iterable, Sequence

_MOST = 120  # characters that are shown of each end of a long text
_HERE = os.path.dirname(__file__)
_PLACE = "_progrpo_place"  # the attribute of an error from another process
_PYTHON = os.path.dirname(os.__file__)  # the standard library


class FaultsError(ValueError):
    """Several mistakes of a user at once: a sentence, and below it a line for each of them."""

    def __init__(self, sentence: str, faults: Sequence[str], shown: int = 20) -> None:
        rest = [f"and {len(faults) - shown:,} more"] if len(faults) > shown else []
        super().__init__("\n  ".join([sentence, *faults[:shown], *rest]))
        self.faults = tuple(faults)


def quoted(value: object) -> str:
    """A value as Python writes it. Of a long one, the start and the end are shown."""
    try:
        text = repr(value)
    except Exception:  # a whole number of thousands of digits, or an object whose own repr fails
        text = f"something of type {type(value).__name__} that cannot be written"
    return _in_short(text if text.isprintable() else ascii(text)[1:-1])


def named(name: object) -> str:
    """A name or a path as it is, or as `quoted` writes it if it has unprintable characters."""
    text = str(name)
    return _in_short(text) if text.isprintable() else quoted(text)


def nearest(name: str, names: Iterable[str]) -> str:
    """The clause `; did you mean X?` for the name X that resembles `name` as a whole or in its last dotted part.

    It is empty if no name does.
    """
    names = list(names) if len(name) <= 100 else []
    by_last_part = {n.rpartition(".")[2]: n for n in reversed(names)}  # the first name for a shared last part
    matches = difflib.get_close_matches(name, names, 1)
    if not matches:
        last_parts = difflib.get_close_matches(name.rpartition(".")[2], by_last_part, 1)
        matches = [by_last_part[part] for part in last_parts]
    return f"; did you mean {matches[0]}?" if matches else ""


def raised(error: BaseException) -> str:
    """An error of a user's code, with the file and line of that code if they are known."""
    file, line, reason = _place_and_reason(error)
    place = "" if file is None else f"{named(_relative(file))}, line {line}: "
    reason = named(" ".join(reason.split()))
    return f"{place}{type(error).__name__}{f': {reason}' if reason else ''}"


def keep_place(of: BaseException, within: BaseException) -> None:
    """Keep the file and line of a user's code in an error that goes to another process, where it has no traceback."""
    file, line, _ = _place_and_reason(of)
    if file is not None:
        within.__dict__[_PLACE] = (file, line)  # also where the user's class forbids new attributes


def _place_and_reason(error: BaseException) -> tuple[str | None, int | None, str]:
    if isinstance(error, SyntaxError):
        return error.filename, error.lineno, error.msg
    if _PLACE in error.__dict__:
        return *error.__dict__[_PLACE], str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_of_user(frame.filename)]
    if not frames:
        return None, None, str(error)
    # the last line of the user's first file, and not one deep in a package that it calls
    frame = next(frame for frame in reversed(frames) if frame.filename == frames[0].filename)
    return frame.filename, frame.lineno, str(error)


def _is_of_user(file: str) -> bool:
    """Whether a file is neither ours nor the standard library's. Installed packages lie in a folder of the latter."""
    if file.startswith(_PYTHON + os.sep):
        return "site-packages" in file.split(os.sep)
    return not file.startswith(("<", _HERE + os.sep))


def _relative(file: str) -> str:
    """The path from the current folder for a file below it, else the path as it is."""
    try:
        path = os.path.relpath(file)
    except OSError:  # the current folder is gone
        return file
    return file if path.startswith(os.pardir) else path


def is_one_line(text: str) -> bool:
    """Whether a text has no control characters, line ends or lone surrogates, which files and pages may not hold."""
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def _in_short(text: str) -> str:
    return text if len(text) <= 2 * _MOST else f"{text[:_MOST]}...{text[-_MOST:]}"
