"""Where prompts come from, and which ones an iteration gets: a function of (seed, iteration), so a resumed run needs no more."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from progrpo.types import Prompt
from progrpo.zoo.shapes import world

Prompts = Mapping[str, tuple[Prompt, ...]]
"""Prompts by kind; a file's are all of one kind, which has no name."""


def load_prompts(source: str, split: str = "train") -> Prompts:
    """The prompts of `shapes` (its `split`), or of a .txt or .jsonl file (which has no splits), UTF-8.

    ValueError, one sentence with the line, on a file that is missing, empty, not UTF-8 or not in its format.
    """
    if source == "shapes":
        return world.prompts(split)
    path = Path(source)
    if path.suffix not in _READERS:
        raise ValueError(f"prompts must come from `shapes`, a .txt or a .jsonl file, not {source!r}{_nearest(path)}")
    if not path.is_file():
        raise ValueError(f"no prompt file {source}{_nearest(path)}")
    prompts = tuple(_READERS[path.suffix](text, where) for text, where in _lines(path))
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one a line")
    return {"": prompts}


def _nearest(path: Path) -> str:
    beside = [str(p) for p in path.parent.iterdir() if p.suffix in _READERS] if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), ["shapes", *beside], 1)
    return f"; did you mean {close[0]}?" if close else ""


def _lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a file that are not blank, stripped, each with its place for messages."""
    placed = [(line, f"{path}, line {n}") for n, line in enumerate(path.read_bytes().splitlines(), 1)]
    decoded = [(_decode(line, where).strip(), where) for line, where in placed]
    return [(text, where) for text, where in decoded if text]


def _decode(line: bytes, where: str) -> str:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # what UTF-16 looks like, if it could be decoded at all
        raise ValueError(f"{where}: not UTF-8 text; save the file as UTF-8")
    return text


def _read_text(text: str, where: str) -> Prompt:
    return Prompt(text)


def _read_json(text: str, where: str) -> Prompt:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError(f'{where}: must be an object such as {{"prompt": "a red circle"}}, not {text[:40]}')
    if "prompt" not in row:
        raise ValueError(f"{where}: has no field named prompt{_field_hint(row)}")
    prompt = row.pop("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: prompt must be a text that is not empty, not {prompt!r}")
    return Prompt(prompt.strip(), row)


def _field_hint(row: Mapping[str, object]) -> str:
    return f", only {', '.join(row)}" if row else ""


_READERS: dict[str, Callable[[str, str], Prompt]] = {".txt": _read_text, ".jsonl": _read_json}


@dataclass(frozen=True)
class PromptOrder:
    """The endless order of prompts of a seed: kinds in turn, each in a fresh permutation every time it is used up."""

    prompts: Prompts
    seed: int

    def prompts_for(self, iteration: int, count: int) -> list[Prompt]:
        """The `count` prompts of a zero-based iteration, where every iteration has as many."""
        return [self.at(iteration * count + i) for i in range(count)]

    def at(self, index: int) -> Prompt:
        """The prompt at a place of the order."""
        turn, kind = divmod(index, len(self.prompts))
        of_kind = list(self.prompts.values())[kind]
        epoch, place = divmod(turn, len(of_kind))
        return of_kind[_permutation(self.seed, kind, epoch, len(of_kind))[place]]


@lru_cache(maxsize=64)
def _permutation(seed: int, kind: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, kind, epoch]).permutation(length)
