"""One piece's rows against the rules: which are invalid, which miss a cell, and a hash of each that is left."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.data import columns
from raylway.data.csv_read import Reject
from raylway.data.describe import Described, describe
from raylway.data.items import ROW_ID, Piece
from raylway.data.roles import FEW_CLASSES
from raylway.data.rowhash import hash_rows, text_words
from raylway.features import dates
from raylway.features.derive import derivation
from raylway.features.schema import canonical_text
from raylway.features.step import Step
from raylway.features.texts import Decimal, missing_words

SKETCH = 4096
"""Different texts of a column are counted exactly up to so many; beyond, within about 2% (`distinct`)."""


class Rules(msgspec.Struct, frozen=True):
    """What all pieces are held to."""

    types: dict[str, str]
    """Decided type by source column."""
    derive: dict[str, str]
    """All derived columns, in order."""
    places: dict[str, str]
    """Where the job derives each, for messages."""
    target: str
    target_sources: list[str]
    """Source columns that the target is or derives from."""
    dates: list[str]
    """Columns of text whose cells must be dates; a missing word (`features.texts`) is missing in them."""
    needed: list[str]
    """Columns that every row needs although it may miss others: the split's."""
    unhashed: list[str]
    """Source columns in which equal rows may differ: the one that says the side."""
    unused: list[str]
    """Derived columns whose missing values do not matter."""
    drop_missing: bool
    infinite_is_missing: bool
    decimal: Decimal
    """The decimal sign of numbers in text."""
    classes: Literal["all", "few", "none"]
    """Whether to name the target's values: always, only if they are few, or never."""


class Assessed(msgspec.Struct, frozen=True):
    """What became of one piece's rows. Row arrays are in the piece's order."""

    item: int
    number: int
    rows: int
    read: int
    usable: bytes
    """uint8 [rows]: neither invalid nor missing a cell that matters."""
    rejects: list[Reject]
    missing: int
    missing_by: dict[str, int]
    """Empty cells by column, in rows that are not invalid."""
    hashes: bytes
    """uint64 [usable rows, 2]."""
    codes: bytes
    """int32 [usable rows]: index into `values`; nothing if the target's values are not named."""
    values: list[str]
    """Canonical texts of the target's different values."""
    whole: bool
    """Whether a numeric target has whole values only."""
    derived_types: dict[str, str]
    """`null` where no value says."""
    texts: dict[str, bytes]
    """By column of text: uint64, the smallest hashes of its different values (`SKETCH` of them at most)."""
    described: Described
    """Source and derived columns over all rows of the piece that are not invalid."""


def assess(piece: Piece, rules: Rules) -> Assessed:
    """Hold the rows of a piece to the rules.

    Raises:
        UserError: A derived column's expression does not fit its columns, or the user's function for it fails.
    """
    table, rejects = _typed(piece, rules)
    valid = np.ones(table.num_rows, bool)
    if rejects:
        ids = piece.table[ROW_ID].combine_chunks().to_numpy()
        valid = ~np.isin(ids, np.array([reject.row_id for reject in rejects], np.uint64))
    full = table
    for name, text in rules.derive.items():
        each = derivation(text, rules.places[name])
        read = pa.table({column: _plain(full[column]) for column in full.column_names if column in each.columns})
        column = each.evaluate(read)
        if isinstance(each, Step):
            each.check(read, column)
        full = full.append_column(name, column)
    empty = {name: pc.is_null(full[name]).to_numpy() & valid for name in full.column_names if full[name].null_count}
    counts = {name: int(mask.sum()) for name, mask in empty.items()}
    missing = np.zeros(table.num_rows, bool)
    for name, mask in empty.items():
        matters = name == rules.target or name in rules.target_sources or name in rules.needed
        if matters or (rules.drop_missing and name not in rules.unused):
            missing |= mask
    usable = valid & ~missing
    words = {
        name: text_words(full[name].combine_chunks().dictionary)
        for name in full.column_names
        if pa.types.is_dictionary(full[name].type)
    }
    hashes, texts = hash_rows(table.drop_columns(rules.unhashed).filter(pa.array(usable)), words)
    values, codes, whole = _values(_plain(full[rules.target]).filter(pa.array(usable)), rules)
    return Assessed(
        item=piece.facts.item,
        number=piece.facts.number,
        rows=table.num_rows,
        read=piece.facts.read,
        usable=usable.tobytes(),
        rejects=sorted([*piece.facts.rejects, *rejects], key=lambda reject: reject.row_id),
        missing=int((valid & missing).sum()),
        missing_by={name: count for name, count in counts.items() if count},
        hashes=hashes.tobytes(),
        codes=codes.tobytes(),
        values=values,
        whole=whole,
        derived_types={name: type_name(full.schema.field(name).type) for name in rules.derive},
        texts={name: np.unique(words)[:SKETCH].tobytes() for name, words in texts.items()},
        described=describe(full if valid.all() else full.filter(pa.array(valid)), words),
    )


