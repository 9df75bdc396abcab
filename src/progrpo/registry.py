"""Names that stand for objects: a built-in's own name, or `module:attribute` of the user's code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from progrpo.messages import named, nearest, quoted, raised
from progrpo.settings import Rule, matches

_OF_USERS = matches(r"\w[\w.-]*:[\w.<>]+", "`module:attribute`")
_importing: ContextVar[str] = ContextVar("importing", default="")


class UnknownNameError(ValueError):
    """A name that stands for nothing, or for what cannot be imported."""


def one_of(names: Collection[str], attribute: str = "attribute") -> Rule:
    """The rule of a field that holds one of these names, or `module:attribute`."""
    return Rule(
        lambda name: name in names or _OF_USERS.holds(name), f"one of {', '.join(names)}, or `module:{attribute}`"
    )


def choices_of(names: Collection[str]) -> Any:
    """The type of such a field, whose choices the command line lists: one of these names, or any text.

    A type checker must see `str`: write this type under `else` of `if TYPE_CHECKING`.
    """
    return Literal[tuple(names)] | str


def load_named(name: str, registry: Mapping[str, str], kind: str, attribute: str = "attribute") -> Any:
    """The object of a name: what `registry` has for it (as `module:attribute`), or the attribute of a module.

    A module is found on the Python path or in the current folder. UnknownNameError, one sentence that begins with `kind` and the
    name, where there is none; `attribute` is what the object is called in it, such as function.
    """
    subject = f"{kind} {quoted(name)}"
    if name in registry:
        module_name, _, built_in = registry[name].partition(":")
        return getattr(importlib.import_module(module_name), built_in)
    module_name, own = _module_and_attribute(name, subject, registry, attribute)
    module = _imported(module_name, subject)
    value = getattr(module, own, None)
    if value is None:
        raise UnknownNameError(f"{subject}: {lacks(module, module_name, own)}")
    return value


def refuse_within_import() -> None:
    """UnknownNameError where a user's module, which is now being imported, starts a run of its own."""
    if subject := _importing.get():
        raise UnknownNameError(
            f"{subject}: importing its module starts a run; put what that file does when it is run under"
            ' `if __name__ == "__main__":`'
        )


def lacks(module: ModuleType, name: str, attribute: str) -> str:
    """A clause that a module has no such attribute, with what may be meant."""
    if name == "__main__":
        return (
            f"{quoted(attribute)} is of the script or notebook that named it, which is not what runs here; put it into a module"
            " of its own and name it module:function"
        )
    there = [key for key, value in vars(module).items() if callable(value)]
    file = getattr(module, "__file__", None)
    where = f" (its file is {named(file)})" if file else ""
    return f"the module {quoted(name)} has no function or class {quoted(attribute)}{where}{nearest(attribute, there)}"


def _module_and_attribute(name: str, subject: str, registry: Mapping[str, str], kind: str) -> tuple[str, str]:
    """The two parts of `module:attribute`; UnknownNameError, with what it should be, for another name."""
    module, colon, attribute = name.partition(":")
    if module.endswith(".py") or os.sep in module:
        raise UnknownNameError(
            f"{subject}: a module is named as Python imports it; {_as_module(module, attribute, kind)}"
        )
    if colon and all(module.split(".")) and "\0" not in module:
        return module, attribute
    *packages, last = name.split(".")
    dotted = not colon and all(part.isidentifier() for part in (*packages, last))
    of_module = f"; a {kind} {last} of a module is {'.'.join(packages)}:{last}"
    raise UnknownNameError(
        f"{subject} is neither built in ({', '.join(registry)}) nor of the form module:{kind}"
        f"{of_module if packages and dotted else nearest(name, registry)}"
    )


def _as_module(file: str, attribute: str, kind: str) -> str:
    """How the function of a file is named."""
    path = Path(file.removesuffix(".py"))
    attribute = attribute or kind
    if path.is_absolute() or ".." in path.parts:
        return f"write {named(path.name)}:{named(attribute)}, and add {named(path.parent.resolve())} to PYTHONPATH"
    return f"write {named('.'.join(path.parts))}:{named(attribute)}"


def _imported(module: str, subject: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    before = _importing.set(subject)
    try:
        return importlib.import_module(module)
    except (KeyboardInterrupt, UnknownNameError):
        raise
    except BaseException as error:  # whatever the module's author let through
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UnknownNameError(
                f"{subject}: there is no module {quoted(module)} in this folder or installed"
            ) from None
        raise UnknownNameError(f"{subject}: its module cannot be imported: {raised(error)}") from error
    finally:
        _importing.reset(before)
