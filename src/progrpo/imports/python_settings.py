"""The settings that a Python file of ml_collections makes, read from its syntax tree. Nothing in it is imported or run.

Followed are assignments of literals and of simple expressions of literals and other settings, `if`s that these decide,
and calls of functions in the file itself or in one beside it. Any other expression makes the setting that it would
assign `Unread`, with its place; the setting does not keep the value that it had before.
"""

from __future__ import annotations

import ast
import operator
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from progrpo.imports.translation import Unread, read_bytes, walk
from progrpo.messages import named, quoted

_MOST_NODES = 20_000
_MOST_CALLS = 32
_LONGEST = 10_000


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
        file = _File(path, path, reading, _Budget())
        if not function:
            if len(file.entry_points) != 1:
                raise ValueError(f"{named(path)} has several settings; say which: {named(path)}:NAME, of {_list(file)}")
            function = file.entry_points[0]
        if function not in file.entry_points:
            raise ValueError(f"{named(path)} has no function {named(function)} without arguments; it has {_list(file)}")
        settings = file.call(function, {})
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
    return named(", ".join(file.entry_points)) or "none"


class _UnreadableError(Exception):
    """An expression of a kind that is not followed."""


@dataclass
class _Budget:
    """The work that is left to one reading. Short files can ask for endless work."""

    nodes: int = _MOST_NODES
    calls: int = 0

    def spend_node(self) -> None:
        """Count one node of the syntax tree. `_UnreadableError` if none is left."""
        self.nodes -= 1
        if self.nodes < 0:
            raise _UnreadableError


