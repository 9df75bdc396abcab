"""The import of flow_grpo's settings: a function of a Python file, as in `--config config/grpo.py:pickscore_sd3`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from progrpo.imports.files import flatten
from progrpo.imports.flow_grpo.rules import RULES
from progrpo.imports.flow_grpo.scripts import ALGORITHM, OLDER_WINDOW, Script, fixed_by_scripts, model_kind
from progrpo.imports.flow_grpo.trainer import ONLY_THESE
from progrpo.imports.outcome import Row, Unread
from progrpo.imports.python_settings import Reading, read_settings
from progrpo.imports.translation import Translation, translate
from progrpo.messages import named

_GPU_NAMES = ("gpu_number", "gpu_numbers", "gpu_num", "num_gpus", "n_gpus")
"""Names that functions of the files give the number of GPUs."""


def import_flow_grpo(config: str, gpus: int | None = None, script: Script = "auto") -> Translation:
    """The configuration that `FILE:FUNCTION` asks for, and the outcome of each setting.

    `gpus` is the number of GPUs if the file does not say it. `script` is the training script that reads the settings:
    `plain` (all steps are noisy and trained), `fast` (a window) or `guard` (GRPO-Guard's ratio). `auto` decides by the
    names and by whether the file sets a window. ValueError, one sentence, for a file that cannot be read or settings
    that cannot be run.
    """
    file, function = _file_and_function(config)
    reading = read_settings(file, function)
    try:
        settings = _bracketed(flatten(reading.settings))
    except ValueError as error:
        raise ValueError(f"{named(file)}: {error}") from None
    unread = {name: value for name, value in settings.items() if isinstance(value, Unread)}
    known = {name: value for name, value in settings.items() if name not in unread}
    if ALGORITHM in unread:
        raise ValueError(f"{named(file)}: {ALGORITHM} could not be read (line {unread[ALGORITHM].line}); {ONLY_THESE}")
    if ALGORITHM in known:  # first, since the others may mean something else under an algorithm that is refused
        known = {ALGORITHM: known[ALGORITHM], **known}
    known["gpu_number"] = gpus if gpus is not None else _num_gpus(reading, config)
    known["script"] = _script(file, function, reading) if script == "auto" else script
    known["script.model"] = model_kind(known)
    known |= fixed_by_scripts(known)
    rows = [Row(name, value.text, value.outcome) for name, value in unread.items()]
    rows += [Row("a statement", value.text, value.outcome) for value in reading.unread]
    return translate(file, known, RULES, rows)


def _file_and_function(config: str) -> tuple[Path, str]:
    head, colon, tail = config.rpartition(":")
    return (Path(head), tail) if colon and tail.isidentifier() else (Path(config), "")


def _bracketed(settings: Mapping[str, object]) -> dict[str, object]:
    """Write rewards, whose names are the user's, as `reward_fn[NAME]`."""
    return {f"reward_fn[{n[10:]}]" if n.startswith("reward_fn.") else n: value for n, value in settings.items()}


def _num_gpus(reading: Reading, config: str) -> object:
    for name in _GPU_NAMES:
        if name in reading.names and not isinstance(reading.names[name], Unread):
            return reading.names[name]
    raise ValueError(
        f"{named(config)} does not say on how many GPUs it runs, on which its numbers of batches depend; give --gpus"
    )


def _script(file: Path, function: str, reading: Reading) -> str:
    guard = "guard" in file.stem or "rationorm" in function or "guard" in function
    if guard or reading.settings.get("rationorm") is True:
        return "guard"
    windowed = reading.assigned & {"sample.sde_window_size", "sample.sde_type", OLDER_WINDOW}
    return "fast" if windowed else "plain"
