"""The settings that a shell script gives a program as overrides, `python -m PROGRAM a.b=c`. Nothing is run.

Followed are assignments of literals and of other variables, `${NAME:-DEFAULT}` where the script sets no NAME, whole
numbers in `$(( ))`, and arrays. A variable that the script sets under a condition, and what a command would give, could
not be read, and neither could a setting that needs them. The environment is not read, but `$HOME` is `~`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from progrpo.imports.files import read_bytes
from progrpo.imports.outcome import Unread
from progrpo.imports.shell_commands import Shell, Word
from progrpo.messages import named

_OVERRIDE = re.compile(r"\+{0,2}([A-Za-z_][\w.@/-]*)=(.*)", re.DOTALL)
_PROGRAM = re.compile(r"(.*/)?(python[\d.]*|torchrun|accelerate|ray|uv|srun|nohup|env)")


@dataclass
class ScriptReading:
    """The program that a script starts, and its settings; `unread` are those that could not be read."""

    program: str
    settings: dict[str, str] = field(default_factory=dict)
    unread: dict[str, Unread] = field(default_factory=dict)


def read_script(path: Path) -> ScriptReading:
    """The settings that a script gives a program.

    ValueError, one sentence, if it starts none or several with settings.
    """
    try:
        text = read_bytes(path).decode()
        commands = Shell(text).commands()
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{named(path)} is no script that can be read: {str(error)[:200]}") from None
    starts = [(line, words) for line, words in commands if _starts_program(words)]
    if len(starts) != 1:
        count = "no program" if not starts else f"{len(starts)} programs"
        raise ValueError(
            f"{named(path)} starts {count} with settings of the form a.b=c; leave one `python -m ...` command in it"
        )
    line, words = starts[0]
    return _settings_of(path, line, words)


def _starts_program(words: list[Word]) -> bool:
    programs = any(_PROGRAM.fullmatch(word.text) for word in words[:3])
    return programs and any(_OVERRIDE.fullmatch(word.text) for word in words[1:])


def _settings_of(path: Path, line: int, words: list[Word]) -> ScriptReading:
    texts = [word.text for word in words]
    module = texts[texts.index("-m") + 1] if "-m" in texts[:-1] else next((t for t in texts if t.endswith(".py")), "")
    reading = ScriptReading(module)
    for word in words[1:]:
        override = _OVERRIDE.fullmatch(word.text)
        if override and not word.unread:
            reading.settings[override.group(1)] = override.group(2)
            reading.unread.pop(override.group(1), None)
        elif override or word.text.startswith(("--", "~")) or word.unread:
            text = word.text.strip("'\"")  # as it stands in the script
            override = _OVERRIDE.fullmatch(text)
            name = override.group(1) if override else text.partition("=")[0]
            reading.unread[name] = Unread(path.name, line, text.partition("=")[2] or text)
            reading.settings.pop(name, None)
    return reading
