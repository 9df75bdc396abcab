"""Names of objects: a built-in's name, or `module:attribute` of the user's code."""

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

_USERS_OWN = matches(r"\w[\w.-]*:[\w.<>]+", "`module:attribute`")
_importing: ContextVar[str] = ContextVar("importing", default="")


class UnknownNameError(ValueError):
    """A name of nothing, or of something that cannot be imported."""


def one_of(names: Collection[str], attribute: str = "attribute") -> Rule:
    """The rule of a field that holds one of these names, or `module:attribute`."""
    return Rule(
        lambda name: name in names or _USERS_OWN.holds(name),
        f"one of {', '.join(names)}, or `module:{attribute}`",
        lambda name: _right_form(name, names, attribute),
    )


def is_users_own(name: str) -> bool:
    """Whether a name has the form `module:attribute`."""
    return bool(_USERS_OWN.holds(name))


def choices_of(names: Collection[str]) -> Any:
    """The type of a field that holds one of these names or any other text; the command line lists the names.

    A type checker must see `str`: write this type under `else` of `if TYPE_CHECKING`.
    """
    return Literal[tuple(names)] | str


def load_named(name: str, registry: Mapping[str, str], kind: str, attribute: str = "attribute") -> Any:
    """Load the object of a name: the registry's `module:attribute` for it, or the name itself as `module:attribute`.

    A module is found on the Python path or in the current folder. `attribute` names the kind of object in messages,
    such as function. UnknownNameError, one sentence that begins with `kind` and the name, where there is no such
    object.
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
    """Raise UnknownNameError where a user's module starts a run while it is being imported."""
    if subject := _importing.get():
        raise UnknownNameError(
            f"{subject}: importing its module starts a run; put the code that starts it under"
            ' `if __name__ == "__main__":`'
        )


def lacks(module: ModuleType, name: str, attribute: str) -> str:
    """A clause that a module has no such attribute, with the nearest name."""
    if name == "__main__":
        return (
            f"{quoted(attribute)} belongs to the script or notebook that named it, which does not run here; put it"
            " into a module of its own and name it module:function"
        )
    names = [key for key, value in vars(module).items() if callable(value)]
    file = getattr(module, "__file__", None)
    where = f" (its file is {named(file)})" if file else ""
    return f"the module {quoted(name)} has no function or class {quoted(attribute)}{where}{nearest(attribute, names)}"


def _module_and_attribute(name: str, subject: str, registry: Mapping[str, str], kind: str) -> tuple[str, str]:
    """The two parts of `module:attribute`; UnknownNameError, with the right form, for any other name."""
    module, colon, attribute = name.partition(":")
    if of_file := _of_file(name, kind):
        raise UnknownNameError(f"{subject}: {of_file}")
    if colon and all(module.split(".")) and "\0" not in module:
        return module, attribute
    raise UnknownNameError(
        f"{subject} is neither built in ({', '.join(registry)}) nor of the form module:{kind}"
        f"{_right_form(name, registry, kind)}"
    )


def _right_form(name: str, names: Collection[str], kind: str) -> str:
    """A clause with the right form of a name: of a file's function, of a name with dots alone, or the nearest of all.

    It is empty where none is near.
    """
    if of_file := _of_file(name, kind):
        return f"; {of_file}"
    *packages, last = name.split(".")
    if packages and all(part.isidentifier() for part in (*packages, last)):
        return f"; a {kind} {named(last)} of a module is {named('.'.join(packages))}:{named(last)}"
    return nearest(name, names)


def _of_file(name: str, kind: str) -> str:
    """A clause with the right form where a name has its module's file; empty for other names."""
    module, _, attribute = name.partition(":")
    if not (module.endswith(".py") or os.sep in module):
        return ""
    return f"a module is named as Python imports it; {_as_module(module, attribute, kind)}"


def _as_module(file: str, attribute: str, kind: str) -> str:
    """A clause with the name of a file's function as Python imports it."""
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
    except BaseException as error:  # the module's own code may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UnknownNameError(
                f"{subject}: there is no module {quoted(module)} in this folder or installed"
            ) from None
        raise UnknownNameError(f"{subject}: its module cannot be imported: {raised(error)}") from error
    finally:
        _importing.reset(before)
