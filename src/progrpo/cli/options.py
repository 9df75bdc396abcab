"""Options as tyro parses them, and one sentence for each that it refuses."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import fields
from functools import cache
from itertools import dropwhile, takewhile
from operator import attrgetter, not_
from pathlib import Path
from typing import TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from progrpo.cli.command import Command, as_option
from progrpo.config import Config, RewardTerm
from progrpo.messages import named, nearest
from progrpo.settings import Values, field_paths, field_types

C = TypeVar("C", bound=Command)
T = TypeVar("T")

# --- parsing ----------------------------------------------------------------------------------------------------------


def parse_options(kind: type[C], args: list[str], prog: str, default: C | None = None) -> C:
    """Parse options into a command.

    tyro prints help and exits. What it refuses, in a box, becomes a ValueError in one sentence.
    """
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            command, unknown = tyro.cli(
                kind, args=args, prog=prog, default=default, return_unknown_args=True, registry=_REGISTRY
            )
    except _WrongWordError as error:
        raise ValueError(str(error)) from None
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise ValueError(f"{sentence_of_box(box.getvalue())}; see {prog} --help") from None
    if unknown:
        raise ValueError(_unknown_word(unknown, args, kind, prog))
    assert command is not None, "tyro returns the default only where there is one"
    return command


class _WrongWordError(Exception):
    """A ValueError about a word, in a form that passes through tyro, which drops a ValueError's text."""


_REGISTRY = ConstructorRegistry()


def _register_word(kind: type[T], metavar: str, from_text: Callable[[str], T], to_text: Callable[[T], str]) -> None:
    """Let the command line take a value of this type as one word."""

    def read(words: list[str]) -> T:
        try:
            return from_text(words[0])
        except ValueError as error:
            raise _WrongWordError(str(error)) from None

    @_REGISTRY.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[T] | None:
        if info.type is not kind:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, kind),
            str_from_instance=lambda value: [to_text(value)],
        )


def _path_from_text(text: str) -> Path:
    if not text:
        raise ValueError("a path is empty (''); give one, or . for the current folder")
    return Path(text)


# Without these rules tyro asks for each field of a reward, and takes an empty word, such as a shell's variable that is
# not set, for the current folder.
_register_word(RewardTerm, "[WEIGHT*]NAME", RewardTerm.from_text, RewardTerm.to_text)
_register_word(Path, "PATH", _path_from_text, str)
_register_word(Values, "JSON", Values.from_text, Values.to_text)

# --- sentences about what is refused ----------------------------------------------------------------------------------


_PLAIN_WORDS = (
    (r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number"),
    (r"could not convert string to float: (.*)", r"\1 is not a number"),
    (r"Could not find valid parse for arguments: \[(.*)\]", r"\1 does not fit"),
    (r"Missing value for argument '(.*)'\. Expected 1 values", r"\1 needs a value"),
)
"""Sentences of Python and of tyro's parsing, as patterns, and the same in words that say what to mend."""


def sentence_of_box(box: str) -> str:
    """The sentence in tyro's frame: the text between the title and the next gap or rule, with the argument's usage."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    texts = ["" if set(line) <= {"─", "-"} else line for line in lines[1:]]
    sentence = " ".join(takewhile(bool, dropwhile(not_, texts))).removeprefix("Error parsing ").rstrip(".")
    if missing := re.match(r"Missing from .+?: (\{[^}]*\}|\S+) .*\(required\)$", sentence):
        choices = missing[1].strip("{}").split(",")
        return f"{named(missing[1])} is missing" if len(choices) == 1 else f"one of {', '.join(choices)} is missing"
    usage = lines[lines.index("Argument helptext:") + 1 :][:1] if "Argument helptext:" in lines else []
    # tyro lists the choices of an optional option as a set that includes None
    choices = r"\(('[^']*', )*'None'(, '[^']*')*\)"
    sentence = re.sub(choices, lambda match: f"({_sorted_without_none(match[0])})", sentence)
    for of_python, plain in _PLAIN_WORDS:
        sentence = re.sub(of_python, plain, sentence)
    return named(" ".join([sentence, *(f"(it is {line})" for line in usage)]))


def _sorted_without_none(choices: str) -> str:
    return ", ".join(sorted({choice for choice in re.findall(r"'[^']*'", choices)} - {"'None'"}))


def _unknown_word(unknown: Sequence[str], args: Sequence[str], kind: type[Command], prog: str) -> str:
    """A sentence about an option or a word that no option takes."""
    option = next((word for word in unknown if word.startswith("--")), None)
    if option is None:
        return _stray_word(unknown[0], args, kind, prog)
    option = option.partition("=")[0]
    own = [as_option(name) for name in _field_names(kind) if name != "config"]
    all_of_config = [name for path in field_paths(Config) for name in _option_pair(path)]
    if kind.goes_on and option.replace("_", "-") in all_of_config:
        return (
            f"{prog} does not take {named(option)}, since a run goes on by its own config.json: change it there, and"
            " add --accept-changes"
        )
    of_config = all_of_config if _has_config(kind) else []
    return f"{prog} does not take {named(option)}{nearest(option.replace('_', '-'), [*own, *of_config])}"


def _stray_word(word: str, args: Sequence[str], kind: type[Command], prog: str) -> str:
    """A sentence about a word without an option: a flag was given a value, or a shell has cut a path at its spaces."""
    words = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    before = words[: words.index(word)]
    after = words[words.index(word) :]
    start = next((i for i in reversed(range(len(before))) if before[i].startswith("--")), -1)
    option = before[start] if start >= 0 else ""
    if option.replace("_", "-") in _flags(kind):
        *_, negative = _option_pair(option.removeprefix("--"))
        off = f"{negative} turns it off" if "." in option else "without it it is off"
        return f"{prog}: {option} takes no value, so leave out {named(word)}: {option} alone turns it on, {off}"
    value = " ".join([*before[start + 1 :], *takewhile(lambda part: not part.startswith("--"), after)])
    in_quotes = named(f"{option} {shlex.quote(value)}".strip())
    return f"{prog} does not take {named(word)}; a value with spaces, such as a path, must stand in quotes: {in_quotes}"


def _field_names(kind: type[Command]) -> list[str]:
    return [field.name for field in fields(kind)]


def _has_config(kind: type[Command]) -> bool:
    """Whether the command takes the fields of a configuration as options."""
    return "config" in _field_names(kind)


def _option_pair(path: str) -> list[str]:
    """A configuration's field as an option, and for a flag also the option that turns it off."""
    part, dot, name = path.rpartition(".")
    negative = [as_option(f"{part}{dot}no-{name}")]
    return [as_option(path)] + (negative if as_option(path) in _config_flags() else [])


def _flags(kind: type[Command]) -> set[str]:
    """The options that are true or false."""
    own = {as_option(name) for name, hint in field_types(kind).items() if hint is bool}
    return own | _config_flags() if _has_config(kind) else own


@cache
def _config_flags() -> frozenset[str]:
    default = Config()
    return frozenset(as_option(path) for path in field_paths(Config) if isinstance(attrgetter(path)(default), bool))
