"""Read prompts: the built-in world's, those of a file or a dataset, or what Python gives."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, MappingView, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from progrpo.environment import on_the_way_to_the_hub
from progrpo.messages import named, quoted
from progrpo.prompts.files import READERS, with_file
from progrpo.prompts.pictures import COLUMN
from progrpo.types import GIVEN, Prompt
from progrpo.zoo.shapes import world

DATASET = "dataset:"
"""What the name of a dataset begins with, in the place of a file's."""
_ON_DISK = "dataset_dict.json"
TEXT = "prompt"
"""The field that holds a row's text, where no other is named."""

Prompts = Mapping[str, tuple[Prompt, ...]]
"""Prompts by kind; a file's are all of one kind, which has no name."""


def load_prompts(source: str, split: str = "train", column: str = TEXT) -> Prompts:
    """The prompts of `shapes` or of `dataset:NAME` (their `split`), or of a file (which has no splits): .txt, .jsonl, .json, .csv or .parquet.

    The field `column` of a row holds the text, and all others are columns of the prompt. A file's column `image` is the path of a picture, from
    the file's own folder, and becomes one from the current folder.
    NAME is a folder of `datasets` or its name on the hub, or NAME:CONFIG for one of its configurations; without a split `validation` or `test` its
    only one, or `train`, serves. ValueError, one sentence with the line or row, on a file that is missing, empty, not UTF-8 or not in its format.
    """
    if source == "shapes":
        return world.prompts(split)
    if source.startswith(DATASET):
        return {"": _of_dataset(source.removeprefix(DATASET), split, column)}
    path = Path(source)
    if (kind := path.suffix.lower()) not in READERS:
        raise ValueError(
            f"prompts must come from `shapes`, a file ({', '.join(READERS)}) or dataset:NAME, not {quoted(source)}{_nearest(path)}"
        )
    if not os.path.isfile(path):  # which takes every text: Path's own raises at one that is too long
        raise ValueError(f"no prompt file {named(source)}{_nearest(path)}")
    try:
        prompts = tuple(
            _from_folder(path.parent, prompt_of_row(row, where, column), where)
            for row, where in READERS[kind](path, column)
        )
    except OSError as error:
        raise ValueError(f"the prompt file {named(path)} cannot be read: {error.strerror}") from None
    if not prompts:
        raise ValueError(f"{named(path)} holds no prompt; write one at least")
    return {"": prompts}


def _from_folder(folder: Path, prompt: Prompt, where: str) -> Prompt:
    given = prompt.columns.get(COLUMN)
    if given is None or isinstance(given, bytes):  # in parquet the file itself may be in the row
        return prompt
    if not isinstance(given, str):
        raise ValueError(f"{where}: {COLUMN} must be the path of a picture, not {quoted(given)}")
    if "://" in given:
        raise ValueError(
            f"{where}: {COLUMN}: {named(given)} is a URL, and pictures are read from this disk alone; download it and give"
            " its path, or name the column otherwise where neither the model nor a reward reads it"
        )
    path = os.path.join(folder, os.path.expanduser(given))
    if not os.path.isfile(path):
        raise ValueError(f"{where}: {COLUMN}: no picture {named(path)}; give its path from the prompt file's folder")
    return replace(prompt, columns={**prompt.columns, COLUMN: path})


def unread(prompts: Iterable[Prompt]) -> str | None:
    """A sentence on a column that other trainers read and this one does not; None where there is none."""
    if not any("negative_prompt" in prompt.columns for prompt in prompts):
        return None
    return (
        "the prompts have a column negative_prompt, which only rewards are given: what guidance leads away from is one text for all,"
        " sampling.negative_prompt"
    )


def prompts_of(given: object, name: str, column: str = TEXT) -> tuple[Prompt, ...]:
    """What Python code gives as prompts: texts, `Prompt`s or rows, in an order of their own; a table is its rows, a `Path` a prompt file.

    The field `column` of a row holds the text. ValueError that begins with `name` if it is none, or anything else.
    """
    if isinstance(given, os.PathLike):
        return next(iter(load_prompts(os.fspath(given), column=column).values()))
    rows, refused = _rows_of_table(given), f"{name} must be a list of {_items(column)}, not {quoted(given)}"
    _require_ordered(rows, name, refused)
    try:
        items = iter(rows)
    except TypeError:  # an array without dimensions says that it can be iterated
        raise ValueError(refused) from None
    prompts = tuple(_prompt_of(item, f"{name}[{i}]", column) for i, item in enumerate(items))
    if not prompts:
        raise ValueError(f"{name} is empty; give at least one")
    return prompts


def _items(column: str) -> str:
    return f"texts, Prompts or rows with a field {column}"


_TEXTS = str | bytes | bytearray | memoryview


def _require_ordered(given: object, name: str, refused: str) -> None:
    """ValueError that begins with `refused`."""
    if isinstance(given, Mapping):
        parts = ", ".join(f"{name}[{quoted(key)}]" for key in list(given)[:3])
        raise ValueError(f"{refused}; one of its parts may be meant ({parts})" if parts else refused)
    if isinstance(given, MappingView) and isinstance(given, Set):
        raise ValueError(f"{refused}; give list(...) of them if they are the prompts")
    if (isinstance(given, Set) and not isinstance(given, Sequence)) or isinstance(given, type(iter(set()))):
        raise ValueError(
            f"{refused}: a set has another order in each process and at each start; give sorted(...) of it, or"
            " list(dict.fromkeys(texts)) to drop duplicates"
        )
    if isinstance(given, str) and Path(given).suffix.lower() in READERS:
        raise ValueError(f"{refused}; a prompt file is given as pathlib.Path({quoted(given)})")
    if isinstance(given, _TEXTS) or not isinstance(given, Iterable):
        raise ValueError(refused)


