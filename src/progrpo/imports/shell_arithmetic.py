"""Whole numbers of a shell's arithmetic expressions, `$(( ))`."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable


def whole_number(text: str) -> int | None:
    """The value of an expression of whole numbers and `+ - * / %`; None for any other text, and for too large a value.

    Division rounds down.
    """
    if not re.fullmatch(r"[\d\s()+*/%-]{1,100}", text):
        return None
    try:
        return _evaluated(ast.parse(text.strip().replace("/", "//"), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None


_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _evaluated(node: ast.expr) -> int:
    """The whole number of an expression. ValueError for any other node, and for a number of over 15 digits."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_evaluated(node.left), _evaluated(node.right))
    else:
        raise ValueError("no arithmetic of whole numbers")
    if abs(value) >= 10**15:
        raise ValueError("too large a number")
    return value
