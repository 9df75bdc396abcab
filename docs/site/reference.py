"""A Sphinx extension: docstrings of plain text and Markdown's code, every setting, and the help of every command."""

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import get_args, get_type_hints

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

from progrpo.cli import main
from progrpo.cli.entry import COMMANDS
from progrpo.config import Config

WITH_ALL_SETTINGS = ("train", "plan")
"""Commands whose help lists every setting, which have a page of their own."""


class Commands(SphinxDirective):
    """The help of every command, a section each."""

    def run(self) -> list[nodes.Node]:
        text = "\n\n".join(_command(name, (kind.__doc__ or "").strip()) for name, kind in COMMANDS.items())
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def _command(name: str, summary: str) -> str:
    if name in WITH_ALL_SETTINGS:
        return _heading(name) + escaped(summary)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*name.split(), "--help"])
    return f"{_heading(name)}.. code-block:: none\n\n{_indented(printed.getvalue().strip())}"


class Settings(SphinxDirective):
    """Every setting with its default, its meaning and its rule; a section of the configuration is a section here."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n\n".join(_sections(Config, "", set())), allow_section_headings=True)


def _sections(kind: type, prefix: str, seen: set[type]) -> Iterator[str]:
    """The text of a class of settings and of the classes of its fields; items of lists once, by `seen`."""
    hints = get_type_hints(kind)
    docs = _attribute_docs(kind)
    own = [field for field in fields(kind) if not is_dataclass(hints[field.name])]
    if own:
        yield _heading(prefix.rstrip(".") or "The whole run") + "\n\n".join(
            _setting(field, prefix, docs.get(field.name, "")) for field in own
        )
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from _sections(hints[field.name], f"{prefix}{field.name}.", seen)
        for item in get_args(hints[field.name]):
            if is_dataclass(item) and item not in seen:
                seen.add(item)
                yield from _sections(item, f"{prefix}{field.name}[i].", seen)


def _setting(field: Field[object], prefix: str, doc: str) -> str:
    default = "" if field.default is MISSING else f" = {field.default!r}"
    rule = field.metadata.get("rule")
    text = [escaped(doc), f"It must be {escaped(rule.text)}." if rule else ""]
    return f"``{prefix}{field.name}{default}``\n" + _indented("\n".join(filter(None, text)) or "\\ ")


def _attribute_docs(kind: type) -> dict[str, str]:
    """The docstrings of a class's fields; those that it inherits as well."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        attributes = ModuleAnalyzer.for_module(base.__module__).find_attr_docs()
        docs |= {
            name: "\n".join(lines).strip() for (owner, name), lines in attributes.items() if owner == base.__name__
        }
    return docs


def _heading(text: str) -> str:
    return f"{text}\n{'-' * len(text)}\n\n"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def escaped(text: str) -> str:
    """Escape what reStructuredText would read as markup, except in code between backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([*_|\\])", r"\\\1", part) for part in parts[::2]]
    for i in range(1, len(parts), 2):
        plural = parts[i + 1][:1].isalpha()
        parts[i] = f"`{parts[i]}`" + ("\\ " if plural else "")
    return "".join(parts)


def _escape_docstring(_app, _what, _name, _object, _options, lines: list[str]) -> None:
    lines[:] = escaped("\n".join(lines)).split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("progrpo-commands", Commands)
    app.add_directive("progrpo-settings", Settings)
    app.connect("autodoc-process-docstring", _escape_docstring)
    return {"parallel_read_safe": True}
