"""Derived features on tensors: what `features.expression` computes of Arrow columns, for a graph.

A value carries its missing cells beside it, since a tensor has none: Arrow compares an infinite quotient and counts it
as missing only at the end of an expression, so NaN can't stand for both.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from raylway.errors import UserError
from raylway.features.derive import Derivation
from raylway.features.expression import Expression, name_of

MISSING = -1
"""The code of a missing text."""
OTHER = 0
"""The code of a text that has none of its own; the first of the words has 1."""


@dataclass(frozen=True)
class Number:
    values: torch.Tensor
    """float64 [N], or [] for a constant; anything where it is missing."""
    missing: torch.Tensor
    """bool, as `values`."""


@dataclass(frozen=True)
class Truth:
    values: torch.Tensor
    """bool [N], or [] for a constant."""
    missing: torch.Tensor


@dataclass(frozen=True)
class Text:
    codes: torch.Tensor
    """int64 [N]."""
    words: tuple[str, ...]

    @property
    def missing(self) -> torch.Tensor:
        return self.codes == MISSING


Value = Number | Truth | Text
Operand = Value | str
"""A `str` is a text constant."""


def compared_words(derivations: Iterable[Derivation]) -> list[str]:
    """The texts that expressions compare columns with: the columns' words must tell them apart."""
    roots = [each.root for each in derivations if isinstance(each, Expression)]
    compared = [node for root in roots for node in ast.walk(root) if isinstance(node, ast.Compare)]
    sides = [side for node in compared for side in (node.left, *node.comparators)]
    return [side.value for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, str)]


def evaluate(expression: Expression, columns: Mapping[str, Value], rows: torch.Tensor) -> Value:
    """The value for each row, as `Expression.evaluate`.

    Args:
        expression: What is computed.
        columns: Its columns by name.
        rows: Any tensor [N]; a constant is repeated as often.

    Raises:
        UserError: It does with texts what a graph can't do.
    """
    value = _Evaluation(expression, columns).value(expression.root)
    if isinstance(value, str):
        return Text(torch.ones_like(rows, dtype=torch.int64), (value,))
    if isinstance(value, Text):
        return value
    missing = value.missing.expand_as(rows)
    if isinstance(value, Truth):
        return Truth(value.values.expand_as(rows), missing)
    numbers = value.values.expand_as(rows)
    return Number(numbers, missing | ~is_finite(numbers))


def is_finite(numbers: torch.Tensor) -> torch.Tensor:
    """As `torch.isfinite`, of which an ONNX graph would ask the float32 next to a float64."""
    return numbers.abs() < torch.inf


class _Evaluation:
    """One expression over some rows; the branches are those of `Expression`."""

    def __init__(self, expression: Expression, columns: Mapping[str, Value]) -> None:
        self._expression, self._columns = expression, columns

    def value(self, node: ast.expr) -> Operand:
        match node:
            case ast.Constant(value=str(text)):
                return text
            case ast.Constant(value=bool() as truth):
                return Truth(torch.tensor(truth), torch.tensor(False))
            case ast.Constant(value=int() | float() as number):
                return Number(torch.tensor(float(number), dtype=torch.float64), torch.tensor(False))
            case ast.Name(id="true" | "false" as name):
                return Truth(torch.tensor(name == "true"), torch.tensor(False))
            case ast.Name() | ast.Call():
                return self._columns[name_of(node)]
            case ast.BinOp(left=left, op=op, right=right):
                return self._arithmetic(op, self._number(left), self._number(right))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inverted = self._truth(operand)
                return Truth(~inverted.values, inverted.missing)
            case ast.UnaryOp(operand=operand):
                one = self._number(operand)
                return Number(-one.values, one.missing)
            case ast.BoolOp(op=op, values=parts):
                combine = _both if isinstance(op, ast.And) else _either
                result = self._truth(parts[0])
                for part in parts[1:]:
                    result = combine(result, self._truth(part))
                return result
            case ast.Compare(left=left, ops=ops, comparators=rights):
                sides = [self.value(part) for part in (left, *rights)]
                results = [self._compared(a, op, b) for a, op, b in zip(sides, ops, sides[1:], strict=False)]
                result = results[0]
                for other in results[1:]:
                    result = _both(result, other)
                return result
        raise self._refusal(ast.unparse(node))

    def _arithmetic(self, op: ast.operator, one: Number, other: Number) -> Number:
        missing = one.missing | other.missing
        match op:
            case ast.Add():
                return Number(one.values + other.values, missing)
            case ast.Sub():
                return Number(one.values - other.values, missing)
            case ast.Mult():
                return Number(one.values * other.values, missing)
        return Number(one.values / other.values, missing)

    def _compared(self, one: Operand, op: ast.cmpop, other: Operand) -> Truth:
        if isinstance(one, Number) and isinstance(other, Number):
            return Truth(_related(one.values, op, other.values), one.missing | other.missing)
        if isinstance(one, Truth) and isinstance(other, Truth):
            return Truth(_related(one.values.long(), op, other.values.long()), one.missing | other.missing)
        if isinstance(one, str) and isinstance(other, str):
            order = torch.tensor((one > other) - (one < other))
            return Truth(_related(order, op, torch.tensor(0)), torch.tensor(False))
        if isinstance(one, str) and isinstance(other, Text):
            one, other = other, one
        if isinstance(one, Text) and isinstance(other, str) and isinstance(op, ast.Eq | ast.NotEq):
            # a derived text may have no such word: then no row has it
            code = one.words.index(other) + 1 if other in one.words else len(one.words) + 1
            return Truth(_related(one.codes, op, torch.tensor(code)), one.missing)
        raise self._refusal("a comparison of texts that is not == or != with a constant")

    def _number(self, node: ast.expr) -> Number:
        value = self.value(node)
        if isinstance(value, Truth):
            return Number(value.values.double(), value.missing)
        if isinstance(value, Number):
            return value
        raise self._refusal("arithmetic with text")

    def _truth(self, node: ast.expr) -> Truth:
        value = self.value(node)
        if isinstance(value, Truth):
            return value
        raise self._refusal("and, or, not of what is neither true nor false")

    def _refusal(self, found: str) -> UserError:
        return UserError(
            f"the derived feature {self._expression.text!r} can't be exported",
            where=self._expression.where,
            expected='arithmetic, comparisons of numbers, and == or != of a column with "text"',
            found=found,
            fix="compute the feature in the data, before the job, or serve the model with raylway serve",
        )


def _related(one: torch.Tensor, op: ast.cmpop, other: torch.Tensor) -> torch.Tensor:
    match op:
        case ast.Eq():
            return one == other
        case ast.NotEq():
            return one != other
        case ast.Lt():
            return one < other
        case ast.LtE():
            return one <= other
        case ast.Gt():
            return one > other
    return one >= other


def _both(one: Truth, other: Truth) -> Truth:
    """Kleene's and: what is missing does not matter beside a false."""
    false = (~one.missing & ~one.values) | (~other.missing & ~other.values)
    missing = (one.missing | other.missing) & ~false
    return Truth(~false & ~missing, missing)


def _either(one: Truth, other: Truth) -> Truth:
    """Kleene's or: what is missing does not matter beside a true."""
    true = (~one.missing & one.values) | (~other.missing & other.values)
    return Truth(true, (one.missing | other.missing) & ~true)
