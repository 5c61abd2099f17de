"""The column report: every column as it was found, what it is used as and why, in one form for `check`, `profile.json`
and the report."""

from __future__ import annotations

import msgspec
import numpy as np
import pyarrow as pa

from raylway.data.describe import Column
from raylway.data.roles import Names, Roles
from raylway.data.warnings import looks_like_identifier
from raylway.features.schema import as_float64

_BARS = 24
_BARS_OF_TEXT = 8


class Reported(msgspec.Struct, frozen=True):
    """One column of the source, or a derived one."""

    name: str
    type: str
    role: str
    """target, numeric, categorical, date, identifier, text, constant, dropped or unused."""
    why: str
    rows: int
    missing: int
    distinct: int
    distinct_is_exact: bool
    minimum: int | float | None
    maximum: int | float | None
    mean: float | None
    infinite: int
    examples: list[str]
    frequent: dict[str, int]
    """The most frequent texts, a few."""
    histogram: list[int]
    """Sampled kept rows in bins of equal width from the lowest to the highest number sampled; empty for text."""


def report(
    columns: dict[str, Column], names: Names, roles: Roles, empty: list[str], sample: pa.Table | None
) -> list[Reported]:
    """The columns of the source, then the derived ones.

    Args:
        columns: As described over all rows.
        names: The job's names.
        roles: What was chosen.
        empty: Columns without a present cell.
        sample: Typed source and derived columns of some kept rows; None if there is none.
    """
    found = []
    for name, column in columns.items():
        role, why = _role(name, column, names, roles, empty)
        numbers = column.type in ("int64", "float64") and column.minimum is not None
        found.append(
            Reported(
                name=name,
                type=column.type,
                role=role,
                why=why,
                rows=column.rows,
                missing=column.missing,
                distinct=column.distinct,
                distinct_is_exact=column.is_exact,
                minimum=column.minimum,
                maximum=column.maximum,
                mean=column.mean if numbers or (column.type == "bool" and column.present) else None,
                infinite=column.infinite,
                examples=column.examples,
                frequent=dict(list(column.frequent.items())[:_BARS_OF_TEXT]),
                histogram=_histogram(sample, name) if numbers else [],
            )
        )
    return found


def _role(name: str, column: Column, names: Names, roles: Roles, empty: list[str]) -> tuple[str, str]:
    if name == names.target:
        return "target", "the job names it" + (", derived" if name in names.derive else "")
    if name in names.drop:
        return "dropped", "listed under features.drop"
    for role, chosen in (("numeric", roles.numeric), ("categorical", roles.categorical), ("date", roles.date)):
        if name in chosen:
            return _role_of_feature(name, role, column, names)
    if leaks := sorted((names.reads(name) | names.derives(name)) & names.target_sources):
        return "unused", f"the target {names.target!r} derives from {leaks[0]!r}"
    if name in empty:
        return "unused", "empty in every row"
    if column.is_date:
        return "date", "all its texts are dates" + (f"; {roles.unused[name][1]}" if name in roles.unused else "")
    if name in roles.unused:
        unused, why = roles.unused[name]
        return unused, why + "; numbers with a comma" * column.has_decimal_commas
    return "unused", "only other columns derive from it"


def _role_of_feature(name: str, role: str, column: Column, names: Names) -> tuple[str, str]:
    if column.distinct == 1 and not column.infinite:
        return "constant", f"{role} feature with one value in every row"
    if role == "numeric" and (looks := looks_like_identifier(name, column)):
        return "identifier", f"numeric feature, but {looks}"
    if name in {"numeric": names.numeric, "categorical": names.categorical, "date": names.date}[role]:
        return role, f"listed under features.{role}"
    if role == "numeric":
        return role, "all its cells are numbers"
    if role == "date":
        return role, "all its texts are dates"
    kind = "true and false" if column.type == "bool" else f"text with {column.distinct:,} different values"
    return role, kind + "; numbers with a comma" * column.has_decimal_commas


def _histogram(sample: pa.Table | None, name: str) -> list[int]:
    if sample is None or name not in sample.column_names:
        return []
    values = as_float64(sample[name])
    values = values[np.isfinite(values)]
    if not len(values):
        return []
    low, high = values.min(), values.max()
    # halves first: the distance of two finite numbers may be infinite
    share = (values / 2 - low / 2) / (high / 2 - low / 2 or 1.0)
    return np.bincount(np.minimum((share * _BARS).astype(np.int64), _BARS - 1), minlength=_BARS).tolist()
