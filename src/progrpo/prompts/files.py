"""Readers of prompt files: a field of each row holds the text, and the others are its columns.

A file is read whole, or refused with the line or row at fault.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from progrpo.messages import named, quoted
from progrpo.prompts.pictures import IMAGE_COLUMN

_LINE_BYTES = 1_000_000
Row = tuple[Mapping[str, object], str]
"""A row and its place, with which a message begins."""


def _texts(path: Path, column: str) -> Iterator[Row]:
    yield from (({column: text}, where) for text, where in _lines(path))


def _json_lines(path: Path, column: str) -> Iterator[Row]:
    for text, where in _lines(path):
        row = parse_json(text, where, lambda error: f"column {error.colno}")
        if not isinstance(row, dict):
            raise ValueError(f'{where}: must be an object such as {{"{column}": "a red circle"}}, not {quoted(row)}')
        yield row, where


def _json(path: Path, column: str) -> Iterator[Row]:
    """Read a list of texts or objects, or an object that holds such a list as `prompts`."""
    data = parse_json(_read_text(path), named(path), lambda error: f"line {error.lineno}, column {error.colno}")
    items = data.get("prompts") if isinstance(data, dict) else data
    if not isinstance(items, list):
        raise ValueError(
            f'{named(path)}: must be a list of texts or of objects such as {{"{column}": "a red circle"}}, or an object'
            f" with that list as prompts, not {quoted(data)}"
        )
    for number, item in enumerate(items):
        where = f"{named(path)}, row {number}"
        if not isinstance(item, str | dict):
            raise ValueError(f"{where}: must be a text or an object with a field {column}, not {quoted(item)}")
        yield ({column: item} if isinstance(item, str) else item), where


def parse_json(text: str, where: str, place: Callable[[json.JSONDecodeError], str]) -> object:
    """The value of a JSON text. ValueError that begins with `where`, and has the `place` of the mistake."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        lines = (
            "; a file with one object per line is a .jsonl file"
            if error.msg == "Extra data" and error.lineno > 1
            else ""
        )
        raise ValueError(f"{where}: not JSON ({error.msg}, {place(error)}){lines}") from None
    except (ValueError, RecursionError):  # valid JSON that Python does not read
        raise ValueError(f"{where}: numbers of thousands of digits or endlessly nested lists; leave them out") from None


def _csv(path: Path, column: str) -> Iterator[Row]:
    """Read rows below a line of names, separated by commas.

    Texts with commas or line ends stand in double quotes. An empty cell is None.
    """
    return _table(_records(path), column, "put a text that holds a comma in double quotes")


def _tsv(path: Path, column: str) -> Iterator[Row]:
    """Read rows below a line of names, one a line, separated by tabs. An empty cell is None.

    A text may hold double quotes. One that stands in them is read as in CSV.
    """
    lines = ((_unquoted(line), where) for line, where in _unstripped_lines(path))
    return _table(lines, column, "a text cannot hold a tab")


def _unquoted(line: str) -> list[str]:
    cells = line.split("\t")
    for i, cell in enumerate(cells):
        inside = cell[1:-1].replace('""', "")
        if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inside:
            cells[i] = cell[1:-1].replace('""', '"')
    return cells


def _table(records: Iterable[tuple[list[str], str]], column: str, advice: str) -> Iterator[Row]:
    """The rows below the record of names. `advice` is for a record with more cells than names."""
    names: list[str] = []
    for cells, where in records:
        if not names:
            names = [name.strip() for name in cells]
            _check_names(names, column, where)
        elif len(cells) > len(names):
            raise ValueError(f"{where}: {len(cells)} fields where there are {len(names)} names; {advice}")
        else:
            row = dict.fromkeys(names) | dict(zip(names, cells, strict=False))
            yield {name: cell or (cell if name == column else None) for name, cell in row.items()}, where


def _records(path: Path) -> Iterator[tuple[list[str], str]]:
    """Yield the fields of each record with the place where it begins. A record may span several lines."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            where = f"{named(path)}, line {line}"
            line = reader.line_num + 1
            if cells:
                yield cells, where
    except csv.Error as error:
        raise ValueError(
            f"{named(path)}, line {line}: not CSV ({error}); put texts in double quotes, and double the quotes in them"
        ) from None


def _check_names(names: list[str], column: str, where: str) -> None:
    duplicates = [name for name in names if names.count(name) > 1]
    if duplicates:
        raise ValueError(f"{where}: two columns are called {named(duplicates[0])}; rename one")
    separators = [mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]]
    if separators and column not in names:
        raise ValueError(
            f"{where}: columns are separated by {quoted(separators[0])}; save the file with commas between them"
        )


def _parquet(path: Path, column: str) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{named(path)}: a parquet file needs pyarrow: pip install 'progrpo[datasets]'") from None
    with path.open("rb") as file:
        try:
            rows = parquet.read_table(file).to_pylist()
        except Exception as error:  # pyarrow raises many kinds for a damaged file or another format
            raise ValueError(f"{named(path)}: not a parquet file ({named(' '.join(str(error).split()))})") from None
    yield from ((with_plain_picture(row), f"{named(path)}, row {number}") for number, row in enumerate(rows))


def with_plain_picture(row: Mapping[str, object]) -> Mapping[str, object]:
    """The row with a picture's bytes, or its path, in place of the pair of both that `datasets` stores."""
    pair = row.get(IMAGE_COLUMN)
    return {**row, IMAGE_COLUMN: pair["bytes"] or pair["path"]} if isinstance(pair, Mapping) else row


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines of a file that are not blank, stripped, each with its place for messages."""
    yield from ((text.strip(), where) for text, where in _unstripped_lines(path))


def _unstripped_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines of a file that are not blank, without their ends, each with its place for messages."""
    number = 0
    with path.open("rb") as file:
        while read := file.readline(_LINE_BYTES + 1):
            if len(read) > _LINE_BYTES:
                raise ValueError(
                    f"{named(path)}, line {number + 1}: over {_LINE_BYTES // 10**6} MB long; write one prompt per line"
                )
            for line in read.splitlines():  # several, where the file has the line ends of old Macs
                number += 1
                where = f"{named(path)}, line {number}"
                if (text := decode_line(line, where)).strip():
                    yield text, where


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    lines = data.splitlines()
    for number, line in enumerate(lines, 1):
        decode_line(line, f"{named(path)}, line {number}")
    return data.decode("utf-8-sig")


def decode_line(line: bytes, where: str) -> str:
    """The text of a line in UTF-8. ValueError that begins with `where`, and names the encoding if it can be told."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 that could be decoded as UTF-8 has NULs
        raise ValueError(f"{where}: not UTF-8 text{_other_encoding(line)}; save the file as UTF-8")
    return text


def _other_encoding(line: bytes) -> str:
    """A clause that names the likely encoding of the line."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or 2 * line.count(0) >= len(line) - 1 > 0:
        return " but UTF-16"
    try:
        return f" but perhaps Windows-1252, in which it reads {quoted(line.decode('cp1252'))}" * (b"\0" not in line)
    except UnicodeDecodeError:  # Windows-1252 leaves five bytes undefined
        return ""


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".txt": _texts,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
"""Readers by the suffix of a file's name. Each takes the path and the name of the field that holds texts."""
