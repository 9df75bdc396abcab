"""A folder whose files are written whole or not at all: texts, JSON and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar, cast

import numpy as np

from progrpo.durable import sync, write_file

T = TypeVar("T")


def _plain(value: object) -> object:
    """The value in JSON's types: numpy arrays as lists, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def encode(value: object, indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def in_bytes(text: str) -> bytes:
    """The text in UTF-8. A lone surrogate, Python's sign for an undecodable byte, is escaped as in JSON."""
    return text.encode(errors="backslashreplace")


class Folder:
    """A folder of texts and pictures. It must exist: a folder that is deleted is not created again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_text(self, relative: str, text: str) -> Path:
        return self._write(relative, lambda file: file.write(in_bytes(text)))

    def save_picture(self, relative: str, image_HWC: np.ndarray) -> str:
        """Write a uint8 (H, W, 3) array as PNG. The relative path is returned, for a record to name it."""
        from PIL import Image

        assert image_HWC.dtype == np.uint8, f"a picture is uint8, not {image_HWC.dtype}"
        picture = Image.fromarray(image_HWC)
        self._write(relative, lambda file: picture.save(file, format="PNG"))
        return relative

    def _write(self, relative: str, write: Callable[[BinaryIO], object]) -> Path:
        path = self.path / relative
        for folder in reversed(Path(relative).parents[:-1]):
            if not (self.path / folder).is_dir():
                (self.path / folder).mkdir()
                sync((self.path / folder).parent)
        write_file(path, write)
        return path


@dataclass(frozen=True)
class JsonFile(Generic[T]):
    """A file of JSON in a folder, which holds a value of the type T."""

    folder: Folder
    name: str
    absent: Callable[[], T]
    """The value while the file is not written yet."""

    def read(self) -> T:
        """The value that the file holds. ValueError if it is not JSON; whether it is a T is not checked."""
        path = self.folder.path / self.name
        try:
            return cast(T, json.loads(path.read_bytes()))
        except FileNotFoundError:
            return self.absent()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}); put it back as it was") from None

    @property
    def written(self) -> float | None:
        """The time at which the file was written last. None if it is not written yet."""
        try:
            return (self.folder.path / self.name).stat().st_mtime
        except OSError:
            return None

    def write(self, value: T) -> None:
        self.folder.write_text(self.name, encode(value, indent=1))
