"""Prompts of a built-in world, of a file, of a dataset, or from Python code."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, MappingView, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from progrpo.environment import on_the_way_to_the_hub
from progrpo.messages import named, quoted
from progrpo.prompts.files import READERS, with_plain_picture
from progrpo.prompts.pictures import IMAGE_COLUMN
from progrpo.types import GIVEN, Prompt
from progrpo.zoo.worlds import WORLDS

DATASET = "dataset:"
"""The prefix of a dataset's name where a file's may stand too."""
_ON_DISK = "dataset_dict.json"
TEXT = "prompt"
"""The field that holds a row's text, unless another is named."""

_SPLITS = {"train", "test", "validation"}

PromptsByKind = Mapping[str, tuple[Prompt, ...]]
"""Prompts by kind. All prompts of a file are of one kind, whose name is empty."""


def load_prompts(source: str, split: str = "train", column: str = TEXT) -> PromptsByKind:
    """Load the prompts of `shapes`, `words`, `dataset:NAME`, or a .txt, .jsonl, .json, .csv, .tsv or .parquet file.

    The field `column` of a row holds the text, and all others are columns of the prompt. A file's column `image` is
    the path of a picture relative to the file's folder. It becomes relative to the current folder. `split` is that of
    a built-in world or of the dataset; a file has no splits. NAME is a folder of `datasets` or a name on the hub, or
    NAME:CONFIG for one of its configurations. A dataset without the split gives its `train`, or its only one.
    ValueError, one sentence with the line or row, on a file that is missing, empty, not UTF-8 or not in its format.
    """
    if source in WORLDS:
        return WORLDS[source].prompts(split)
    if source.startswith(DATASET):
        return {"": _load_dataset(source.removeprefix(DATASET), split, column)}
    path = Path(source)
    if (kind := path.suffix.lower()) not in READERS:
        worlds = " or ".join(f"`{name}`" for name in WORLDS)
        raise ValueError(
            f"prompts must come from {worlds}, a file ({', '.join(READERS)}) or dataset:NAME, not {quoted(source)}"
            f"{_suggestion(path)}"
        )
    if not os.path.isfile(path):  # unlike Path's own method, it does not raise for a name that is too long
        raise ValueError(f"no prompt file {named(source)}{_suggestion(path)}")
    if kind == ".txt" and column != TEXT:
        raise ValueError(f"{named(source)} holds texts alone, without a field {named(column)}; leave its column out")
    try:
        prompts = tuple(
            with_picture_path(prompt_from_row(row, where, column), path.parent, where)
            for row, where in READERS[kind](path, column)
        )
    except OSError as error:
        raise ValueError(f"the prompt file {named(path)} cannot be read: {error.strerror}") from None
    if not prompts:
        raise ValueError(f"{named(path)} holds no prompt; write at least one")
    return {"": prompts}


def has_splits(source: str) -> bool:
    """Whether a source of prompts has splits: a built-in world or a dataset, and not a file."""
    return source in WORLDS or source.startswith(DATASET)


def first_prompts(source: str, count: int) -> tuple[Prompt, ...]:
    """The first prompts of a source's train split, at most so many; those of a built-in world take turns by kind."""
    if source in WORLDS:
        return tuple(WORLDS[source].sample_prompts("train", count, seed=0))
    (prompts,) = load_prompts(source).values()
    return prompts[:count]


def with_picture_path(prompt: Prompt, folder: Path, where: str) -> Prompt:
    """The prompt whose picture's path starts at the current folder; the file gives it relative to `folder`."""
    given = prompt.columns.get(IMAGE_COLUMN)
    if given is None or isinstance(given, bytes):  # a row of a parquet file may hold the picture's own bytes
        return prompt
    if not isinstance(given, str):
        raise ValueError(f"{where}: {IMAGE_COLUMN} must be the path of a picture, not {quoted(given)}")
    if "://" in given:
        raise ValueError(
            f"{where}: {IMAGE_COLUMN}: {named(given)} is a URL, and pictures are read only from this disk; download it"
            " and give its path, or rename the column if neither the model nor a reward reads it"
        )
    path = os.path.join(folder, os.path.expanduser(given))
    if not os.path.isfile(path):
        raise ValueError(
            f"{where}: {IMAGE_COLUMN}: no picture {named(path)}; give its path from the prompt file's folder"
        )
    return replace(prompt, columns={**prompt.columns, IMAGE_COLUMN: path})


