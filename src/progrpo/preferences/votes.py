"""The votes of people who label: a pairs file that grows by a line with each vote, and is safe on the disk with it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from threading import Lock

from progrpo.durable import WRITING, append, write_file, write_text
from progrpo.messages import named
from progrpo.preferences.pairs import PICTURES, VALUES, Pair, pair_line, read_pairs
from progrpo.preferences.questions import Question

VOTES = "votes.jsonl"
"""The name of the file in the folder whose pictures are compared."""


class Votes:
    """The votes of one folder, for one process that writes and several threads."""

    def __init__(self, folder: Path) -> None:
        """Read the votes that are there. An unfinished last line of a killed writer is dropped: nobody was thanked
        for it. ValueError for a file that is no pairs file."""
        self._path = folder / VOTES
        self._lock = Lock()
        mend(self._path)
        self._pairs = read_votes(folder)
        self._by_annotator: dict[str, dict[str, Pair]] = {}
        for pair in self._pairs:
            self._by_annotator.setdefault(pair.annotator, {})[_question(pair).key] = pair

    @property
    def pairs(self) -> Sequence[Pair]:
        """All votes, oldest first."""
        return tuple(self._pairs)

    def of(self, annotator: str) -> Mapping[str, Pair]:
        """An annotator's votes by the key of the question."""
        return self._by_annotator.get(annotator, {})

    def add(self, question: Question, preference: float, annotator: str) -> None:
        """Write a vote, and return when it is on the disk. An annotator's second vote on a question is not counted."""
        with self._lock:
            if question.key in self.of(annotator):
                return
            pair = Pair(question.prompt, question.image_a, question.image_b, preference, annotator=annotator)
            append(self._path, pair_line(pair, self._path.parent).encode())
            self._pairs.append(pair)
            self._by_annotator.setdefault(annotator, {})[question.key] = pair

    def remove(self, key: str, annotator: str) -> None:
        """Take a vote back: the file is written anew without it."""
        with self._lock:
            pair = self.of(annotator).get(key)
            if pair is None:
                return
            left = [other for other in self._pairs if other is not pair]
            write_text(self._path, "".join(pair_line(other, self._path.parent) for other in left))
            self._pairs = left
            del self._by_annotator[annotator][key]


def read_votes(folder: Path) -> list[Pair]:
    """The votes in a folder; none where nobody has voted."""
    path = folder / VOTES
    return read_pairs(path) if path.is_file() and path.stat().st_size else []


def mend(path: Path) -> None:
    """Drop what a killed writer has left unfinished: the last line, or a file that was to replace this one."""
    for unfinished in path.parent.glob(f"{path.name}.*{WRITING}"):
        unfinished.unlink()
    data = path.read_bytes() if path.is_file() else b""
    whole, end, last = data.rpartition(b"\n")
    if not last:
        return
    try:
        json.loads(last)
        mended = data + b"\n"
    except ValueError:
        mended = whole + end
    write_file(path, lambda file: file.write(mended))


def votes_on(folder: Path, names: Collection[str]) -> list[tuple[str, str, float]]:
    """The votes on pictures of these file names, as (name of a, name of b, share for a). Others are not looked at.

    It reads while others write, so a last line that is not finished is left out.
    """
    path = folder / VOTES
    votes = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        row = json.loads(line) if line.endswith(b"\n") else {}
        a, b = (Path(str(row.get(picture))).name for picture in PICTURES)
        if a in names and b in names:
            votes.append((a, b, VALUES.get(row["preference"], row["preference"])))
    return votes


@contextmanager
def only_labeller(folder: Path) -> Iterator[None]:
    """Hold the folder for one process that writes votes. ValueError if another one holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another progrpo label already serves {named(folder)}; open its page, where several people can vote"
            ) from None
        yield
    finally:
        os.close(handle)


def is_turned(question: Question, annotator: str) -> bool:
    """Whether an annotator sees picture b on the left. It is drawn for each, so that a habit for one side evens out."""
    return sha256(f"{annotator}\n{question.key}".encode(errors="surrogateescape")).digest()[0] % 2 == 1


def _question(pair: Pair) -> Question:
    return Question(pair.prompt, pair.image_a, pair.image_b)
