"""How what a user gave stands in a sentence about it: on one line, and short."""

from __future__ import annotations

import difflib
import importlib
import os
import traceback
import unicodedata
from collections.abc import Iterable

_MOST = 120
_HERE = os.path.dirname(__file__)


def quoted(value: object) -> str:
    """A value as Python writes it; of a long one the start and the end."""
    try:
        text = repr(value)
    except Exception:  # a whole number of thousands of digits, or an object whose own repr fails
        text = f"something of type {type(value).__name__} that cannot be written"
    return _in_short(text if text.isprintable() else ascii(text)[1:-1])


def named(name: object) -> str:
    """A name or a path as it is; one that would not fit on a line as `quoted` has it."""
    text = str(name)
    return _in_short(text) if text.isprintable() else quoted(text)


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?`, where X looks like `name` whole or in its last dotted part, else nothing."""
    names = list(names) if len(name) <= 100 else []
    by_tail = {n.rpartition(".")[2]: n for n in reversed(names)}  # where parts are shared, the first name
    whole = difflib.get_close_matches(name, names, 1)
    tail = [by_tail[t] for t in difflib.get_close_matches(name.rpartition(".")[2], by_tail, 1)]
    return f"; did you mean {(whole or tail)[0]}?" if whole or tail else ""


def raised(error: BaseException) -> str:
    """What a user's code raised, with the line of their file that it came from, where there is one."""
    if isinstance(error, SyntaxError):
        file, line, reason = error.filename, error.lineno, error.msg
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_theirs(frame.filename)]
        # not deep in a package that they call
        own = [frame for frame in frames if frame.filename == frames[0].filename]
        file, line, reason = (own[-1].filename, own[-1].lineno, str(error)) if own else (None, None, str(error))
    shown = "" if file is None else f"{named(_from_here(file))}, line {line}: "
    return f"{shown}{': '.join(filter(None, (type(error).__name__, named(' '.join(reason.split())))))}"


def _is_theirs(file: str) -> bool:
    return not file.startswith(("<", _HERE + os.sep)) and file != importlib.__file__


def _from_here(file: str) -> str:
    try:
        path = os.path.relpath(file)
    except OSError:  # the current folder is gone
        return file
    return file if path.startswith(os.pardir) else path


def is_one_line(text: str) -> bool:
    """Whether files, terminals and pages can take it: no control characters, line ends or halves of characters."""
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def _in_short(text: str) -> str:
    return text if len(text) <= 2 * _MOST else f"{text[:_MOST]}...{text[-_MOST:]}"
