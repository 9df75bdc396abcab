"""The pairs file: two pictures of one prompt, and which of them somebody prefers, one JSON object per line.

    {"prompt": "a red circle", "image_a": "001-00.png", "image_b": "001-01.png", "preference": "a"}

`preference` is "a", "b", "tie" or the share of votes for a (0 to 1). `strength` (1 unless given) is the pair's weight,
and `annotator` says who preferred. All other fields are columns of the prompt. Paths start at the file's folder. A
.json, .csv or .parquet file may have the same fields.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from progrpo.durable import write_text
from progrpo.messages import FaultsError, named, quoted
from progrpo.prompts.files import READERS, decode_line, parse_json
from progrpo.prompts.load import TEXT, prompt_from_row, with_picture_path
from progrpo.prompts.pictures import IMAGE_COLUMN, check_picture
from progrpo.prompts.texts import folded
from progrpo.types import Prompt

WORDS: Mapping[float, str] = {1.0: "a", 0.0: "b", 0.5: "tie"}
"""Preferences and the words for them in a file."""
PICTURES = ("image_a", "image_b")
PREFERENCE, STRENGTH = "preference", "strength"
VALUES = {word: value for value, word in WORDS.items()}
_FIELDS = (*PICTURES, PREFERENCE, STRENGTH, "annotator")
_READABLE = (".jsonl", ".json", ".csv", ".parquet")
_EXAMPLE = '{"prompt": "a red circle", "image_a": "1.png", "image_b": "2.png", "preference": "a"}'

Row = Mapping[str, object]


@dataclass(frozen=True)
class Pair:
    """Two pictures of a prompt, and a preference."""

    prompt: Prompt
    image_a: Path
    """The path from the current folder."""
    image_b: Path
    preference: float
    """The share of votes for a. 1: a is preferred, 0: b, 0.5: a tie."""
    strength: float = 1.0
    """The weight of the pair, above 0."""
    annotator: str = ""

    def as_prompt(self) -> Prompt:
        """The prompt with the pair in columns of its own, for training on recorded pictures."""
        pictures = dict(zip(PICTURES, (str(self.image_a), str(self.image_b)), strict=True))
        own = {**pictures, PREFERENCE: self.preference, STRENGTH: self.strength}
        return Prompt(self.prompt.text, {**self.prompt.columns, **own})


class PairsError(FaultsError):
    """All faults of a pairs file, a line for each line of the file that has one."""


def read_pairs(path: Path, prompts: Collection[str] | None = None, decode: bool = False) -> list[Pair]:
    """Read a pairs file.

    `prompts` are the texts that a prompt may have; None: any. Pictures are opened, and their pixels are read only if
    `decode` is true. PairsError lists every fault: lines that are not UTF-8 or not JSON, pictures that are missing or
    unreadable, prompts that are empty or unknown, wrong preferences and strengths, two equal pictures, and pairs that
    repeat or contradict another one of the same annotator. ValueError for a file that is missing, empty or of
    another kind.
    """
    return _Checker(path, prompts, decode).pairs()


def read_open_pairs(path: Path) -> list[tuple[Prompt, Path, Path]]:
    """Read the prompts and pictures of a pairs file whose preferences are not needed. Errors as for `read_pairs`."""
    pairs = _Checker(path, is_open=True).pairs()
    return [(pair.prompt, pair.image_a, pair.image_b) for pair in pairs]


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as JSON lines, whole or not at all. Paths of pictures are written relative to the file's folder.

    ValueError for a name without .jsonl, and for a prompt with a column that JSON cannot hold.
    """
    require_jsonl(path)
    write_text(path, "".join(pair_line(pair, path.parent) for pair in pairs))


def require_jsonl(path: Path) -> None:
    """Raise ValueError for a file's name that does not end in .jsonl."""
    if path.suffix.lower() != ".jsonl":
        raise ValueError(f"a pairs file is written as .jsonl, not as {named(path.name)}; give it that ending")


def pair_line(pair: Pair, folder: Path) -> str:
    """The line of a pair in a pairs file in this folder, with its line end. ValueError as for `write_pairs`."""
    own: dict[str, object] = {"preference": WORDS.get(pair.preference, pair.preference)}
    if pair.strength != 1:
        own["strength"] = pair.strength
    if pair.annotator:
        own["annotator"] = pair.annotator
    return _line(pair.prompt, (pair.image_a, pair.image_b), folder, own)


