"""The pairs that people are asked about: of a run, of a folder of pictures, of a file, or of a run that waits.

RUN/evaluation/        the pictures before and after training, by the same prompt and from the same noise
FOLDER/001-03.png      what `progrpo sample` writes: every two pictures of a prompt, whose texts are in samples.jsonl
FOLDER/pairs.jsonl     pairs as in a pairs file; a preference is not needed, and not looked at
FOLDER/waiting/        what the reward `votes` asks of its run; it comes and goes
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, combinations, zip_longest
from pathlib import Path

from progrpo.durable import write_text
from progrpo.messages import named
from progrpo.preferences.pairs import open_pair_line, read_open_pairs
from progrpo.prompts.files import READERS
from progrpo.prompts.load import TEXT, prompt_from_row, with_picture_path
from progrpo.prompts.pictures import IMAGE_COLUMN
from progrpo.types import Prompt

PROMPTS = "samples.jsonl"
"""The file in a folder of pictures with a row per prompt; `number` is the first number of its pictures' names."""
PAIRS = "pairs.jsonl"
WAITING = "waiting"
"""The inner folder of the pairs that runs wait for, a file for each call of the reward."""
ALIVE = 30.0
"""The seconds after which a file in `waiting` that was not touched belongs to a run that has ended."""
_PICTURE = re.compile(r"(\d+)-(\d+)\.(png|jpe?g|webp)")


@dataclass(frozen=True)
class Question:
    """Two pictures of a prompt; which is better?"""

    prompt: Prompt
    image_a: Path
    image_b: Path

    @property
    def pictures(self) -> tuple[Path, Path]:
        return self.image_a, self.image_b

    @property
    def key(self) -> str:
        """The key of the prompt and the two pictures, in either order."""
        paths = sorted(os.path.abspath(path) for path in self.pictures)
        return sha256("\n".join([self.prompt.text, *paths]).encode(errors="surrogateescape")).hexdigest()[:16]


class Questions:
    """The questions of a folder. Those of a waiting run are looked for anew each time."""

    def __init__(self, folder: Path, count: int | None = None) -> None:
        """`count`: at most so many, spread over the prompts. ValueError for a folder that holds nothing to compare."""
        self._folder = folder
        self.follows_a_run = (folder / WAITING).is_dir()
        self._fixed = () if self.follows_a_run else tuple(_fixed(folder))[:count]
        self._read: dict[Path, tuple[int, tuple[Question, ...]]] = {}

    def now(self) -> Sequence[Question]:
        """The questions of this moment, in the order in which they are asked."""
        return tuple(chain.from_iterable(self._waiting())) if self.follows_a_run else self._fixed

    @property
    def run_waits(self) -> bool:
        """Whether a run waits for votes."""
        return self.follows_a_run and any(True for _ in _alive(self._folder))

    def _waiting(self) -> Iterator[tuple[Question, ...]]:
        files = dict(_alive(self._folder))
        self._read = {path: read for path, read in self._read.items() if path in files}
        for path, size in sorted(files.items()):
            if path not in self._read or self._read[path][0] != size:
                self._read[path] = size, tuple(_open_questions(path))
            yield self._read[path][1]


def _alive(folder: Path) -> Iterator[tuple[Path, int]]:
    """The files of runs that wait, with their sizes."""
    for path in (folder / WAITING).glob("*.jsonl"):
        try:
            status = path.stat()
        except FileNotFoundError:  # its run has just got its votes
            continue
        if time.time() - status.st_mtime < ALIVE:
            yield path, status.st_size


def write_waiting(path: Path, questions: Iterable[Question]) -> None:
    """Write what a run waits for."""
    write_text(path, "".join(open_pair_line(q.prompt, q.pictures, path.parent) for q in questions))


def _open_questions(path: Path) -> Iterator[Question]:
    return (Question(prompt, a, b) for prompt, a, b in read_open_pairs(path))


def _fixed(folder: Path) -> Iterable[Question]:
    if (folder / PAIRS).is_file():
        return _open_questions(folder / PAIRS)
    groups = _of_run(folder) if (folder / "config.json").is_file() else _of_pictures(folder)
    return _spread([_pairs_of(prompt, group) for prompt, group in groups])


