"""The value of a Python expression of literals and names, computed from its syntax tree. Nothing is run."""

from __future__ import annotations

import ast
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from progrpo.imports.files import walk
from progrpo.imports.outcome import Unread

_MOST_NODES = 20_000
_LONGEST = 10_000


class UnreadableError(Exception):
    """An expression of a kind that is not followed."""


@dataclass
class Budget:
    """The work that is left to one reading. Short files can ask for endless work."""

    nodes: int = _MOST_NODES
    calls: int = 0

    def spend_node(self) -> None:
        """Count one node of the syntax tree. `UnreadableError` if none is left."""
        self.nodes -= 1
        if self.nodes < 0:
            raise UnreadableError


class SourceFile(ABC):
    """A Python file as an expression in it sees it. `main` is the file whose settings are read, this one or another."""

    main: Path
    names: dict[str, object]
    budget: Budget

    @abstractmethod
    def call(self, name: str, arguments: dict[int | str, object]) -> object:
        """The value that a function returns for arguments, which have their place or their name as a key."""

    @abstractmethod
    def load_sibling(self, path: object) -> SourceFile:
        """A file that this one loads. It must lie in the folder of the main file."""


@dataclass(frozen=True)
class Expressions:
    """The values of the expressions of a file, where `names` are local names.

    `value_or_unread` gives the value of an expression inside another which need not be followed for the other to be.
    """

    file: SourceFile
    names: dict[str, object]
    value_or_unread: Callable[[ast.expr], object]

    def value(self, node: ast.expr) -> object:
        """The value of an expression. `UnreadableError` if the expression is not followed."""
        self.file.budget.spend_node()
        try:
            value = self._value(node)
        except (TypeError, ValueError, ArithmeticError, LookupError):  # which running the file would raise too
            raise UnreadableError from None
        if isinstance(value, Unread) or not _is_small(value):
            raise UnreadableError
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
        raise UnreadableError

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
                if isinstance(file, SourceFile):
                    return file.call(function, given)
        raise UnreadableError


def _refuse() -> NoReturn:
    raise UnreadableError


def _is_small(value: object) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**63
    return not isinstance(value, str | list | tuple | dict) or len(value) <= _LONGEST


def _combined(op: Callable[..., object], left: object, right: object) -> object:
    """The result of an operation on numbers, or of adding texts or lists; multiplying those could have no end."""
    adds = op is operator.add and type(left) is type(right) and isinstance(left, str | list | tuple)
    if not adds and not (isinstance(left, int | float) and isinstance(right, int | float)):
        raise UnreadableError
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
