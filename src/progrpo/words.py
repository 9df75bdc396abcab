"""How what a user gave stands in a sentence about it: on one line, and short."""

from __future__ import annotations

import unicodedata

_MOST = 120


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


def is_one_line(text: str) -> bool:
    """Whether files, terminals and pages can take it: no control characters, line ends or halves of characters."""
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def _in_short(text: str) -> str:
    return text if len(text) <= 2 * _MOST else f"{text[:_MOST]}...{text[-_MOST:]}"
