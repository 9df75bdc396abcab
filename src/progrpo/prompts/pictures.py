"""Source pictures: what an editing model is given to change. A prompt's column `image`: a path, a file's bytes or a PIL picture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps

from progrpo.messages import named, quoted
from progrpo.types import Prompt

COLUMN = "image"

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow's others include some that start programs


def picture(value: Any, where: str = COLUMN) -> Image.Image:
    """Upright RGB pixels of a path, of a file's bytes or of a PIL picture; ValueError that begins with `where`.

    What is transparent is seen on white: colours under it, which no viewer shows, are often noise or black.
    """
    with _opened(value, where) as image:
        return _on_white(ImageOps.exif_transpose(image))


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    # Pillow has no way from premultiplied grey to RGBA but over LA
    seen = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def pictures(values: Sequence[Any]) -> list[Image.Image | None]:
    """The same of a column, None where a prompt has none; what is given twice is read once."""
    read = {id(value): picture(value) for value in values if value is not None}
    return [read.get(id(value)) for value in values]


def source_of(prompt: Prompt) -> Image.Image:
    """The picture that a prompt asks to change; ValueError that names the prompt where it has none."""
    return picture(_given(prompt), _where(prompt))


def check_sources(prompts: Iterable[Prompt]) -> None:
    """ValueError for the first prompt without a picture, or whose picture cannot be opened; no more than headers are read."""
    for prompt in prompts:
        with _opened(_given(prompt), _where(prompt)):
            pass


def key_of(prompt: Prompt) -> str:
    """What tells one source from another: its path, or a sum over what it holds. ValueError as of `source_of`."""
    return key(_given(prompt), _where(prompt))


def key(value: Any, where: str = COLUMN) -> str:
    """The same of what a column holds."""
    if isinstance(value, str | os.PathLike):
        return os.path.abspath(value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    pixels = picture(value, where)
    return hashlib.sha256(f"{pixels.size}".encode() + pixels.tobytes()).hexdigest()


def _given(prompt: Prompt) -> Any:
    if (value := prompt.columns.get(COLUMN)) is None:
        raise ValueError(
            f"the prompt {quoted(prompt.text)} has no column {COLUMN}: this model changes a picture, so give each"
            " prompt the path of one there"
        )
    return value


def _where(prompt: Prompt) -> str:
    return f"column {COLUMN} of the prompt {quoted(prompt.text)}"


@contextmanager
def _opened(value: Any, where: str) -> Iterator[Image.Image]:
    if not isinstance(value, Image.Image | bytes | str | os.PathLike):
        raise ValueError(f"{where} must be a picture or the path of one, not {quoted(value)}")
    try:
        if isinstance(value, Image.Image):
            yield _of_8_bits(value)
        else:
            with Image.open(BytesIO(value) if isinstance(value, bytes) else value, formats=_FORMATS) as image:
                yield _of_8_bits(image)
    except Exception as error:  # Pillow's are of many kinds
        which = named(value) if isinstance(value, str | os.PathLike) else "what it holds"
        reason = "no such file" if isinstance(error, FileNotFoundError) else named(" ".join(str(error).split()))
        raise ValueError(f"{where}: {which} cannot be read as a picture: {reason}") from error


def _of_8_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # which Pillow cuts at 255: nearly all of it would be white, or black
        raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}); save it with 8")
    return image
