"""The folder of a suite's evaluation: each model's pictures and scores, written batch by batch.

OUT/
  results.json  table.md  report.html    the result, written anew at the end of every command
  MODEL/settings.json                    what the pictures were made by
  MODEL/pictures/00012-03.png            the fourth picture of the prompt at place 12
  MODEL/scores.jsonl                     a line per picture and scoring; a later line adds to an earlier one
  MODEL/measures.json                    the distance to the base, and the diversity, by place
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from progrpo.durable import append, write_file
from progrpo.messages import named, quoted
from progrpo.tracking.files import Folder, JsonFile, encode, in_bytes


class PictureRecord(TypedDict, total=False):
    """One picture of a suite. None is a value that is missing."""

    place: int
    member: int
    there: bool
    """Whether the picture's numbers are finite; one that is not has no file."""
    strict: bool | None
    judge: bool | None
    rewards: dict[str, float | None]


class MeasuresRecord(TypedDict, total=False):
    """Measures of the pictures of each prompt together, by the prompt's place. `vendi_of_all` is of all prompts."""

    kl: dict[str, float]
    kl_to: str
    """The base of `kl`, as a digest of what its pictures are made by."""
    diversity: dict[str, dict[str, float]]
    vendi_of_all: float
    made_by: str
    """The features and the pictures that diversity was measured with."""


Key = tuple[int, int]
"""A prompt's place and a picture's number."""


class ModelFolder(Folder):
    """The pictures and scores of one model in a suite's folder."""

    def __init__(self, out: Path, name: str) -> None:
        super().__init__(out / slug(name))
        self.settings: JsonFile[Mapping[str, object]] = JsonFile(self, "settings.json", dict)
        self.measures: JsonFile[MeasuresRecord] = JsonFile(self, "measures.json", MeasuresRecord)

    def open(self, settings: Mapping[str, object]) -> None:
        """Begin or continue. ValueError for a folder of pictures that were made by other settings."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out: {named(self.path)} cannot be made: {error.strerror}") from None
        kept = self.settings.read()
        if not kept:
            self.settings.write(settings)
        for name, value in settings.items() if kept else ():
            if kept.get(name) != value:
                raise ValueError(
                    f"{named(self.path)} holds pictures by another {name} ({quoted(kept.get(name))} there,"
                    f" {quoted(value)} now); give another --out, or the same settings"
                )
        self._drop_half_line()

    def read(self) -> dict[Key, PictureRecord]:
        """The records by place and number. A line that a killed writer left half is none."""
        records: dict[Key, PictureRecord] = {}
        for number, line in enumerate(self._lines(), 1):
            try:
                new: PictureRecord = json.loads(line)
            except ValueError:
                raise ValueError(f"{self._scores}: line {number} is not JSON; delete that line") from None
            old = records.get((new["place"], new["member"]))
            if old is not None:
                new = {**old, **new, "rewards": {**old["rewards"], **new["rewards"]}}
            records[new["place"], new["member"]] = new
        return records

    def write(self, records: Iterable[PictureRecord], pictures: Mapping[Key, np.ndarray]) -> None:
        """Write pictures (uint8, (H, W, 3)), and then the lines of records."""
        for key, image_HWC in pictures.items():
            self.save_picture(picture_name(key), image_HWC)
        append(self._scores, in_bytes("".join(map(encode, records))))

    def has_picture(self, key: Key) -> bool:
        return os.path.isfile(self.path / picture_name(key))

    def picture(self, key: Key) -> np.ndarray:
        """The picture (uint8, (H, W, 3)) of a place and number, which is there."""
        from PIL import Image

        with Image.open(self.path / picture_name(key), formats=("PNG",)) as file:
            return np.asarray(file.convert("RGB"))

    @property
    def _scores(self) -> Path:
        return self.path / "scores.jsonl"

    def _lines(self) -> Sequence[bytes]:
        data = self._scores.read_bytes() if self._scores.exists() else b""
        return data[: data.rfind(b"\n") + 1].splitlines()

    def _drop_half_line(self) -> None:
        """Cut off what follows the last line end, to which a next line would be appended."""
        data = self._scores.read_bytes() if self._scores.exists() else b""
        if data and not data.endswith(b"\n"):
            write_file(self._scores, lambda file: file.write(data[: data.rfind(b"\n") + 1]))


def picture_name(key: Key) -> str:
    return f"pictures/{key[0]:05d}-{key[1]:02d}.png"


def slug(name: str) -> str:
    """A folder's name for a model's name or path."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "model"