def _rows_of_table(given: Any) -> Any:
    """The rows of a table of another library, and anything else as it is."""
    for (library, kind), rows in _TABLES.items():
        loaded = sys.modules.get(library)  # where a table is, its library is loaded
        if loaded is not None and isinstance(given, getattr(loaded, kind)):
            return rows(given)
    return given


def _rows_of_pandas(table: Any) -> list[dict[str, Any]]:
    """Cells that are missing, which pandas has as NaN, are None as in a JSON file."""
    rows: list[dict[str, Any]] = table.astype(object).where(table.notna(), None).to_dict("records")
    return rows


_TABLES: dict[tuple[str, str], Callable[[Any], Iterable[Any]]] = {
    ("pandas", "DataFrame"): _rows_of_pandas,
    ("polars", "DataFrame"): lambda table: table.to_dicts(),
    ("pyarrow", "Table"): lambda table: table.to_pylist(),
    ("pyarrow", "RecordBatch"): lambda table: table.to_pylist(),
    ("pyarrow", "Array"): lambda column: column.to_pylist(),
    ("pyarrow", "ChunkedArray"): lambda column: column.to_pylist(),
}
"""Tables whose iterator gives something else than rows, by library and class."""


def _prompt_of(item: object, where: str, column: str) -> Prompt:
    if isinstance(item, Prompt):
        return prompt_of_row({**item.columns, TEXT: item.text}, where)
    if isinstance(item, Mapping):
        return prompt_of_row(item, where, column)
    if isinstance(item, str):
        return prompt_of_row({TEXT: item}, where)
    raise ValueError(f"{where} must be a text, a Prompt or a row with a field {column}, not {quoted(item)}")


def of_configuration(name: str) -> tuple[str, str]:
    """A dataset's name, and that of its configuration: empty where none is named, as of a folder with a colon in its own."""
    dataset, _, config = name.rpartition(":")
    return (name, "") if not dataset or os.path.exists(os.path.expanduser(name)) else (dataset, config)


def _of_dataset(source: str, split: str, column: str) -> tuple[Prompt, ...]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"prompts from dataset:{source} need datasets: pip install 'progrpo[datasets]'") from None
    datasets.disable_progress_bars()
    name, config = of_configuration(source)
    on_disk = Path(name, _ON_DISK).is_file() or Path(name, "state.json").is_file()
    if on_disk and config:
        raise ValueError(
            f"dataset:{named(source)}: a dataset that was saved has no configurations; leave {named(config)} out"
        )
    try:
        loaded = datasets.load_from_disk(name) if on_disk else datasets.load_dataset(name, config or None)
    except Exception as error:  # of many kinds: no network, no such name, a file of another format
        reason = named(" ".join(str(error).split()))
        several = f"; name one as dataset:{named(name)}:CONFIG" if "onfig name is missing" in reason else ""
        raise ValueError(
            f"dataset:{named(source)} could not be loaded{on_the_way_to_the_hub()}: {reason}{several}"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        there = [s for s in (split, "train", *loaded) if s in loaded]
        loaded = loaded[there[0]]
    if isinstance(loaded.features.get(COLUMN), datasets.Image):  # files stay files: thousands of pictures would not fit
        loaded = loaded.cast_column(COLUMN, datasets.Image(decode=False))
    rows = tuple(prompt_of_row(with_file(row), f"dataset:{source}, row {n}", column) for n, row in enumerate(loaded))
    if not rows:
        raise ValueError(f"dataset:{source} holds no prompt")
    return rows


def _nearest(path: Path) -> str:
    try:
        beside = [str(p) for p in path.parent.iterdir() if p.suffix.lower() in READERS]
    except (OSError, ValueError):  # no folder, one that is not ours to read, or no path at all
        beside = []
    close = difflib.get_close_matches(str(path), ["shapes", *beside], 1)
    return f"; did you mean {named(close[0])}?" if close else ""


def prompt_of_row(row: Mapping[str, Any], where: str, column: str = TEXT) -> Prompt:
    """A row whose field `column` is the text; every other field is a column of that prompt. ValueError that begins with `where` if it is none."""
    if column not in row:
        raise ValueError(f"{where}: has no field named {named(column)}{_field_hint(row)}")
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {named(column)} must be a text that is not empty, not {quoted(text)}")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):  # tokenizers take neither
        raise ValueError(
            f"{where}: {named(column)} must be a text without NUL and halves of characters, not {quoted(text)}"
        )
    columns = {name: value for name, value in row.items() if name != column}
    if taken := [name for name in GIVEN if name in columns]:
        raise ValueError(
            f"{where}: no column can be called {taken[0]}, as which a reward is given {GIVEN[taken[0]]};"
            " rename it or leave it out"
        )
    return Prompt(text.strip(), columns)


def _field_hint(row: Mapping[str, object]) -> str:
    return f", only {named(', '.join(map(str, row)))}; prompts.column or eval.column names another" if row else ""
