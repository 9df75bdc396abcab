"""What the Hugging Face hub says in place of a model."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from progrpo.words import named

_UNREACHABLE = (ConnectionError, TimeoutError, socket.gaierror)  # beneath whichever client the hub's library has


class UnfitError(ValueError):
    """What is wrong with a model's files, in a sentence of our own: unlike a library's it is not cut."""


def reason_of(error: Exception, source: str | Path) -> str:
    """Why `source` could not be loaded, on one line. Of a hub that cannot be reached the libraries say that it lacks the file."""
    if isinstance(error, UnfitError):
        return str(error)
    cut_off = None if os.path.isdir(source) else next((e for e in _behind(error) if isinstance(e, _UNREACHABLE)), None)
    if cut_off is not None:
        return f"the hub cannot be reached ({_on_a_line(cut_off)}); try again with a network, or give a folder"
    if isinstance(error, OSError | ValueError):
        return _on_a_line(error)
    # the words of other kinds alone say little
    return f"{type(error).__name__}, {_on_a_line(error)}"


def _behind(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it came of."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _on_a_line(error: BaseException) -> str:
    return named(" ".join(str(error).split()))
