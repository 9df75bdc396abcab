"""The settings that a Python file of ml_collections makes, read from its syntax tree. Nothing in it is imported or run.

Followed are assignments of literals and of simple expressions of literals and other settings, `if`s that these decide,
and calls of functions in the file itself or in one beside it. Any other expression makes the setting that it would
assign `Unread`, with its place; the setting does not keep the value that it had before.
"""

from __future__ import annotations

import ast
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from progrpo.imports.files import read_bytes
from progrpo.imports.outcome import Unread
from progrpo.imports.python_expressions import Budget, Expressions, SourceFile, UnreadableError
from progrpo.messages import named, quoted

_MOST_CALLS = 32


@dataclass
class Reading:
    """The settings that a function returned, and what was met on the way.

    `names` are the local names of the function and of those that it called. `unread` are the statements that could not
    be followed.
    """

    settings: dict[str, object] = field(default_factory=dict)
    names: dict[str, object] = field(default_factory=dict)
    assigned: set[str] = field(default_factory=set)
    """Settings that the file itself assigns, by dotted names, and not a file beside it."""
    unread: list[Unread] = field(default_factory=list)


def read_settings(path: Path, function: str) -> Reading:
    """The settings that a function of the file returns.

    ValueError, one sentence, if there is no such file or function, or if the function returns no settings.
    """
    reading = Reading()
    try:
        file = _File(path, path, reading, Budget())
        if not function:
            if len(file.entry_points) != 1:
                raise ValueError(f"{named(path)} has several settings; say which: {named(path)}:NAME, of {_list(file)}")
            function = file.entry_points[0]
        if function not in file.entry_points:
            raise ValueError(f"{named(path)} has no function {named(function)} without arguments; it has {_list(file)}")
        settings = file.call(function, {})
    except RecursionError:
        raise ValueError(f"{named(path)}: expressions or calls in one another without end") from None
    except UnreadableError:
        raise ValueError(f"{named(path)}: {named(function)} calls functions without end") from None
    if not isinstance(settings, dict):
        raise ValueError(
            f"{named(path)}: {named(function)} does not return settings that can be read without running it"
        )
    reading.settings = settings
    return reading


def _list(file: _File) -> str:
    return named(", ".join(file.entry_points)) or "none"


class _File(SourceFile):
    """A Python file's top level: its functions, and the names that can be read."""

    def __init__(self, path: Path, main: Path, reading: Reading, budget: Budget) -> None:
        self.path = path
        self.main = main
        self.reading = reading
        self.budget = budget
        tree = _parsed(path)
        self.functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        self.entry_points = [name for name, node in self.functions.items() if not _has_required_arguments(node)]
        self.names: dict[str, object] = {"__file__": str(path), "__name__": path.stem}
        # an expression on its own is a call for its effect there, such as one that adds to sys.path
        body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Expr)]
        with suppress(_ReturnSignal):  # which no file that Python accepts has at its top level
            _Frame(self, self.names).run(body)

    @property
    def is_main(self) -> bool:
        return self.path == self.main

    def call(self, name: str, arguments: dict[int | str, object]) -> object:
        """The value that a function returns for arguments, which have their place or their name as a key."""
        node = self.functions.get(name)
        if node is None or self.budget.calls >= _MOST_CALLS:
            raise UnreadableError
        self.budget.calls += 1
        frame = _Frame(self, _bound_arguments(node, self, arguments))
        value: object = None
        try:
            frame.run(node.body)
        except _ReturnSignal as signal:
            value = signal.value
        self.budget.calls -= 1
        self.reading.names.update(frame.names)
        return value

    def load_sibling(self, path: object) -> _File:
        """A file that this one loads. It must lie in the folder of the main file."""
        sibling = Path(path) if isinstance(path, str) and len(path) < 4096 else None
        if sibling is None or sibling.suffix != ".py" or sibling.parent.resolve() != self.main.parent.resolve():
            raise UnreadableError
        if self.budget.calls >= _MOST_CALLS:  # files that load one another
            raise UnreadableError
        self.budget.calls += 1
        file = _File(sibling, self.main, self.reading, self.budget)
        self.budget.calls -= 1
        return file


def _parsed(path: Path) -> ast.Module:
    content = read_bytes(path)
    try:
        return ast.parse(content)
    except SyntaxError as error:
        raise ValueError(f"{named(path)} is no Python file: line {error.lineno}: {named(error.msg)}") from None
    except (ValueError, MemoryError) as error:  # NUL bytes, another encoding, more nesting than the parser takes
        raise ValueError(f"{named(path)} is no Python file that can be read: {named(error)}") from None


def _has_required_arguments(node: ast.FunctionDef) -> bool:
    arguments = node.args
    without_default = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    return without_default > 0 or any(default is None for default in arguments.kw_defaults)


