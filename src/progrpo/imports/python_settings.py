"""The settings that a Python file of ml_collections makes, read from its syntax tree: nothing in it is imported or run.

Followed are assignments of literals and of simple expressions of literals and other settings, `if`s that these decide, and calls of
functions without arguments, in the file itself or one beside it. Whatever else gives a setting its value makes that setting
`Unread`, with its place; it never keeps a value that it had before.
"""

from __future__ import annotations

import ast
import operator
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from progrpo.imports.account import content_of, parts
from progrpo.messages import named, quoted

_MOST_NODES, _MOST_CALLS, _LONGEST = 20_000, 32, 10_000


@dataclass(frozen=True)
class Unread:
    """What stands in the place of a value: where the file says it, and how."""

    file: str
    line: int
    text: str


@dataclass
class Reading:
    """What a function's call left: the settings, the local names of it and of those it called, and statements that could not be followed."""

    settings: dict[str, Any] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)
    assigned: set[str] = field(default_factory=set)
    """Settings that the file itself assigns, by dotted names, and not a file beside it."""
    unread: list[Unread] = field(default_factory=list)


def read_settings(path: Path, function: str) -> Reading:
    """The settings that `function` of the file returns. ValueError, one sentence, if there is no such file or function or it returns none."""
    reading = Reading()
    try:
        file = _File(path, path, reading, _Budget())
        if not function:
            if len(file.launchable) != 1:
                raise ValueError(f"{named(path)} has several settings; say which: {named(path)}:NAME, of {_list(file)}")
            function = file.launchable[0]
        if function not in file.launchable:
            raise ValueError(f"{named(path)} has no function {named(function)} without arguments; it has {_list(file)}")
        settings = file.call(function)
    except RecursionError:
        raise ValueError(f"{named(path)}: expressions or calls in one another without end") from None
    except _UnreadableError:
        raise ValueError(f"{named(path)}: {named(function)} calls functions without end") from None
    if not isinstance(settings, dict):
        raise ValueError(
            f"{named(path)}: {named(function)} does not return settings that can be read without running it"
        )
    reading.settings = settings
    return reading


def _list(file: _File) -> str:
    return named(", ".join(file.launchable)) or "none"


class _UnreadableError(Exception):
    """An expression that is not one of those which are followed."""


@dataclass
class _Budget:
    """What is left of the work that one reading may take: short files can ask for endless work."""

    nodes: int = _MOST_NODES
    calls: int = 0


class _File:
    """A Python file's top level: its functions, and the names that can be read."""

    def __init__(self, path: Path, main: Path, reading: Reading, budget: _Budget) -> None:
        self.path, self.main, self.reading, self.budget = path, main, reading, budget
        tree = _parsed(path)
        self.functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        self.launchable = [name for name, node in self.functions.items() if not _required(node)]
        self.names: dict[str, Any] = {"__file__": str(path), "__name__": path.stem}
        # calls are of loaders and paths there, and what they give is taken by name
        body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Expr)]
        with suppress(_Returned):  # which no file that runs has there
            _Frame(self, self.names).run(body)

    @property
    def is_main(self) -> bool:
        return self.path == self.main

    def call(self, name: str) -> Any:
        """What a function returns, called without arguments."""
        node = self.functions.get(name)
        if node is None or _required(node) or self.budget.calls >= _MOST_CALLS:
            raise _UnreadableError
        self.budget.calls += 1
        frame, value = _Frame(self, _defaults(node, self)), None
        try:
            frame.run(node.body)
        except _Returned as returned:
            value = returned.value
        self.budget.calls -= 1
        self.reading.names.update(frame.names)
        return value

    def beside(self, path: Any) -> _File:
        """A file that this one loads; only from its own folder."""
        found = Path(path) if isinstance(path, str) and len(path) < 4096 else None
        if found is None or found.suffix != ".py" or found.parent.resolve() != self.main.parent.resolve():
            raise _UnreadableError
        if self.budget.calls >= _MOST_CALLS:  # files that load one another
            raise _UnreadableError
        self.budget.calls += 1
        file = _File(found, self.main, self.reading, self.budget)
        self.budget.calls -= 1
        return file


