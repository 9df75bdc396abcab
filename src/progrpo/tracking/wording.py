"""The form of numbers in the console and the report."""

from __future__ import annotations

MISSING = "–"
_LARGE = 1e6  # larger numbers are written as 1.23e+06: their digits would fill a table


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return MISSING
    return f"{value:g}" if abs(value) >= _LARGE else f"{value:.{digits}f}"


def signed(value: float) -> str:
    return f"{value:+g}" if abs(value) >= _LARGE else f"{value:+.3f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage."""
    return MISSING if value is None else f"{100 * value:.{digits}f} %"


def count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """A time in its two largest units: 7.4 s, 2 min 10 s, 3 h 05 min."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
