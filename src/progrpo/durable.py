"""Files and folders that appear whole or not at all: they are written under another name, synced and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

WRITING = ".writing"
"""The ending of a name that is not complete yet."""
PREVIOUS = ".previous"
"""The ending of a folder that is being replaced."""


class DiskError(RuntimeError):
    """A run cannot write its files. The message has the file, the system's error, and how to go on."""


class LockLostError(ValueError):
    """A run must not write its files, because another run has taken over its folder."""


def sync(path: Path) -> None:
    """Return when a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError of the block. Errors of writing and flushing lack it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file in one step: a reader sees the old bytes or the new ones, never a mixture."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{WRITING}")  # two processes may write a report at once
    try:
        temporary.unlink(missing_ok=True)
        # "x": a link of that name in a stranger's folder is not followed
        with naming(path), temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()  # this returns the space to a full disk
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda file: file.write(text.encode()))


def append(path: Path, data: bytes) -> None:
    """Append to a file and sync it. A process that is killed here leaves a part of `data` at most."""
    new = not path.exists()
    with naming(path), path.open("ab") as file:
        file.write(data)
        # a disk with room for a part writes that part without an error, which only a buffered file notices
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(path.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder for the block to fill. If the block ends without an error, it replaces the old folder whole."""
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
    if folder.exists():  # else a writer was killed between these two renames, and the previous one is the only one
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def whole_folder(folder: Path) -> Path:
    """The folder that `new_folder` wrote, or the previous one if a writer was killed between its two renames."""
    previous = _beside(folder, PREVIOUS)
    return previous if not folder.exists() and previous.exists() else folder


def _beside(folder: Path, end: str) -> Path:
    return folder.with_name(folder.name + end)