def _parsed(path: Path) -> ast.Module:
    content = content_of(path)
    try:
        return ast.parse(content)
    except SyntaxError as error:
        raise ValueError(f"{named(path)} is no Python file: line {error.lineno}: {named(error.msg)}") from None
    except (ValueError, MemoryError) as error:  # NUL bytes, another encoding, more nesting than the parser takes
        raise ValueError(f"{named(path)} is no Python file that can be read: {named(error)}") from None


def _required(node: ast.FunctionDef) -> bool:
    arguments = node.args
    without_default = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    return without_default > 0 or any(default is None for default in arguments.kw_defaults)


def _defaults(node: ast.FunctionDef, file: _File) -> dict[str, Any]:
    arguments, frame = [*node.args.posonlyargs, *node.args.args], _Frame(file, {})
    pairs = [*zip(reversed(arguments), reversed(node.args.defaults), strict=False)]
    pairs += [(a, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d is not None]
    return {argument.arg: frame.value_or_unread(default) for argument, default in pairs}


class _Returned(Exception):
    """A `return` on its way out of the statements around it."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Frame:
    """A function's local names while its statements are followed."""

    def __init__(self, file: _File, names: dict[str, Any]) -> None:
        self.file, self.names = file, names

    def run(self, body: list[ast.stmt]) -> None:
        """Follow the statements; `_Returned` at a `return`."""
        for node in body:
            self.file.budget.nodes -= 1
            match node:
                case ast.Return(value=value):
                    raise _Returned(self.value_or_unread(value) if value else None)
                case ast.Assign(targets=targets, value=value):
                    self.assign(node, targets, value)
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    self.assign(node, [target], value)
                case ast.AugAssign(target=ast.Name() | ast.Attribute() as target, op=op, value=value):
                    self.assign(node, [target], ast.copy_location(ast.BinOp(target, op, value), node))
                case ast.If(test=test, body=yes, orelse=no):
                    try:
                        branch = yes if self.value(test) else no
                    except _UnreadableError:
                        self.give_up(node)
                    else:
                        self.run(branch)
                case ast.Expr(value=ast.Constant()) | ast.Assert() | ast.Pass() | ast.Import() | ast.ImportFrom():
                    pass  # neither gives a setting its value
                case _:
                    self.give_up(node)

    def assign(self, node: ast.stmt, targets: list[ast.expr], value: ast.expr) -> None:
        found = self.value_or_unread(value, node)
        for target in targets:
            self.store(target, found, node)

    def store(self, target: ast.expr, value: Any, node: ast.stmt | ast.expr) -> None:
        try:
            match target:
                case ast.Name(id=name):
                    self.names[name] = value
                    return
                case ast.Tuple(elts=parts) | ast.List(elts=parts):
                    each = isinstance(value, tuple | list) and len(value) == len(parts)
                    for i, part in enumerate(parts):
                        self.store(part, value[i] if each else self.place(node), node)
                    return
                case ast.Attribute(value=owner, attr=key):
                    settings = self.value(owner)
                case ast.Subscript(value=owner, slice=index):
                    settings, key = self.value(owner), self.value(index)
                case _:
                    raise _UnreadableError
            if not isinstance(settings, dict) or not isinstance(key, str):
                raise _UnreadableError
        except _UnreadableError:
            self.file.reading.unread.append(self.place(node))
            return
        settings[key] = value
        if self.file.is_main and isinstance(target, ast.Attribute):
            self.file.reading.assigned.add(ast.unparse(target).partition(".")[2])

    def give_up(self, node: ast.stmt) -> None:
        """A statement that is not followed: what it would assign is unread, and it is said where it stands."""
        self.file.reading.unread.append(self.place(node))
        self.lose(node)

    def lose(self, node: ast.AST) -> None:
        """What it would assign, count by, open or delete is unread."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name | ast.Attribute | ast.Subscript) and not isinstance(inner.ctx, ast.Load):
                self.store(inner, self.place(inner), inner)

    def place(self, node: ast.stmt | ast.expr) -> Unread:
        return Unread(self.file.path.name, node.lineno, quoted(ast.unparse(node).partition("\n")[0])[1:-1])

    def value_or_unread(self, node: ast.expr, statement: ast.stmt | None = None) -> Any:
        try:
            return self.value(node)
        except _UnreadableError:
            self.lose(node)  # what is assigned inside of it
            return self.place(statement or node)

    def value(self, node: ast.expr) -> Any:
        """An expression's value; `_UnreadableError` if it is not one that is followed."""
        self.file.budget.nodes -= 1
        if self.file.budget.nodes < 0:
            raise _UnreadableError
        try:
            found = self._value(node)
        except (
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
        ):  # of a wrong operation, which running it would raise too
            raise _UnreadableError from None
        if isinstance(found, Unread) or not _is_small(found):
            raise _UnreadableError
        return found

    def looked_into(self, node: ast.expr) -> Any:
        """The same of a value that is written, compared or looked up: each of its parts is work, as often as it is shared."""
        found = self.value(node)
        for _ in parts(found):
            self.file.budget.nodes -= 1
            if self.file.budget.nodes < 0:
                raise _UnreadableError
        return found

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return value
            case ast.Name(id=name):
                return self.names[name] if name in self.names else self.file.names[name]
            case ast.Attribute(value=owner, attr=name):
                settings = self.value(owner)
                return settings[name] if isinstance(settings, dict) else _refuse()
            case ast.Subscript(value=owner, slice=index):
                return self.value(owner)[self.looked_into(index)]
            case ast.Tuple(elts=items):
                return tuple(self.value(item) for item in items)
            case ast.List(elts=items):
                return [self.value(item) for item in items]
            case ast.Dict(keys=keys, values=values):
                return {
                    self.looked_into(k) if k else _refuse(): self.value_or_unread(v)
                    for k, v in zip(keys, values, strict=True)
                }
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return _UNARY[type(op)](self.value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _combined(_BINARY[type(op)], self.value(left), self.value(right))
            case ast.BoolOp(op=op, values=values):
                decides = isinstance(op, ast.Or)  # the truth at which the rest is not looked at
                for item in values[:-1]:
                    if bool(found := self.value(item)) is decides:
                        return found
                return self.value(values[-1])
            case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
                values = [self.looked_into(item) for item in (left, *others)]
                return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, values, values[1:], strict=False))
            case ast.IfExp(test=test, body=yes, orelse=no):
                return self.value(yes if self.value(test) else no)
            case ast.JoinedStr(values=values):
                return "".join(str(self.value(part)) for part in values)
            case ast.FormattedValue(value=inner, format_spec=None):
                return self.looked_into(inner)
            case ast.Call():
                return self._call(node)
        raise _UnreadableError

    def _call(self, node: ast.Call) -> Any:
        name, arguments = ast.unparse(node.func), node.args
        if name in _PLAIN and not node.keywords:
            return _PLAIN[name](*[self.looked_into(argument) for argument in arguments])
        if name == "os.getcwd":  # its scripts are started from the folder above `config`
            folder = self.file.main.resolve().parent
            return str(folder.parent if folder.name == "config" else folder)
        if name in _CONFIG_DICTS and len(arguments) <= 1 and not node.keywords:
            return dict(self.looked_into(arguments[0])) if arguments else {}
        if name in _LOADERS and len(arguments) == 2:
            return self.file.beside(self.value(arguments[1]))
        if name == "importlib.util.module_from_spec" and len(arguments) == 1:
            return self.value(arguments[0])
        if arguments or node.keywords:
            raise _UnreadableError
        match node.func:
            case ast.Name(id=function):
                return self.file.call(function)
            case ast.Attribute(value=owner, attr=function) if isinstance(file := self.value(owner), _File):
                return file.call(function)
        raise _UnreadableError


def _refuse() -> Any:
    raise _UnreadableError


def _is_small(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**63
    return not isinstance(value, str | list | tuple | dict) or len(value) <= _LONGEST


def _combined(op: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    """Numbers by any operation; texts and lists are put together alone, since they can be multiplied without end."""
    together = op is operator.add and type(left) is type(right) and isinstance(left, str | list | tuple)
    if not together and not (isinstance(left, int | float) and isinstance(right, int | float)):
        raise _UnreadableError
    return op(left, right)


_UNARY: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_PLAIN: dict[str, Callable[..., Any]] = {
    **{f.__name__: f for f in (int, float, bool, str, abs, round, min, max, len, tuple, list)},
    "os.path.join": os.path.join,
    "os.path.dirname": os.path.dirname,
    "os.path.abspath": os.path.abspath,
}
_CONFIG_DICTS = ("ml_collections.ConfigDict", "config_dict.ConfigDict", "ConfigDict")
_LOADERS = ("imp.load_source", "importlib.util.spec_from_file_location")
