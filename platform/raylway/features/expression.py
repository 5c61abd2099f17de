"""The small, safe expression language of `data.derive`, evaluated on Arrow columns.

Grammar: column names, numbers, quoted text, `true` and `false`; `+ - * /`; `== != < <= > >=`; `and or not`;
parentheses. A name that is no identifier is written `col("my column")`. Arithmetic is done in float64; a missing
operand makes the result missing, and so does a division by zero. Python's own parser reads the text, and only the node
types below are let through.
"""

from __future__ import annotations

import ast
import sys
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raylway.errors import UserError

_ARITHMETIC = {ast.Add: pc.add, ast.Sub: pc.subtract, ast.Mult: pc.multiply}
_COMPARISON = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_LARGEST_NUMBER = sys.float_info.max
_LONGEST_SHOWN = 200
_GRAMMAR = 'column names, numbers, text, + - * /, comparisons, and, or, not, col("a name")'
_CONSTANTS = {"true": True, "false": False}


class Expression:
    """One parsed expression.

    Args:
        text: The expression.
        where: The key of the job file that holds it, for messages.

    Raises:
        UserError: The text is outside the grammar.
    """

    def __init__(self, text: str, where: str = "data.derive") -> None:
        self.text, self.where = text, where
        try:
            self.root = ast.parse(text.strip(), mode="eval").body
            """Of nodes of the grammar only."""
            self.columns: frozenset[str] = frozenset(self._names(self.root))
            """The columns that it reads."""
        except (SyntaxError, ValueError) as error:
            raise self._error(f"can't be read: {getattr(error, 'msg', error)}") from None
        except (RecursionError, MemoryError):
            raise self._error("is nested too deeply") from None

    def load(self) -> None:
        """Nothing: as of `features.step.Step`, whose function must be found."""

    def evaluate(self, table: pa.Table) -> pa.Array:
        """The value for each row: float64, bool or text.

        Raises:
            UserError: A column is not there, or its type does not fit the operation.
        """
        try:
            value = self._value(self.root, table)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            types = ", ".join(f"{name} is {table.schema.field(name).type}" for name in sorted(self.columns))
            where = f"the types of its columns ({types})" if types else "its constants"
            raise self._error(
                f"does not fit {where}: {error}",
                'comparisons of numbers with numbers and text with "text", and, or, not of comparisons',
            ) from None
        except RecursionError:
            raise self._error("is nested too deeply") from None
        if isinstance(value, pa.ChunkedArray):
            value = value.combine_chunks()
        if not isinstance(value, pa.Array):
            value = pa.repeat(value, table.num_rows)
        if pa.types.is_floating(value.type):
            value = pc.if_else(pc.is_finite(value), value, pa.scalar(None, pa.float64()))
        return value

    def _names(self, node: ast.expr) -> set[str]:
        match node:
            case ast.Name(id=name) if name in _CONSTANTS:
                return set()
            case ast.Name() | ast.Call(func=ast.Name(id="col"), args=[ast.Constant(value=str())], keywords=[]):
                return {name_of(node)}
            case ast.Constant(value=bool() | int() | float() | str() as constant):
                if not isinstance(constant, str) and abs(constant) > _LARGEST_NUMBER:
                    raise self._error("holds a number that is too large")
                return set()
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right=right):
                return self._names(left) | self._names(right)
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                return self._names(operand)
            case ast.BoolOp(values=values):
                return set().union(*map(self._names, values))
            case ast.Compare(left=left, ops=ops, comparators=rights) if all(type(op) in _COMPARISON for op in ops):
                return self._names(left).union(*map(self._names, rights))
        raise self._error(f"holds {ast.unparse(node)!r}, which is not allowed")

    def _value(self, node: ast.expr, table: pa.Table) -> Any:
        match node:
            case ast.Name(id=name) if name in _CONSTANTS:
                return pa.scalar(_CONSTANTS[name])
            case ast.Name() | ast.Call():
                return table[name_of(node)]
            case ast.Constant(value=bool() | str() as constant):
                return pa.scalar(constant)
            case ast.Constant(value=int() | float() as number):
                return pa.scalar(float(number))
            case ast.BinOp(left=left, op=op, right=right):
                operands = self._number(left, table), self._number(right, table)
                if isinstance(op, ast.Div):
                    return pc.divide(*operands)
                return _ARITHMETIC[type(op)](*operands)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return pc.invert(self._value(operand, table))
            case ast.UnaryOp(operand=operand):
                return pc.negate(self._number(operand, table))
            case ast.BoolOp(op=op, values=values):
                combine = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
                result = self._value(values[0], table)
                for part in values[1:]:
                    result = combine(result, self._value(part, table))
                return result
            case ast.Compare(left=left, ops=ops, comparators=rights):
                sides = [self._value(part, table) for part in (left, *rights)]
                pairs = zip(sides, ops, sides[1:], strict=False)
                results = [_COMPARISON[type(op)](a, b) for a, op, b in pairs]
                result = results[0]
                for other in results[1:]:
                    result = pc.and_kleene(result, other)
                return result
        raise self._error(f"holds {ast.unparse(node)!r}, which is not allowed")

    def _number(self, node: ast.expr, table: pa.Table) -> Any:
        value = self._value(node, table)
        if pa.types.is_string(value.type):  # Arrow would read numbers out of text, as long as every row holds one
            raise pa.ArrowTypeError("text is no number")
        return pc.cast(value, pa.float64())

    def _error(self, what: str, expected: str = _GRAMMAR) -> UserError:
        shown = self.text if len(self.text) <= _LONGEST_SHOWN else f"{self.text[:_LONGEST_SHOWN]}..."
        return UserError(
            f"the expression {shown!r} {what}",
            where=self.where,
            expected=expected,
            found=shown,
            fix="write it so, or compute it in a function of your own: module:function(column, column)",
        )


def name_of(node: ast.Name | ast.Call) -> str:
    """The column that a node of the grammar names, `name` or `col("name")`."""
    match node:
        case ast.Call(args=[ast.Constant(value=str(name))]):
            return name
        case ast.Name(id=name):
            return name
    raise AssertionError(ast.dump(node))