def open_pair_line(prompt: Prompt, pictures: tuple[Path, Path], folder: Path) -> str:
    """The line of a pair without a preference. ValueError as for `write_pairs`."""
    return _line(prompt, pictures, folder, {})


def _line(prompt: Prompt, pictures: tuple[Path, Path], folder: Path, own: Row) -> str:
    taken = sorted({TEXT, *_FIELDS} & prompt.columns.keys())
    if taken:
        raise ValueError(f"a prompt has a column {taken[0]}, which is a field of pairs; rename the column")
    row: dict[str, object] = {TEXT: prompt.text, **prompt.columns}
    if isinstance(source := row.get(IMAGE_COLUMN), str | os.PathLike):
        row[IMAGE_COLUMN] = _relative(Path(source), folder)
    row |= zip(PICTURES, (_relative(path, folder) for path in pictures), strict=True)
    try:
        return json.dumps({**row, **own}, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the prompt {quoted(prompt.text)} has a column that JSON cannot hold ({error}); leave it out"
        ) from None


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class _Checker:
    """The reading of one file, with the faults so far."""

    path: Path
    prompts: Collection[str] | None = None
    decode: bool = False
    is_open: bool = False
    """Whether the pairs need no preference; then those that occur several times count once."""
    faults: list[str] = field(default_factory=list)
    _count: int = 0
    _pictures: dict[str, str] = field(default_factory=dict)
    """The fault of each picture that was looked at; empty where it has none."""
    _seen: dict[tuple[str, frozenset[str], str], tuple[float, str]] = field(default_factory=dict)
    """The preference for the picture whose path sorts first, and the place, by prompt, pictures and annotator."""

    @cached_property
    def _folded_prompts(self) -> Mapping[str, str]:
        return {folded(text): text for text in self.prompts or ()}

    def pairs(self) -> list[Pair]:
        """The pairs of the file. PairsError if it has faults, and ValueError if there is nothing at all."""
        pairs = [self._pair(row, place) for row, place in self._rows()]
        if self.faults:
            count = f"{len(self.faults):,} {'line is' if len(self.faults) == 1 else 'lines are'}"
            raise PairsError(f"{named(self.path)}: {count} wrong; mend or delete what is listed", self.faults)
        if not self._count:
            raise ValueError(f"{named(self.path)} holds no pair; write at least one, such as {_EXAMPLE}")
        return [pair for pair in pairs if pair is not None]

    def _rows(self) -> Iterator[tuple[Row, str]]:
        """The rows with their places. A line that is not one is a fault."""
        if self.path.suffix.lower() not in _READABLE:
            raise ValueError(f"pairs must be a file ({', '.join(_READABLE)}), not {named(self.path)}")
        if not os.path.isfile(self.path):
            raise ValueError(f"no pairs file {named(self.path)}")
        try:
            rows = self._json_lines() if self.path.suffix.lower() == ".jsonl" else self._table()
            for row, place in rows:
                self._count += 1
                yield row, place
        except OSError as error:
            raise ValueError(f"the pairs file {named(self.path)} cannot be read: {error.strerror}") from None

    def _json_lines(self) -> Iterator[tuple[Row, str]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                place = f"line {number}"
                try:
                    text = decode_line(line.rstrip(b"\r\n"), place).strip()
                    row = parse_json(text, place, lambda error: f"column {error.colno}") if text else None
                except ValueError as error:
                    self.faults.append(str(error))
                    if line.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16: no other line can be read either
                        return
                    continue
                if isinstance(row, dict):
                    yield row, place
                elif text:
                    self.faults.append(f"{place}: must be an object such as {_EXAMPLE}, not {quoted(row)}")

    def _table(self) -> Iterator[tuple[Row, str]]:
        """The rows of the other kinds of files, whose readers stop at the first line that they cannot read."""
        kind = self.path.suffix.lower()
        try:
            for row, where in READERS[kind](self.path, TEXT):
                yield _with_numbers(row) if kind == ".csv" else row, where.removeprefix(f"{named(self.path)}, ")
        except ValueError as error:
            self.faults.append(str(error).removeprefix(f"{named(self.path)}, "))

    def _pair(self, row: Row, place: str) -> Pair | None:
        """The pair of a row. None if the row has faults, which are noted in one line, or is not needed."""
        faults: list[str] = []
        prompt = self._prompt(row, faults)
        images = [self._image(row, name, faults) for name in PICTURES]
        preference = 0.5 if self.is_open else _preference(row, faults)
        strength = 1.0 if self.is_open else _strength(row, faults)
        annotator = "" if self.is_open else row.get("annotator") or ""
        pair, is_new = None, True
        if not isinstance(annotator, str):
            faults.append(f"annotator must be a text, not {quoted(annotator)}")
        elif prompt is not None and None not in images and preference is not None:
            a, b = (Path(str(image)) for image in images)
            pair = Pair(prompt, a, b, preference, strength, annotator)
            is_new = self._is_new(pair, place, faults)
        if faults:
            self.faults.append(f"{place}: {'; '.join(faults)}")
        return pair if is_new and not faults else None

    def _prompt(self, row: Row, faults: list[str]) -> Prompt | None:
        own = {name: value for name, value in row.items() if name not in _FIELDS}
        try:
            prompt = with_picture_path(prompt_from_row(own, ""), self.path.parent, "")
        except ValueError as error:
            faults.append(str(error).removeprefix(": ").replace(_OTHER_COLUMN, ""))
            return None
        if self.prompts is not None and prompt.text not in self.prompts:
            same = self._folded_prompts.get(folded(prompt.text))
            hint = "" if same is None else f"; it is written {quoted(same)} there"
            faults.append(f"{quoted(prompt.text)} is none of the known prompts{hint}")
        return prompt

    def _image(self, row: Row, name: str, faults: list[str]) -> str | None:
        """The path of a picture from the current folder. None, with a fault, where there is none."""
        given = row.get(name)
        if not isinstance(given, str) or not given.strip() or "\0" in given:
            faults.append(f"{name} must be the path of a picture, not {quoted(given)}")
            return None
        if "://" in given:
            faults.append(f"{name}: {named(given)} is a URL; download the picture and give its path")
            return None
        path = str(Path(self.path.parent, os.path.expanduser(given)))
        if path not in self._pictures:
            self._pictures[path] = self._fault_of(path)
        if self._pictures[path]:
            faults.append(f"{name}: {self._pictures[path]}")
        return path

    def _fault_of(self, path: str) -> str:
        if not os.path.isfile(path):
            return f"no picture {named(path)}"
        try:
            check_picture(path, "", self.decode)
        except ValueError as error:
            return str(error).removeprefix(": ")
        return ""

    def _is_new(self, pair: Pair, place: str, faults: list[str]) -> bool:
        """Whether no earlier pair is the same. A fault is noted for that, and for two equal pictures."""
        a, b = (os.path.abspath(image) for image in (pair.image_a, pair.image_b))
        if a == b:
            faults.append("image_a and image_b are the same picture")
            return True
        for_first = pair.preference if a < b else 1 - pair.preference
        before, where = self._seen.setdefault((pair.prompt.text, frozenset((a, b)), pair.annotator), (for_first, place))
        if where == place or self.is_open:
            return where == place
        by = f" of {quoted(pair.annotator)}" if pair.annotator else ""
        if math.isclose(before, for_first, abs_tol=1e-9):
            faults.append(f"repeats {where}{by}")
        else:
            faults.append(f"contradicts {where}{by}: the same pictures with another preference")
        return False


_OTHER_COLUMN = "; prompts.column or eval.column names another"


def _with_numbers(row: Row) -> Row:
    """A row of a CSV file, which holds texts alone, with its numbers as such."""
    return {name: _number(value) if name in ("preference", "strength") else value for name, value in row.items()}


def _number(value: object) -> object:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _preference(row: Row, faults: list[str]) -> float | None:
    given = row.get("preference")
    if isinstance(given, str) and given in VALUES:
        return VALUES[given]
    if isinstance(given, int | float) and not isinstance(given, bool) and 0 <= given <= 1:
        return float(given)
    what = f"not {quoted(given)}" if "preference" in row else "and is missing"
    faults.append(f'preference must be "a", "b", "tie" or the share for a (0 to 1), {what}')
    return None


def _strength(row: Row, faults: list[str]) -> float:
    given = row.get("strength")
    if given is None:
        return 1.0
    if isinstance(given, int | float) and not isinstance(given, bool) and 0 < given < math.inf:
        return float(given)
    faults.append(f"strength must be a number above 0, not {quoted(given)}")
    return 1.0