def typed_rows(piece: Piece, rows: np.ndarray, names: list[str], rules: Rules) -> pa.Table:
    """Some rows of a piece in their decided types, over the source columns in `names`.

    Args:
        piece: The piece.
        rows: Positions, all usable.
        names: Source columns.
        rules: As `assess` was given.
    """
    taken = piece.table.select([*names, ROW_ID]).take(pa.array(rows))
    arrays = {}
    for name in names:
        stored, decimal = taken[name].combine_chunks(), _decimal(piece, name, rules)
        arrays[name] = columns.final(stored, rules.types[name], rules.infinite_is_missing, decimal)[0]
        if name in rules.dates:
            arrays[name] = _without_words(arrays[name])
    return pa.table({**arrays, ROW_ID: taken[ROW_ID]})


def smallest(sketches: list[np.ndarray]) -> np.ndarray:
    """What the parts of a column have together: uint64, ascending, the smallest hashes (`SKETCH` of them at most)."""
    return np.unique(np.concatenate(sketches))[:SKETCH]


def distinct(sketch: np.ndarray) -> int:
    """How many different values a column has (k minimum values; Bar-Yossef and others 2002)."""
    if len(sketch) < SKETCH:
        return len(sketch)
    return int((SKETCH - 1) * 2.0**64 / float(sketch[-1]))


def dates_of(texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """A column of dates, its missing words missing, and which cells are neither date nor missing."""
    texts = _without_words(texts)
    _, valid = dates.parse(texts)
    return texts, ~valid & texts.is_valid().to_numpy(zero_copy_only=False)


def _without_words(texts: pa.Array) -> pa.Array:
    return pc.if_else(pa.array(missing_words(pc.fill_null(texts, ""))), pa.scalar(None, pa.string()), texts)


def type_name(kind: pa.DataType) -> str:
    """int64, float64, bool or string; null of a column without a value."""
    return "float64" if pa.types.is_floating(kind) else str(kind)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column


def _decimal(piece: Piece, name: str, rules: Rules) -> Decimal:
    """CSV files have the job's decimal sign; other formats hold numbers, or text as everybody writes it."""
    return rules.decimal if "text" in piece.facts.seen[name].sources else "."


def _typed(piece: Piece, rules: Rules) -> tuple[pa.Table, list[Reject]]:
    """The piece's source columns in their decided types, and its rows with a cell that has no place in one.

    Text stays dictionary-encoded, as the piece holds it: each different one is hashed and described once.
    """
    arrays: dict[str, pa.Array] = {}
    first: dict[int, str] = {}
    for name, wanted in rules.types.items():
        stored = piece.table[name].combine_chunks()
        if wanted == "string" and name not in rules.dates and pa.types.is_dictionary(stored.type):
            arrays[name] = stored
            continue
        arrays[name], invalid = columns.final(stored, wanted, rules.infinite_is_missing, _decimal(piece, name, rules))
        if name in rules.dates and wanted == "string":
            arrays[name], invalid = dates_of(arrays[name])
        if invalid is not None:
            for row in np.flatnonzero(invalid):
                first.setdefault(int(row), name)
    rejects = [
        Reject(
            piece.table[ROW_ID][row].as_py(),
            name,
            "no date"
            if rules.types[name] == "string"
            else f"no {'whole ' if rules.types[name] == 'int64' else ''}number",
            piece.table[name][row].as_py(),
        )
        for row, name in first.items()
    ]
    return pa.table(arrays), rejects


def _values(target: pa.ChunkedArray, rules: Rules) -> tuple[list[str], np.ndarray, bool]:
    """The target's different values by name, the code of each row, and whether all are whole numbers."""
    nothing = np.zeros(0, np.int32)
    column = target.combine_chunks()
    whole = False
    if pa.types.is_floating(column.type):
        numbers = column.to_numpy(zero_copy_only=False)
        whole = bool((numbers == np.trunc(numbers)).all())
    elif pa.types.is_integer(column.type):
        whole = True
    if rules.classes == "none":
        return [], nothing, whole
    encoded = column.dictionary_encode()
    if rules.classes == "few" and len(encoded.dictionary) > FEW_CLASSES:
        return [], nothing, whole
    values = canonical_text(encoded.dictionary).to_pylist()
    return values, encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32), whole