def ignored_column_note(prompts: Iterable[Prompt]) -> str | None:
    """A sentence about a column that other trainers read and this one does not, or None."""
    if not any("negative_prompt" in prompt.columns for prompt in prompts):
        return None
    return (
        "the prompts have a column negative_prompt, which only rewards receive: guidance leads away from one text for"
        " all prompts, sampling.negative_prompt"
    )


def prompts_from_python(given: object, name: str, column: str = TEXT) -> tuple[Prompt, ...]:
    """The prompts that Python code gives: ordered texts, `Prompt`s or rows, a table (its rows) or a `Path` (a prompt
    file).

    The field `column` of a row holds the text. ValueError that begins with `name` for no prompts, or for anything
    else.
    """
    if isinstance(given, os.PathLike):
        return next(iter(load_prompts(os.fspath(given), column=column).values()))
    rows = _rows_of_table(given)
    message = f"{name} must be a list of texts, Prompts or rows with a field {column}, not {quoted(given)}"
    _require_ordered(rows, name, message)
    assert isinstance(rows, Iterable)
    try:
        items = iter(rows)
    except TypeError:  # an array without dimensions has __iter__ and cannot be iterated
        raise ValueError(message) from None
    prompts = tuple(_prompt_of(item, f"{name}[{i}]", column) for i, item in enumerate(items))
    if not prompts:
        raise ValueError(f"{name} is empty; give at least one")
    return prompts


@dataclass(frozen=True)
class Splits:
    """The prompts of training, of the evaluations before and after it, and of those on the way."""

    train: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]


def splits_from_python(given: object, column: str = TEXT, eval_column: str = TEXT) -> Splits:
    """The prompts that Python code gives by split, or the same ones, as `prompts_from_python` takes them, for all.

    A mapping has the split `train`. Without `test` that is the same as `train`, and `validation` the same as `test`.
    The field `eval_column` of a row of these holds the text. ValueError that begins with `prompts` for other splits,
    and for what holds no prompts.
    """
    if not isinstance(given, Mapping):
        train = prompts_from_python(given, "prompts", column)
        return Splits(train, train, train)
    if "train" not in given or not given.keys() <= _SPLITS:
        raise ValueError(
            "prompts as a mapping must have the split train, and may have test and validation and no other, not"
            f" {quoted(list(given))}"
        )
    train = prompts_from_python(given["train"], "prompts['train']", column)
    test = prompts_from_python(given["test"], "prompts['test']", eval_column) if "test" in given else train
    if "validation" not in given:
        return Splits(train, test, test)
    return Splits(train, test, prompts_from_python(given["validation"], "prompts['validation']", eval_column))


_TEXTS = str | bytes | bytearray | memoryview


def _require_ordered(given: object, name: str, message: str) -> None:
    """Raise ValueError, which begins with `message`, for what has no order or is no collection of prompts."""
    if isinstance(given, Mapping):
        values = ", ".join(f"{name}[{quoted(key)}]" for key in list(given)[:3])
        raise ValueError(f"{message}; one of its values may be meant ({values})" if values else message)
    if isinstance(given, MappingView) and isinstance(given, Set):
        raise ValueError(f"{message}; give list(...) of them if they are the prompts")
    if (isinstance(given, Set) and not isinstance(given, Sequence)) or isinstance(given, type(iter(set()))):
        raise ValueError(
            f"{message}: the order of a set differs between processes and between starts; give sorted(...) of it, or"
            " list(dict.fromkeys(texts)) to drop duplicates"
        )
    if isinstance(given, str) and Path(given).suffix.lower() in READERS:
        raise ValueError(f"{message}; a prompt file is given as pathlib.Path({quoted(given)})")
    if isinstance(given, _TEXTS) or not isinstance(given, Iterable):
        raise ValueError(message)


def _rows_of_table(given: object) -> object:
    """The rows of another library's table; anything else unchanged."""
    for (library, kind), rows in _TABLES.items():
        module = sys.modules.get(library)  # a table's library is loaded already
        if module is not None and isinstance(given, getattr(module, kind)):
            return rows(given)
    return given


def _rows_of_pandas(table: Any) -> list[dict[str, object]]:
    """The rows of a pandas table. Missing cells, which pandas stores as NaN, are None as in a JSON file."""
    rows: list[dict[str, object]] = table.astype(object).where(table.notna(), None).to_dict("records")
    return rows