def _spread(groups: Sequence[Sequence[Question]]) -> Iterator[Question]:
    """The first question of each prompt, then the second of each, and so on."""
    return (question for turn in zip_longest(*groups) for question in turn if question is not None)


def _pairs_of(prompt: Prompt, pictures: Sequence[Path]) -> list[Question]:
    """Every two pictures, in an order that depends on nothing but the prompt; which one is a, too."""
    draw = random.Random(prompt.text)
    pairs = [pair if draw.random() < 0.5 else pair[::-1] for pair in combinations(pictures, 2)]
    draw.shuffle(pairs)
    return [Question(prompt, a, b) for a, b in pairs]


Group = tuple[Prompt, Sequence[Path]]
"""A prompt and its pictures."""


def _of_run(folder: Path) -> list[Group]:
    """The pictures before and after training that a run has kept."""
    from progrpo.pages.run_data import inside, read_run_data

    run = read_run_data(folder)
    pairs = zip(run.before, run.after, strict=True) if run.paired else ()
    groups: list[Group] = []
    for before, after in pairs:
        names = [str(record["picture"]) for record in (before, after) if record.get("picture")]
        pictures = [folder / name for name in names if inside(folder, folder / name) and (folder / name).is_file()]
        if len(pictures) == 2:
            groups.append((Prompt(str(before["prompt"])), pictures))
    if not groups:
        raise ValueError(
            f"{named(folder)} has no pictures before and after training of the same prompts; wait for the run's end, or"
            f" sample pictures and label those: progrpo sample {named(folder)} --prompt ... --count 4 --out FOLDER"
        )
    return groups


def _of_pictures(folder: Path) -> list[Group]:
    """The pictures of a folder by the first number of their names. Links out of the folder are not followed."""
    from progrpo.pages.run_data import inside

    by_number: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if (match := _PICTURE.fullmatch(path.name)) and inside(folder, path) and path.is_file():
            by_number.setdefault(int(match[1]), []).append(path)
    groups = {number: paths for number, paths in by_number.items() if len(paths) > 1}
    if not groups:
        raise ValueError(
            f"{named(folder)} holds no run, no {PAIRS} and no two pictures of a prompt (001-00.png, 001-01.png); make"
            f" some with progrpo sample MODEL --prompt ... --count 4 --out {named(folder)}, or begin the run that asks"
            " here (reward votes) first"
        )
    prompts = _prompts(folder)
    missing = sorted(groups.keys() - prompts.keys())
    if missing:
        raise ValueError(
            f"{named(folder / PROMPTS)} has no prompt number {missing[0]}; write a line for each, such as"
            f' {{"number": {missing[0]}, "{TEXT}": "a red circle"}} for {named(groups[missing[0]][0].name)}'
        )
    return [(prompts[number], paths) for number, paths in sorted(groups.items())]


def _prompts(folder: Path) -> dict[int, Prompt]:
    """The prompts of a folder of pictures by number. A row without a number has that of its place, from 0."""
    path = folder / PROMPTS
    if not path.is_file():
        return {}
    prompts = {}
    for place, (row, where) in enumerate(READERS[".jsonl"](path, TEXT)):
        number = row.get("number", place)
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"{where}: number must be a whole number, not {number!r}")
        own = {name: value for name, value in row.items() if name != "number"}
        prompts[number] = with_picture_path(prompt_from_row(own, where), folder, where)
    return prompts


def prompt_line(number: int, prompt: Prompt, folder: Path) -> str:
    """The line of a prompt in the file of this folder, with its plain columns."""
    columns = plain_columns(prompt)
    if isinstance(source := columns.get(IMAGE_COLUMN), str):
        columns[IMAGE_COLUMN] = os.path.relpath(source, folder)
    return json.dumps({"number": number, TEXT: prompt.text, **columns}, ensure_ascii=False) + "\n"


def plain_columns(prompt: Prompt) -> dict[str, object]:
    """The columns that every file can hold: texts and numbers."""
    return {name: value for name, value in prompt.columns.items() if isinstance(value, str | int | float)}
