"""The prompts of a suite from its published files as they are, each with its kind."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path

from progrpo.messages import named
from progrpo.prompts.load import DATASET, load_prompts
from progrpo.suites.table import Suite
from progrpo.types import Prompt
from progrpo.zoo.worlds import WORLDS

KIND = "kind"
"""The column of a prompt that holds its kind."""
QUESTIONS = "questions"
"""The column that holds the rows of a prompt that has several."""
_BUILT_IN_PROMPTS = 128


@dataclass(frozen=True)
class SuitePrompt:
    """A prompt and its place in the whole suite, by which its noise is drawn. A part of a suite keeps the places."""

    place: int
    prompt: Prompt

    @property
    def kind(self) -> str | None:
        return self.prompt.columns.get(KIND)


def read_suite(suite: Suite, sources: Sequence[str], split: str = "test") -> tuple[Prompt, ...]:
    """The prompts of a suite, from files in its published format or from `dataset:NAME`.

    ValueError, one sentence with the line or row, for a file that is missing, empty or of another format.
    """
    if suite.published is None:
        return tuple(WORLDS[suite.name].sample_prompts(split, _BUILT_IN_PROMPTS, seed=0))
    return tuple(chain.from_iterable(_read(suite, source) for source in sources))


def local_sources(suite: Suite, given: str) -> tuple[list[str], list[str]]:
    """The sources that a user's path of a suite stands for, and the names of published files that it lacks.

    A folder stands for the suite's files in it, by their published names; without any, for its text files of one
    prompt each.
    """
    if given.startswith(DATASET) or not os.path.isdir(given):
        return [given], []
    assert suite.published is not None
    names = [os.path.basename(name) for name in suite.published.files]
    there = [name for name in names if os.path.isfile(os.path.join(given, name))]
    if there:
        return [os.path.join(given, name) for name in there], [name for name in names if name not in there]
    texts = sorted(Path(given).glob("*.txt"), key=lambda path: _natural(path.name)) if suite.one_of else []
    if texts:
        return list(map(str, texts)), []
    raise ValueError(f"--prompts: {named(given)} holds none of the files of {suite.name}: {', '.join(names)}")


def spread_over_kinds(prompts: Sequence[Prompt], limit: int | None) -> list[SuitePrompt]:
    """The first prompts of each kind in turn, `limit` in all, in the order of the suite. None: all prompts."""
    whole = [SuitePrompt(place, prompt) for place, prompt in enumerate(prompts)]
    if limit is None or limit >= len(whole):
        return whole
    by_kind: dict[str | None, list[SuitePrompt]] = {}
    for item in whole:
        by_kind.setdefault(item.kind, []).append(item)
    in_turn = [item for row in zip_longest(*by_kind.values()) for item in row if item is not None]
    return sorted(in_turn[:limit], key=lambda item: item.place)


def _read(suite: Suite, source: str) -> Iterator[Prompt]:
    if suite.one_of and source.endswith(".txt"):
        yield _whole_file(suite, Path(source))
        return
    (prompts,) = load_prompts(source, "test", _text_field(suite, source)).values()
    if suite.one_of:
        yield from _grouped(suite, prompts, source)
        return
    for prompt in prompts:
        kind = _kind_of_file(source) if suite.kind_is_file else prompt.columns.get(suite.kind)
        yield prompt if kind in (None, "") else _with_columns(prompt, {KIND: str(kind).strip()})


def _text_field(suite: Suite, source: str) -> str:
    """The field that holds texts. Lists and lines without fields have none of their own."""
    return "prompt" if source.endswith(".txt") else suite.text


def _kind_of_file(source: str) -> str:
    """The kind that a file is named after: `color` of color_val.txt."""
    return Path(source).stem.removesuffix("_val")


def _grouped(suite: Suite, prompts: Iterable[Prompt], source: str) -> Iterator[Prompt]:
    """One prompt of all rows with the same item, which its column `questions` lists."""
    by_item: dict[object, list[Prompt]] = {}
    for row, prompt in enumerate(prompts, 1):
        if suite.one_of not in prompt.columns:
            raise ValueError(f"{named(source)}, row {row}: has no field {suite.one_of}, by which {suite.name} has rows")
        by_item.setdefault(prompt.columns[suite.one_of], []).append(prompt)
    for item, rows in by_item.items():
        questions = [{name: v for name, v in row.columns.items() if name != suite.one_of} for row in rows]
        yield Prompt(rows[0].text, {suite.one_of: item, QUESTIONS: questions})


def _whole_file(suite: Suite, path: Path) -> Prompt:
    """The prompt that a text file holds, on one line or several."""
    (lines,) = load_prompts(str(path)).values()
    return Prompt(" ".join(line.text for line in lines), {suite.one_of: path.stem})


def _with_columns(prompt: Prompt, columns: Mapping[str, object]) -> Prompt:
    return replace(prompt, columns={**prompt.columns, **columns})


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts 2.txt before 10.txt."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))
