"""Files and folders that appear whole or not at all, and then stay: written under another name, put on the disk, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

WRITING, PREVIOUS = ".writing", ".previous"  # ends of names: not whole yet, and replaced at this moment


class DiskError(RuntimeError):
    """A run cannot write its files; the message names the file, what the system said, and how to go on."""


def sync(path: Path) -> None:
    """Come back when a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block names the file, which those of writing and flushing do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace a file in one step: a reader sees the old bytes or the new ones, never half of them."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{WRITING}")  # a report may be written by two at once
    try:
        temporary.unlink(missing_ok=True)
        with (
            naming(path),
            temporary.open("xb") as file,
        ):  # a link of that name, planted in a stranger's folder, is not followed
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()  # a full disk gets its space back
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda file: file.write(text.encode()))


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file, on the disk when it comes back; one that is killed here leaves a part of `data` at most."""
    new = not path.exists()
    with naming(path), path.open("ab") as file:
        file.write(data)
        # a disk that has room for a part alone takes it without a word, which an unbuffered file would not notice
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(path.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder for the block to fill. When it ends without an error, the folder takes its place whole, and the one before goes."""
    temporary, previous = _beside(folder, WRITING), _beside(folder, PREVIOUS)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():  # else the previous one is the only one, since a writer was killed between these renames
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def whole_folder(folder: Path) -> Path:
    """Where what `new_folder` wrote lies: the one before, if a writer was killed between its two renames."""
    previous = _beside(folder, PREVIOUS)
    return previous if not folder.exists() and previous.exists() else folder


def _beside(folder: Path, end: str) -> Path:
    return folder.with_name(folder.name + end)