class _File:
    """A Python file's top level: its functions, and the names that can be read."""

    def __init__(self, path: Path, main: Path, reading: Reading, budget: _Budget) -> None:
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
            raise _UnreadableError
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
            raise _UnreadableError
        if self.budget.calls >= _MOST_CALLS:  # files that load one another
            raise _UnreadableError
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
    """The values of a function's parameters. `_UnreadableError` where the arguments do not fit them."""
    frame = _Frame(file, {})
    positional = [*node.args.posonlyargs, *node.args.args]
    pairs = [*zip(reversed(positional), reversed(node.args.defaults), strict=False)]
    keywords = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    pairs += [(argument, default) for argument, default in keywords if default is not None]
    values = {argument.arg: frame.value_or_unread(default) for argument, default in pairs}
    names = [argument.arg for argument in positional]
    for key, value in given.items():
        if isinstance(key, int) and key >= len(names):
            raise _UnreadableError
        values[names[key] if isinstance(key, int) else key] = value
    if values.keys() != {*names, *(argument.arg for argument in node.args.kwonlyargs)}:
        raise _UnreadableError
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
                    except _UnreadableError:
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
                    raise _UnreadableError
            if not isinstance(settings, dict) or not isinstance(key, str):
                raise _UnreadableError
        except _UnreadableError:
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
        except _UnreadableError:
            self.mark_unread(node)  # names that are assigned inside the expression
            return self.unread(statement or node)

    def value(self, node: ast.expr) -> object:
        """The value of an expression. `_UnreadableError` if the expression is not followed."""
        self.file.budget.spend_node()
        try:
            value = self._value(node)
        except (TypeError, ValueError, ArithmeticError, LookupError):  # which running the file would raise too
            raise _UnreadableError from None
        if isinstance(value, Unread) or not _is_small(value):
            raise _UnreadableError
        return value

    def sized_value(self, node: ast.expr) -> object:
        """The value of an expression that is printed, compared or looked up.

        Each item of the value counts as work, as often as it is shared.
        """
        value = self.value(node)
        for _ in walk(value):
            self.file.budget.spend_node()
        return value

    def _value(self, node: ast.expr) -> object:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return value
            case ast.Name(id=name):
                return self.names[name] if name in self.names else self.file.names[name]
            case ast.Attribute(value=owner, attr=name):
                settings = self.value(owner)
                return settings[name] if isinstance(settings, dict) else _refuse()
            case ast.Subscript(value=owner, slice=index):
                return _item(self.value(owner), self.sized_value(index))
            case ast.Tuple(elts=items):
                return tuple(self.value(item) for item in items)
            case ast.List(elts=items):
                return [self.value(item) for item in items]
            case ast.Dict(keys=keys, values=values):
                return {
                    self.sized_value(k) if k else _refuse(): self.value_or_unread(v)
                    for k, v in zip(keys, values, strict=True)
                }
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return _UNARY[type(op)](self.value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _combined(_BINARY[type(op)], self.value(left), self.value(right))
            case ast.BoolOp(op=op, values=values):
                return self._decided(values, decides=isinstance(op, ast.Or))
            case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
                compared = [self.sized_value(item) for item in (left, *others)]
                return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, compared, compared[1:], strict=False))
            case ast.IfExp(test=test, body=yes, orelse=no):
                return self.value(yes if self.value(test) else no)
            case ast.JoinedStr(values=values):
                return "".join(str(self.value(part)) for part in values)
            case ast.FormattedValue(value=inner, format_spec=None):
                return self.sized_value(inner)
            case ast.Call():
                return self._call(node)
        raise _UnreadableError

    def _decided(self, operands: list[ast.expr], decides: bool) -> object:
        """The value of `or` (which a true operand decides) or `and` (which a false one does)."""
        for operand in operands[:-1]:
            value = self.value(operand)
            if bool(value) is decides:
                return value
        return self.value(operands[-1])

    def _call(self, node: ast.Call) -> object:
        name = ast.unparse(node.func)
        arguments = node.args
        if name in _PLAIN and not node.keywords:
            return _PLAIN[name](*[self.sized_value(argument) for argument in arguments])
        if name == "os.getcwd":  # its scripts are started from the folder above `config`
            folder = self.file.main.resolve().parent
            return str(folder.parent if folder.name == "config" else folder)
        if name in _CONFIG_DICTS and len(arguments) <= 1 and not node.keywords:
            return _to_dict(self.sized_value(arguments[0])) if arguments else {}
        if name in _LOADERS and len(arguments) == 2:
            return self.file.load_sibling(self.value(arguments[1]))
        if name == "importlib.util.module_from_spec" and len(arguments) == 1:
            return self.value(arguments[0])
        given: dict[int | str, object] = {place: self.value(argument) for place, argument in enumerate(arguments)}
        given |= {keyword.arg or _refuse(): self.value(keyword.value) for keyword in node.keywords}
        match node.func:
            case ast.Name(id=function):
                return self.file.call(function, given)
            case ast.Attribute(value=owner, attr=function):
                file = self.value(owner)
                if isinstance(file, _File):
                    return file.call(function, given)
        raise _UnreadableError


def _refuse() -> NoReturn:
    raise _UnreadableError


def _is_small(value: object) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**63
    return not isinstance(value, str | list | tuple | dict) or len(value) <= _LONGEST


def _combined(op: Callable[..., object], left: object, right: object) -> object:
    """The result of an operation on numbers, or of adding texts or lists; multiplying those could have no end."""
    adds = op is operator.add and type(left) is type(right) and isinstance(left, str | list | tuple)
    if not adds and not (isinstance(left, int | float) and isinstance(right, int | float)):
        raise _UnreadableError
    return op(left, right)


_item: Callable[..., object] = operator.getitem
_to_dict: Callable[..., object] = dict
_UNARY: dict[type, Callable[..., object]] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
_BINARY: dict[type, Callable[..., object]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type, Callable[..., object]] = {
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
_PLAIN: dict[str, Callable[..., object]] = {
    **{f.__name__: f for f in (int, float, bool, str, abs, round, min, max, len, tuple, list)},
    "os.path.join": os.path.join,
    "os.path.dirname": os.path.dirname,
    "os.path.abspath": os.path.abspath,
}
_CONFIG_DICTS = ("ml_collections.ConfigDict", "config_dict.ConfigDict", "ConfigDict")
_LOADERS = ("imp.load_source", "importlib.util.spec_from_file_location")
