"""The usable rows of one piece, each as a few words, in the order of the split.

A table of these columns, sorted by `key`:

    key        uint64: what the rows are divided by: a seeded scramble of the row's hash, or of its group's, or its
               instant, latest first
    identity   uint64, only where `key` is not made from the row's hash: its scrambled hash
    rest       uint64: the other half of the row's hash; (identity or key, rest) are equal for equal rows only
    row        uint64 row id
    position   uint32 in the piece
    code       int32: the piece's code of the row's class, 0 where classes have no names
    side       int8 (`split`), only where the source itself says it
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np
import pyarrow as pa

from raylway.data import clean
from raylway.data.clean import Assessed, Rules
from raylway.data.csv_read import Reject
from raylway.data.items import ROW_ID, Piece
from raylway.data.rowhash import hash_rows, mix
from raylway.data.split import TEST, TRAIN, VALIDATION
from raylway.features import dates
from raylway.features.derive import derivation
from raylway.features.prepared import LINE_BITS, SPLITS
from raylway.features.schema import canonical_text
from raylway.job.schema import At, Split


class Ordering(msgspec.Struct, frozen=True):
    """What decides the side of a row."""

    seed: int
    by: Literal["rows", "group", "time", "column", "at", "files"] = "rows"
    column: str = ""
    validation: str = ""
    """First instant of the validation rows, for `at`; empty for none."""
    test: str = ""
    sides: list[int] = []
    """For `files`: the side of each file of the source."""

    @property
    def is_given(self) -> bool:
        """Whether the source itself says every row's side."""
        return self.by in ("column", "at", "files")

    @property
    def has_units(self) -> bool:
        """Whether rows that are not equal must stay together too: those of one group or instant."""
        return self.by in ("group", "time")


def ordering_of(split: Split, seed: int, sides: list[int]) -> Ordering:
    """What the job and its source say; `sides` by file, empty unless they are separate files."""
    if sides:
        return Ordering(seed, "files", sides=sides)
    column = split.column or ""
    if split.by in {"group", "column"}:
        return Ordering(seed, split.by, column)
    if split.by == "time":
        at: At | None = split.at
        if at is None:
            return Ordering(seed, "time", column)
        first = "" if at.validation is None else str(at.validation)
        return Ordering(seed, "at", column, first, str(at.test))
    return Ordering(seed)


class Refused(msgspec.Struct, frozen=True):
    """The first row of a piece whose split column can't be used; None of the reject if there is none."""

    reject: Reject | None = None


def ordered(piece: Piece, assessed: Assessed, rules: Rules, ordering: Ordering) -> tuple[pa.Table, Refused]:
    """The usable rows of a piece in order.

    Returns:
        The table, and the first row without a place, if any.
    """
    positions = np.flatnonzero(np.frombuffer(assessed.usable, bool))
    hashes = np.frombuffer(assessed.hashes, np.uint64).reshape(-1, 2)
    scrambled = _scrambled(hashes[:, 0], ordering.seed)
    ids = piece.table[ROW_ID].combine_chunks().to_numpy()[positions]
    columns = {"key": scrambled, "rest": hashes[:, 1], "row": ids, "position": positions.astype(np.uint32)}
    columns["code"] = np.frombuffer(assessed.codes, np.int32) if assessed.values else np.zeros(len(ids), np.int32)
    refused = Refused()
    if ordering.by == "files":
        columns["side"] = np.array(ordering.sides, np.int8)[(ids >> np.uint64(LINE_BITS)).astype(np.int64)]
    elif ordering.column:
        values = _column(piece, positions, rules, ordering.column)
        if ordering.by == "group":
            columns["identity"] = scrambled
            group = hash_rows(pa.table({"": values}))[0][:, 0]
            columns["key"] = _scrambled(group, ordering.seed)
        elif ordering.by == "column":
            columns["side"], bad = _named_sides(values)
            refused = _refused(ordering.column, values, ids, bad, "none of train, validation and test")
        else:
            instants, bad = _instants(values)
            refused = _refused(ordering.column, values, ids, bad, "no number, date or time")
            if ordering.by == "time":
                columns["identity"] = scrambled
                columns["key"] = ~instants
            else:
                columns["side"] = _sides_at(instants, values.type, ordering)
    order = np.argsort(columns["key"], kind="stable")
    return pa.table({name: pa.array(values[order]) for name, values in columns.items()}), refused


def instant(text: str, kind: pa.DataType) -> np.uint64 | None:
    """The place in time of what the job says, for a column of this type; None if it names none."""
    if pa.types.is_string(kind):
        array: pa.Array = pa.array([text])
    else:
        try:
            array = pa.array([float(text)])
        except ValueError:
            return None
        if not pa.types.is_floating(kind):  # the first whole number that is not below it
            array = pa.array([math.ceil(min(max(array[0].as_py(), -(2.0**62)), 2.0**62))])
    words, bad = _instants(array)
    return None if bad[0] else words[0]


def _column(piece: Piece, positions: np.ndarray, rules: Rules, name: str) -> pa.Array:
    if name in rules.types:
        return clean.typed_rows(piece, positions, [name], rules)[name].combine_chunks()
    table = clean.typed_rows(piece, positions, list(rules.types), rules)
    for derived, text in rules.derive.items():
        table = table.append_column(derived, derivation(text, rules.places[derived]).evaluate(table))
    return table[name].combine_chunks()


def _scrambled(words: np.ndarray, seed: int) -> np.ndarray:
    return mix(words ^ mix(np.array([seed], np.uint64)))


def _named_sides(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    encoded = canonical_text(values).dictionary_encode()
    known = {name: side for side, name in enumerate(SPLITS, 1)}
    sides = np.array([known.get(text, 0) for text in encoded.dictionary.to_pylist()] + [0], np.int8)
    found = sides[encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)]
    return found, found == 0


def _instants(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """uint64 words in the order of time (or of numbers), and which values have no place in it."""
    top = np.uint64(1 << 63)
    if pa.types.is_string(values.type):
        found, valid = dates.parse(values)
        return found.view(np.uint64) ^ top, ~valid
    if pa.types.is_floating(values.type):
        numbers = values.to_numpy(zero_copy_only=False) + 0.0  # -0.0 becomes 0.0: they are equal
        bits = numbers.view(np.uint64)
        return np.where(bits & top, ~bits, bits | top), np.isnan(numbers)
    whole = values.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    return whole.view(np.uint64) ^ top, values.is_null().to_numpy(zero_copy_only=False)


def _sides_at(instants: np.ndarray, kind: pa.DataType, ordering: Ordering) -> np.ndarray:
    test = instant(ordering.test, kind)
    first = instant(ordering.validation, kind) if ordering.validation else test
    sides = np.full(len(instants), TRAIN, np.int8)
    if test is not None and first is not None:
        sides[instants >= first] = VALIDATION
        sides[instants >= test] = TEST
    return sides


def _refused(column: str, values: pa.Array, ids: np.ndarray, bad: np.ndarray, why: str) -> Refused:
    if not bad.any():
        return Refused()
    at = int(np.flatnonzero(bad)[np.argmin(ids[bad])])
    cell = values[at].as_py()
    return Refused(Reject(int(ids[at]), column, why, "" if cell is None else str(cell)))
