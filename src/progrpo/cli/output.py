"""Output of commands: results on standard output, as a table or as JSON."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping

from progrpo.streams import failure_of


class UnreadOutputError(Exception):
    """Standard output did not take a command's result.

    Its text goes to standard error, and `code` is the exit code.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def show(result: str, costly: bool = False) -> None:
    """Print a command's result, as opposed to messages on its way.

    Where that fails, standard error gets a costly result. UnreadOutputError if it fails.
    """
    print(result, flush=True)
    failure = failure_of(sys.stdout)
    if failure is None:
        return
    text = f"{result}\n" if costly else ""
    if isinstance(failure, BrokenPipeError):  # the reader, such as head, has seen enough
        raise UnreadOutputError(text, 128 + signal.SIGPIPE)
    raise UnreadOutputError(f"{text}progrpo: standard output cannot be written: {failure}\n", 1)


def columns(rows: Mapping[str, object]) -> str:
    """Names and values as two columns."""
    width = max(len(name) for name in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


def format_result(values: Mapping[str, object], as_json: bool) -> str:
    """A result as JSON, or as a table without the values that were not measured."""
    if as_json:
        return json.dumps(values, indent=2)
    lines: dict[str, str] = {}
    for name, value in values.items():
        if value is None or value == {}:
            continue
        if isinstance(value, Mapping) and len(value) > 1:
            lines |= {f"{name}: {part}": _in_short(number) for part, number in value.items()}
        else:
            lines[name] = _in_short(value)
    return columns(lines)


def _in_short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_in_short(part)}" for name, part in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
