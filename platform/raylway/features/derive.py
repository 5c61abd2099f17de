"""The derived columns of `data.derive`: expressions, and calls of the user's own functions."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from raylway.features.expression import Expression
from raylway.features.step import Step

Derivation = Expression | Step


def derivation(text: str, where: str = "data.derive") -> Derivation:
    """What a text of `data.derive` says; nothing of the user's is imported yet.

    Raises:
        UserError: It is neither an expression nor a call.
    """
    return Step(text, where) if Step.is_one(text) else Expression(text, where)


def parsed(derive: Mapping[str, str]) -> dict[str, Derivation]:
    """All derived columns of a transform, by name."""
    return {name: derivation(text, f"data.derive.{name}") for name, text in derive.items()}


def derived(table: pa.Table, derivations: Mapping[str, Derivation]) -> pa.Table:
    """The table with derived columns added, in order; one that is there already is kept as it is."""
    for name, each in derivations.items():
        if name not in table.column_names:
            table = table.append_column(name, each.evaluate(table))
    return table


def modules(derive: Mapping[str, str]) -> list[str]:
    """The user's modules that derived columns call, each once."""
    return list(dict.fromkeys(each.module for each in parsed(derive).values() if isinstance(each, Step)))
