"""The base of commands, and the checks that they share."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from progrpo.config import Config
from progrpo.messages import named, nearest, quoted
from progrpo.settings import DEVICE_PATTERN

ConfigFields = Annotated[Config, arg(name="")]
"""A configuration whose fields are options beside the command's own."""


@dataclass(frozen=True)
class Command:
    """A command: its fields are its options, and its docstring is its help."""

    goes_on: ClassVar = False
    """Whether it goes on with a run, whose settings are not options."""

    def run(self) -> None:
        raise NotImplementedError


def check_range(low: float, high: float, **options: float | None) -> None:
    """Raise ValueError for the first option that is given and lies outside of low .. high."""
    for name, value in options.items():
        if value is not None and not low <= value <= high:
            raise ValueError(f"{as_option(name)} must be between {low:,} and {high:,}, not {quoted(value)}")


def check_device(name: str) -> None:
    """Raise ValueError for what is not a device's name."""
    if not re.fullmatch(DEVICE_PATTERN, name):
        raise ValueError(
            f"--device must be auto, or a device by torch's name, such as cpu or cuda:0, not {quoted(name)}"
        )


def sampling_given(command: Command) -> dict[str, float | None]:
    """The settings of evaluations that a command has options for; None is not given."""
    return {name: getattr(command, name) for name in ("num_inference_steps", "guidance_scale", "seed")}


def require_run(folder: Path) -> None:
    """Raise ValueError, with the nearest name of a run beside it, for a folder that holds no run."""
    if os.path.isfile(
        folder / "config.json"
    ):  # unlike Path's own method, it does not raise for a name that is too long
        return
    others = [str(p.parent) for p in folder.parent.glob("*/config.json")] if os.path.isdir(folder.parent) else []
    raise ValueError(f"{named(folder)} is no run folder (it holds no config.json){nearest(str(folder), others)}")


def first_free(path: Path, end: str = "") -> Path:
    """The first of PATH, PATH-2, PATH-3, ... that does not exist, each with this end of its name."""
    names = chain([path.name], (f"{path.name}-{n}" for n in count(2)))
    paths = (path.with_name(f"{name}{end}") for name in names)
    return next(path for path in paths if not path.exists())


def as_option(name: str) -> str:
    """The option of a field's name or path."""
    return "--" + name.replace("_", "-")
