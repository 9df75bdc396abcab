"""The reasons why a model cannot be loaded, in a sentence; those of the Hugging Face hub among them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from progrpo.environment import on_the_way_to_the_hub
from progrpo.messages import named

_UNREACHABLE = (ConnectionError, TimeoutError, socket.gaierror)  # beneath whichever client the hub's library has
# What a client makes of a SOCKS proxy without its package, and of certificates that are not there
_MISLED = (ImportError, FileNotFoundError)


class UnfitError(ValueError):
    """A fault of a model's files in a sentence of our own, which is not cut like a library's."""


def reason_of(error: Exception, source: str | Path) -> str:
    """The reason why `source` could not be loaded, on one line.

    Where the hub cannot be reached, the libraries say that it lacks the file, and the cause below is what counts.
    """
    if isinstance(error, UnfitError):
        return str(error)
    if not os.path.isdir(source):
        way = on_the_way_to_the_hub()
        kinds = (_UNREACHABLE, _MISLED) if way else (_UNREACHABLE,)  # what says most comes first
        cut_off = next((e for kind in kinds for e in _behind(error) if isinstance(e, kind)), None)
        if cut_off is not None:
            return f"the hub{way} cannot be reached ({_on_a_line(cut_off)}); try again with a network, or give a folder"
    if isinstance(error, OSError | ValueError):
        return _on_a_line(error)
    # the words of other kinds alone say little
    return f"{type(error).__name__}, {_on_a_line(error)}"


def _behind(error: BaseException) -> Iterator[BaseException]:
    """The exception and its causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _on_a_line(error: BaseException) -> str:
    return named(" ".join(str(error).split()))
