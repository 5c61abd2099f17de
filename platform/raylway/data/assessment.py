"""One piece under the job's rules: what its rows are held to, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import msgspec
import numpy as np
import pyarrow as pa

from raylway.data import clean, describe, division, ordering
from raylway.data.clean import Assessed, Rules, assess
from raylway.data.columns import Cell, Seen
from raylway.data.csv_read import Reject
from raylway.data.decide import Places, Types, decide
from raylway.data.describe import Described
from raylway.data.division import Division, Exceptions
from raylway.data.items import ROW_ID, Piece
from raylway.data.opening import Source
from raylway.data.ordering import Ordering
from raylway.data.roles import Names
from raylway.errors import UserError
from raylway.features.texts import with_commas
from raylway.job.load import LoadedJob

_SHOWN = 4
"""Rejected rows of a piece that a message may name."""


def rules_of(loaded: LoadedJob, names: Names, types: Types) -> Rules:
    """What the pieces' rows are held to, once the types are decided."""
    asked = loaded.job.data.clean
    target_type = types.of.get(names.target, "")
    certain = loaded.job.task == "classification" or target_type in ("string", "bool")
    classes: Literal["all", "few", "none"] = "all" if certain or names.target in names.derive else "few"
    if loaded.job.task == "regression":
        classes = "none"
    hidden = [name for name in names.derive if name in names.drop and name not in names.target_sources]
    says_side = loaded.job.data.split.by == "column"
    return Rules(
        types=types.of,
        derive=names.derive,
        places={name: loaded.location(f"data.derive.{name}") for name in names.derive},
        target=names.target,
        target_sources=sorted(names.target_sources),
        dates=[*names.date, *(name for name in types.dates if name not in names.date)],
        needed=[loaded.job.data.split.column] if loaded.job.data.split.column else [],
        unhashed=[name for name in [loaded.job.data.split.column] if name in types.of and says_side],
        unused=hidden,
        drop_missing=asked.missing == "drop",
        infinite_is_missing=asked.infinite == "missing",
        decimal=loaded.job.data.read.decimal,
        classes=classes,
    )


class Found(msgspec.Struct, frozen=True):
    """What became of one piece's rows, without anything that grows with them."""

    assessed: Assessed
    """Its row arrays are empty; of the rejects the first few."""
    usable: int
    invalid: int
    refused: Reject | None
    """The first row whose split column has no place in the split."""
    first: int
    """Row id of the piece's first row; 0 if it has none."""
    last: int

    def slim(self) -> Found:
        """Without what its columns hold."""
        return msgspec.structs.replace(
            self, assessed=msgspec.structs.replace(self.assessed, texts={}, described=Described({}))
        )


@dataclass(frozen=True)
class Columns:
    """What the columns hold over all pieces."""

    described: Described
    distinct: dict[str, int]
    """Different values of each column of text in usable rows."""


class Counted(msgspec.Struct, frozen=True):
    """Rows of a piece by side and class, int64 [4, classes or 1]."""

    rows: int
    counts: list[list[int]]


def found_of(piece: Piece, rules: Rules, order: Ordering) -> tuple[Found, pa.Table, list[Reject]]:
    """Assess a piece: what became of its rows, the usable ones in order (`ordering`), and the invalid ones.

    Raises:
        UserError: A derived column's expression does not fit its columns.
    """
    full = assess(piece, rules)
    table, refused = ordering.ordered(piece, full, rules, order)
    ids = piece.table[ROW_ID]
    rows = len(ids)
    slim = msgspec.structs.replace(full, usable=b"", hashes=b"", codes=b"", rejects=full.rejects[:_SHOWN])
    ends = (ids[0].as_py(), ids[rows - 1].as_py()) if rows else (0, 0)
    return Found(slim, table.num_rows, len(full.rejects), refused.reject, *ends), table, full.rejects


def ordering_of(loaded: LoadedJob, source: Source) -> Ordering:
    """What decides the side of a row."""
    return ordering.ordering_of(loaded.job.data.split, loaded.job.seed, source.sides)


def counted(table: pa.Table, found: Found, codes: list[int], divided: Division, exceptions: Exceptions) -> Counted:
    """The rows of one piece by side and class."""
    own = np.array(codes, np.int32)
    own_sides = division.sides(table, own, divided, exceptions)
    classes = max(1, len(divided.classes))
    code = own[table["code"].to_numpy()] if codes else np.zeros(len(own_sides), np.int32)
    counts = np.bincount(own_sides.astype(np.int64) * classes + code, minlength=4 * classes).reshape(4, classes)
    return Counted(found.assessed.rows, counts.tolist())


def columns_of(pieces: Iterable[Found]) -> Columns:
    """What all pieces' columns hold together; only some pieces are held at a time."""
    rest = iter(pieces)
    described: list[Described] = []
    texts: dict[str, np.ndarray] = {}
    while several := [each.assessed for each in islice(rest, 32)]:
        described = [describe.merged([*described, *(each.described for each in several)])]
        for name in sorted({name for each in several for name in each.texts}):
            sketches = [np.frombuffer(each.texts[name], np.uint64) for each in several if name in each.texts]
            texts[name] = clean.smallest([texts.get(name, np.zeros(0, np.uint64)), *sketches])
    return Columns(
        described[0] if described else Described({}), {name: clean.distinct(words) for name, words in texts.items()}
    )


def merged(parts: list[dict[str, Seen]]) -> dict[str, Seen]:
    """What all pieces saw, by column; `parts` in the order of the rows."""
    result = dict(parts[0])
    for part in parts[1:]:
        for name, column in part.items():
            result[name] = result[name].merged(column)
    return result


def types_of(loaded: LoadedJob, names: Names, seen: dict[str, Seen], places: Places) -> Types:
    """The types of all columns; a regression's target is a number whatever it looks like."""
    numeric = set(names.numeric)
    if loaded.job.task == "regression" and names.target in seen and "text" in seen[names.target].sources:
        column = seen[names.target]
        if column.bad > loaded.job.data.clean.max_invalid * column.present:
            first = column.first_bad
            what = "true or false" if column.is_truth else "text"
            raise unfit_target(loaded, names.target, what, places.cell(first) if first else what, first)
        numeric.add(names.target)
    text = {*names.categorical, *names.drop, names.target}
    return decide(seen, numeric, text, loaded.job.data.clean, places)


def unfit_target(loaded: LoadedJob, target: str, what: str, found: str, cell: Cell | None = None) -> UserError:
    """The target of a regression is `what`, no number."""
    return UserError(
        f"the target {target!r} is {what}, which regression can't predict",
        where=loaded.location("data.target"),
        expected="a column of numbers",
        found=found,
        fix=f"choose a numeric target, or task: classification{comma_hint(cell.text) if cell else ''}",
    )


def comma_hint(cell: str) -> str:
    """What to try if a cell that is no number would be one with a decimal comma; else nothing."""
    return '; or write data.read.decimal: "," if that is a decimal comma' if with_commas(pa.array([cell]))[0] else ""
