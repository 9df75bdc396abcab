"""Files of prompts as rows: a field holds the text, the others are its columns. Each format is read whole, or refused by line or row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from progrpo.messages import named, quoted
from progrpo.prompts.pictures import COLUMN

_LINE_BYTES = 1_000_000
Row = tuple[Mapping[str, Any], str]
"""With its place, as a message begins."""


def _texts(path: Path, column: str) -> Iterator[Row]:
    yield from (({column: text}, where) for text, where in _lines(path))


def _json_lines(path: Path, column: str) -> Iterator[Row]:
    for text, where in _lines(path):
        row = _parsed(text, where, lambda error: f"column {error.colno}")
        if not isinstance(row, dict):
            raise ValueError(f'{where}: must be an object such as {{"{column}": "a red circle"}}, not {quoted(row)}')
        yield row, where


def _json(path: Path, column: str) -> Iterator[Row]:
    """A list of texts or objects, or an object that has it as `prompts`."""
    data = _parsed(_text_of(path), named(path), lambda error: f"line {error.lineno}, column {error.colno}")
    items = data.get("prompts") if isinstance(data, dict) else data
    if not isinstance(items, list):
        raise ValueError(
            f'{named(path)}: must be a list of texts or of objects such as {{"{column}": "a red circle"}}, or an object with that list'
            f" as prompts, not {quoted(data)}"
        )
    for number, item in enumerate(items):
        where = f"{named(path)}, row {number}"
        if not isinstance(item, str | dict):
            raise ValueError(f"{where}: must be a text or an object with a field {column}, not {quoted(item)}")
        yield ({column: item} if isinstance(item, str) else item), where


def _parsed(text: str, where: str, place: Callable[[json.JSONDecodeError], str]) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        lines = "; an object a line is a .jsonl file" if error.msg == "Extra data" and error.lineno > 1 else ""
        raise ValueError(f"{where}: not JSON ({error.msg}, {place(error)}){lines}") from None
    except (ValueError, RecursionError):  # JSON by its grammar
        raise ValueError(f"{where}: numbers of thousands of digits or lists without end; leave them out") from None


def _csv(path: Path, column: str) -> Iterator[Row]:
    """Rows below a line of names, separated by commas, texts with commas or line ends in double quotes. An empty cell is None."""
    names: list[str] = []
    for cells, where in _records(path):
        if not names:
            names = [name.strip() for name in cells]
            _check_names(names, column, where)
        elif len(cells) > len(names):
            raise ValueError(
                f"{where}: {len(cells)} fields where there are {len(names)} names; put a text that holds a comma in double quotes"
            )
        else:
            row = dict.fromkeys(names) | dict(zip(names, cells, strict=False))
            yield {name: cell or (cell if name == column else None) for name, cell in row.items()}, where


def _records(path: Path) -> Iterator[tuple[list[str], str]]:
    """Lists of fields, which may go over several lines, each with the place where it begins."""
    reader, line = csv.reader(io.StringIO(_text_of(path), newline=""), strict=True), 1
    try:
        for cells in reader:
            where, line = f"{named(path)}, line {line}", reader.line_num + 1
            if cells:
                yield cells, where
    except csv.Error as error:
        raise ValueError(
            f"{named(path)}, line {line}: not CSV ({error}); put texts in double quotes, and double the quotes in them"
        ) from None


def _check_names(names: list[str], column: str, where: str) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{where}: two columns are called {named(twice[0])}; rename one")
    others = [mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]]
    if others and column not in names:
        raise ValueError(
            f"{where}: columns are separated by {quoted(others[0])}; save the file with commas between them"
        )


def _parquet(path: Path, column: str) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{named(path)}: a parquet file needs pyarrow: pip install 'progrpo[datasets]'") from None
    with path.open("rb") as file:
        try:
            rows = parquet.read_table(file).to_pylist()
        except Exception as error:  # of many kinds, for a file that is damaged or of another format
            raise ValueError(f"{named(path)}: not a parquet file ({named(' '.join(str(error).split()))})") from None
    yield from ((with_file(row), f"{named(path)}, row {number}") for number, row in enumerate(rows))


def with_file(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with a picture's bytes, or its path, in place of the pair that `datasets` has."""
    pair = row.get(COLUMN)
    return {**row, COLUMN: pair["bytes"] or pair["path"]} if isinstance(pair, Mapping) else row


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not blank, stripped, each with its place for messages."""
    number = 0
    with path.open("rb") as file:
        while read := file.readline(_LINE_BYTES + 1):
            if len(read) > _LINE_BYTES:
                raise ValueError(
                    f"{named(path)}, line {number + 1}: over {_LINE_BYTES // 10**6} MB long; write a prompt a line"
                )
            for line in read.splitlines():  # more than one where old Macs' line ends are in it
                number += 1
                where = f"{named(path)}, line {number}"
                if text := _decode(line, where).strip():
                    yield text, where


def _text_of(path: Path) -> str:
    data = path.read_bytes()
    lines = data.splitlines()
    for number, line in enumerate(lines, 1):
        _decode(line, f"{named(path)}, line {number}")
    return data.decode("utf-8-sig")


def _decode(line: bytes, where: str) -> str:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # what UTF-16 looks like, if it could be decoded at all
        raise ValueError(f"{where}: not UTF-8 text{_other_encoding(line)}; save the file as UTF-8")
    return text


def _other_encoding(line: bytes) -> str:
    """The encoding that it is likely in, in words."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or 2 * line.count(0) >= len(line) - 1 > 0:
        return " but UTF-16"
    try:
        return f" but perhaps Windows-1252, in which it reads {quoted(line.decode('cp1252'))}" * (b"\0" not in line)
    except UnicodeDecodeError:  # which leaves five bytes without a character
        return ""


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".txt": _texts,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""By the end of a file's name; they are told how the field of texts is called."""