def _bound_arguments(node: ast.FunctionDef, file: _File, given: dict[int | str, object]) -> dict[str, object]:
    """The values of a function's parameters. `UnreadableError` where the arguments do not fit them."""
    frame = _Frame(file, {})
    positional = [*node.args.posonlyargs, *node.args.args]
    pairs = [*zip(reversed(positional), reversed(node.args.defaults), strict=False)]
    keywords = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    pairs += [(argument, default) for argument, default in keywords if default is not None]
    values = {argument.arg: frame.value_or_unread(default) for argument, default in pairs}
    names = [argument.arg for argument in positional]
    for key, value in given.items():
        if isinstance(key, int) and key >= len(names):
            raise UnreadableError
        values[names[key] if isinstance(key, int) else key] = value
    if values.keys() != {*names, *(argument.arg for argument in node.args.kwonlyargs)}:
        raise UnreadableError
    return values


class _ReturnSignal(Exception):
    """A `return` on its way out of the statements around it."""

    def __init__(self, value: object) -> None:
        self.value = value


class _Frame:
    """A function's local names while its statements are followed."""

    def __init__(self, file: _File, names: dict[str, object]) -> None:
        self.file = file
        self.names = names
        self.value = Expressions(file, names, self.value_or_unread).value

    def run(self, body: list[ast.stmt]) -> None:
        """Follow the statements. `_ReturnSignal` at a `return`."""
        for node in body:
            self.file.budget.nodes -= 1
            match node:
                case ast.Return(value=value):
                    raise _ReturnSignal(self.value_or_unread(value) if value else None)
                case ast.Assign(targets=targets, value=value):
                    self.assign(node, targets, value)
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    self.assign(node, [target], value)
                case ast.AugAssign(target=ast.Name() | ast.Attribute() as target, op=op, value=value):
                    self.assign(node, [target], ast.copy_location(ast.BinOp(target, op, value), node))
                case ast.If(test=test, body=yes, orelse=no):
                    try:
                        branch = yes if self.value(test) else no
                    except UnreadableError:
                        self.skip(node)
                    else:
                        self.run(branch)
                case ast.Expr(value=ast.Constant()) | ast.Assert() | ast.Pass() | ast.Import() | ast.ImportFrom():
                    pass  # none of these gives a setting its value
                case ast.Expr(value=ast.Call(func=ast.Attribute(attr="exec_module"))):
                    pass  # it runs a file that has been read in its place
                case _:
                    self.skip(node)

    def assign(self, node: ast.stmt, targets: list[ast.expr], expression: ast.expr) -> None:
        value = self.value_or_unread(expression, node)
        for target in targets:
            self.store(target, value, node)

    def store(self, target: ast.expr, value: object, node: ast.stmt | ast.expr) -> None:
        """Give a target its value. A target that is not followed is listed as unread."""
        match target:
            case ast.Name(id=name):
                self.names[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                items = value if isinstance(value, tuple | list) and len(value) == len(targets) else None
                for i, item in enumerate(targets):
                    self.store(item, self.unread(node) if items is None else items[i], node)
            case _:
                self._store_setting(target, value, node)

    def _store_setting(self, target: ast.expr, value: object, node: ast.stmt | ast.expr) -> None:
        key: object
        try:
            match target:
                case ast.Attribute(value=owner, attr=key):
                    settings = self.value(owner)
                case ast.Subscript(value=owner, slice=index):
                    settings = self.value(owner)
                    key = self.value(index)
                case _:
                    raise UnreadableError
            if not isinstance(settings, dict) or not isinstance(key, str):
                raise UnreadableError
        except UnreadableError:
            self.file.reading.unread.append(self.unread(node))
            return
        settings[key] = value
        if self.file.is_main and isinstance(target, ast.Attribute):
            self.file.reading.assigned.add(ast.unparse(target).partition(".")[2])

    def skip(self, node: ast.stmt) -> None:
        """List a statement that is not followed, and mark what it would assign as unread."""
        self.file.reading.unread.append(self.unread(node))
        self.mark_unread(node)

    def mark_unread(self, node: ast.AST) -> None:
        """Mark every target within a node (of an assignment, loop, `with` or `del`) as unread."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name | ast.Attribute | ast.Subscript) and not isinstance(inner.ctx, ast.Load):
                self.store(inner, self.unread(inner), inner)

    def unread(self, node: ast.stmt | ast.expr) -> Unread:
        return Unread(self.file.path.name, node.lineno, quoted(ast.unparse(node).partition("\n")[0])[1:-1])

    def value_or_unread(self, node: ast.expr, statement: ast.stmt | None = None) -> object:
        try:
            return self.value(node)
        except UnreadableError:
            self.mark_unread(node)  # names that are assigned inside the expression
            return self.unread(statement or node)
