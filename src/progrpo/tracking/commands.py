"""The command that resumes a run or starts it anew: a command line, or the call of a run of Python objects."""

from __future__ import annotations

import shlex
from pathlib import Path

from progrpo.tracking.files import Folder, JsonFile
from progrpo.types import FROM_PYTHON


def resume_command(run: Path) -> str:
    return _call(run, "resume") if is_of_python(run) else f"progrpo train --resume {_in_shell(run)}"


def restart_command(run: Path) -> str:
    if is_of_python(run):
        return _call(run, "overwrite")
    return f"progrpo train {_in_shell(run)} --out {_in_shell(run)} --overwrite"


def is_of_python(run: Path) -> bool:
    """Whether the run's model was given to `progrpo.train`, so that no command can load it."""
    config: JsonFile[dict[str, dict[str, object]]] = JsonFile(Folder(run), "config.json", dict)
    try:
        model = config.read()["model"]["path"]
    except (ValueError, LookupError, TypeError, OSError):  # config.json is missing or damaged
        return False
    return isinstance(model, str) and model.endswith(FROM_PYTHON)


def _call(run: Path, mode: str) -> str:
    return f"progrpo.train(..., out={str(run)!r}, mode={mode!r})"


def _in_shell(run: Path) -> str:
    return shlex.quote(str(run))