_TABLES: dict[tuple[str, str], Callable[[Any], Iterable[object]]] = {
    ("pandas", "DataFrame"): _rows_of_pandas,
    ("polars", "DataFrame"): lambda table: table.to_dicts(),
    ("pyarrow", "Table"): lambda table: table.to_pylist(),
    ("pyarrow", "RecordBatch"): lambda table: table.to_pylist(),
    ("pyarrow", "Array"): lambda column: column.to_pylist(),
    ("pyarrow", "ChunkedArray"): lambda column: column.to_pylist(),
}
"""Tables whose iterator does not yield rows, by library and class."""


def _prompt_of(item: object, where: str, column: str) -> Prompt:
    if isinstance(item, Prompt):
        return prompt_from_row({**item.columns, TEXT: item.text}, where)
    if isinstance(item, Mapping):
        return prompt_from_row(item, where, column)
    if isinstance(item, str):
        return prompt_from_row({TEXT: item}, where)
    raise ValueError(f"{where} must be a text, a Prompt or a row with a field {column}, not {quoted(item)}")


def split_configuration(name: str) -> tuple[str, str]:
    """A dataset's name and its configuration, which is empty where none is named.

    A colon may also be part of a folder's own name.
    """
    dataset, _, config = name.rpartition(":")
    return (name, "") if not dataset or os.path.exists(os.path.expanduser(name)) else (dataset, config)


def _load_dataset(source: str, split: str, column: str) -> tuple[Prompt, ...]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"prompts from dataset:{source} need datasets: pip install 'progrpo[datasets]'") from None
    datasets.disable_progress_bars()
    name, config = split_configuration(source)
    on_disk = Path(name, _ON_DISK).is_file() or Path(name, "state.json").is_file()
    if on_disk and config:
        raise ValueError(f"dataset:{named(source)}: a saved dataset has no configurations; leave {named(config)} out")
    try:
        loaded = datasets.load_from_disk(name) if on_disk else datasets.load_dataset(name, config or None)
    except Exception as error:  # of many kinds: no network, no such name, another file format
        reason = named(" ".join(str(error).split()))
        several = f"; name one as dataset:{named(name)}:CONFIG" if "onfig name is missing" in reason else ""
        raise ValueError(
            f"dataset:{named(source)} could not be loaded{on_the_way_to_the_hub()}: {reason}{several}"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        present = [s for s in (split, "train", *loaded) if s in loaded]
        loaded = loaded[present[0]]
    if isinstance(loaded.features.get(IMAGE_COLUMN), datasets.Image):  # thousands of decoded pictures would not fit
        loaded = loaded.cast_column(IMAGE_COLUMN, datasets.Image(decode=False))
    rows = tuple(
        prompt_from_row(with_plain_picture(row), f"dataset:{source}, row {n}", column) for n, row in enumerate(loaded)
    )
    if not rows:
        raise ValueError(f"dataset:{source} holds no prompt")
    return rows


def _suggestion(path: Path) -> str:
    """A clause with the built-in prompts or the prompt file beside `path` whose name is nearest; empty for none.

    Names alone are compared: the folder, which all files beside it share, would make any of them near.
    """
    try:
        beside = {p.name: str(p) for p in path.parent.iterdir() if p.suffix.lower() in READERS}
    except (OSError, ValueError):  # no folder, a folder without permission, or no path at all
        beside = {}
    close = difflib.get_close_matches(path.name, [*WORLDS, *beside], 1)
    return f"; did you mean {named(beside.get(close[0], close[0]))}?" if close else ""


def prompt_from_row(row: Mapping[str, object], where: str, column: str = TEXT) -> Prompt:
    """The prompt of a row: the field `column` is its text, and every other field is a column.

    ValueError that begins with `where` for a row without a text.
    """
    if column not in row:
        raise ValueError(f"{where}: has no field named {named(column)}{_field_hint(row)}")
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {named(column)} must be a text that is not empty, not {quoted(text)}")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):  # tokenizers take neither
        raise ValueError(f"{where}: {named(column)} must be a text without NUL and lone surrogates, not {quoted(text)}")
    columns = {name: value for name, value in row.items() if name != column}
    reserved = [name for name in GIVEN if name in columns]
    if reserved:
        raise ValueError(
            f"{where}: no column can be called {reserved[0]}: under that name a reward receives {GIVEN[reserved[0]]};"
            " rename it or leave it out"
        )
    return Prompt(text.strip(), columns)


def _field_hint(row: Mapping[str, object]) -> str:
    return f", only {named(', '.join(map(str, row)))}; prompts.column or eval.column names another" if row else ""
