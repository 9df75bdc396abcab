"""Source pictures of editing models: a prompt's column `image`, which is a path, a file's bytes or a PIL picture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO

from PIL import Image, ImageOps

from progrpo.messages import named, quoted
from progrpo.types import Prompt

IMAGE_COLUMN = "image"

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # some of Pillow's other formats start programs


def open_picture(value: object, where: str = IMAGE_COLUMN) -> Image.Image:
    """The upright RGB pixels of a path, of a file's bytes or of a PIL picture; ValueError that begins with `where`.

    Transparent parts become white: the colours under them, which no viewer shows, are often noise or black.
    """
    with _opened(value, where) as image:
        return _on_white(ImageOps.exif_transpose(image))


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    # Pillow converts premultiplied grey to RGBA only by way of LA
    straight = image.convert("LA") if image.mode == "La" else image
    rgba = straight.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def open_pictures(values: Sequence[object]) -> list[Image.Image | None]:
    """The pictures of a column, None where a prompt has none. A value that occurs twice is read once."""
    read = {id(value): open_picture(value) for value in values if value is not None}
    return [read.get(id(value)) for value in values]


def check_picture(value: object, where: str, decode: bool = False) -> None:
    """Raise ValueError that begins with `where` for what cannot be opened. Only with `decode` are its pixels read."""
    with _opened(value, where) as image:
        if decode:
            image.load()


def source_picture(prompt: Prompt) -> Image.Image:
    """The picture that a prompt asks to change; ValueError that names a prompt without one."""
    return open_picture(_picture_value(prompt), _where(prompt))


def check_sources(prompts: Iterable[Prompt]) -> None:
    """Raise ValueError for the first prompt without a picture, or whose picture cannot be opened.

    Only headers are read.
    """
    for prompt in prompts:
        check_picture(_picture_value(prompt), _where(prompt))


def source_key(prompt: Prompt) -> str:
    """The key of a prompt's picture (see `picture_key`); ValueError as for `source_picture`."""
    return picture_key(_picture_value(prompt), _where(prompt))


def picture_key(value: object, where: str = IMAGE_COLUMN) -> str:
    """The key that tells one picture from another: its path, or a hash of its content."""
    if isinstance(value, str | os.PathLike):
        return os.path.abspath(value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    pixels = open_picture(value, where)
    return hashlib.sha256(f"{pixels.size}".encode() + pixels.tobytes()).hexdigest()


def _picture_value(prompt: Prompt) -> object:
    value = prompt.columns.get(IMAGE_COLUMN)
    if value is None:
        raise ValueError(
            f"the prompt {quoted(prompt.text)} has no column {IMAGE_COLUMN}: this model changes a picture, so give each"
            " prompt the path of its picture there"
        )
    return value


def _where(prompt: Prompt) -> str:
    return f"column {IMAGE_COLUMN} of the prompt {quoted(prompt.text)}"


@contextmanager
def _opened(value: object, where: str) -> Iterator[Image.Image]:
    if not isinstance(value, Image.Image | bytes | str | os.PathLike):
        raise ValueError(f"{where} must be a picture or the path of one, not {quoted(value)}")
    try:
        if isinstance(value, Image.Image):
            yield _require_8_bits(value)
        else:
            with Image.open(BytesIO(value) if isinstance(value, bytes) else value, formats=_FORMATS) as image:
                yield _require_8_bits(image)
    except Exception as error:  # Pillow raises many kinds
        which = named(value) if isinstance(value, str | os.PathLike) else "its content"
        reason = "no such file" if isinstance(error, FileNotFoundError) else named(" ".join(str(error).split()))
        raise ValueError(f"{where}: {which} cannot be read as a picture: {reason}") from error


def _require_8_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # Pillow clips these at 255: the picture would be nearly all white or black
        raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}); save it with 8")
    return image
