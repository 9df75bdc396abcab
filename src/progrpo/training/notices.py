"""Warnings of a run, which the summary and the report keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from progrpo.tracking.console import Console


class Notices:
    """The warnings of a run, each printed once and kept."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.sentences: list[str] = []

    def warn(self, sentence: str) -> None:
        """Print and keep a warning that was not given before."""
        if sentence not in self.sentences:
            self.sentences.append(sentence)
            self.console.warn(sentence)

    @contextmanager
    def not_essential(self, task: str) -> Iterator[None]:
        """Run the block, which only informs. Where it fails, a warning says so, and the run goes on."""
        try:
            yield
        except Exception as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            cause = " ".join(f"{type(error).__name__}: {reason}".split())
            self.warn(f"{task} failed ({cause}); the run is not affected")
