"""What a column holds: counts, range, examples and the most frequent texts; parts merge into the whole data's.

Cheap enough to run on every piece: numbers are compared at the speed of numpy, different texts are looked at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.data.items import ROW_ID
from raylway.data.rowhash import mix, text_words
from raylway.features import dates
from raylway.features.schema import canonical_text
from raylway.features.texts import numbers

SIDE = "\0side"
"""Column of a sample that says on which side of the split a row is (int8, `split`); no source column is called so."""
SAMPLE_ROWS = 10_000
"""About so many kept rows make a sample."""

_SKETCH = 4096
"""Different values are counted exactly up to so many; beyond, within about 2% (one standard error)."""
_EXAMPLES = 5
_FREQUENT = 256
"""So many of a column's texts are counted by name."""
_LONGEST = 80
"""Characters of a text that are kept as an example or by name."""
_DATE = r"^[ \t]*[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])([ \tTt]|$)"
_NARROW = 1 << 16
"""Whole numbers within so narrow a range are marked in a table instead of hashed one by one."""
_LOOK = 200
"""Rows of a piece among which examples are looked for."""


class Column(msgspec.Struct):
    """What one column of a typed table holds."""

    type: str
    """int64, float64, bool or string."""
    rows: int = 0
    missing: int = 0
    infinite: int = 0
    """Infinite numbers; they count as present but in no range or mean."""
    minimum: int | float | None = None
    """Of finite numbers; None in a column of text or without one."""
    maximum: int | float | None = None
    mean: float = 0.0
    """Of finite numbers; of true and false the share of true."""
    whole: bool = True
    """Whether all numbers are whole."""
    sketch: bytes = b""
    """uint64, ascending: the smallest hashes of the different values, `_SKETCH` at most."""
    examples: list[str] = []
    """The first different values, in the order of the rows."""
    frequent: dict[str, int] = {}
    """Of texts and booleans: those that stand most often with their counts, `_FREQUENT` at most."""
    dates: int = 0
    """Cells of text that are dates (`features.dates`); 0 where some cell of the piece does not even look like one."""
    commas: int = 0
    """Cells of text that would be numbers if a comma were their decimal sign, whole ones too; 0 where some cell of the
    piece would not."""
    has_comma: bool = False
    """Whether one of them has a comma."""
    lost: int = 0
    """Cells whose text was dropped from `frequent` on the way, so its counts may be short by so many."""

    @property
    def present(self) -> int:
        return self.rows - self.missing

    @property
    def distinct(self) -> int:
        """How many different values there are (k minimum values; Bar-Yossef and others 2002)."""
        hashes = np.frombuffer(self.sketch, np.uint64)
        if len(hashes) < _SKETCH:
            return len(hashes)
        return min(self.present, int((_SKETCH - 1) * 2.0**64 / float(hashes[-1])))

    @property
    def is_date(self) -> bool:
        """Whether every cell is a date."""
        return 0 < self.dates == self.present

    @property
    def has_decimal_commas(self) -> bool:
        """Whether every cell is text that would be a number if a comma were its decimal sign."""
        return self.has_comma and self.commas == self.present

    @property
    def is_exact(self) -> bool:
        """Whether `distinct` is."""
        return len(self.sketch) < 8 * _SKETCH


class Described(msgspec.Struct):
    """The columns of some rows, in the order of the table."""

    columns: dict[str, Column]


def describe(table: pa.Table, words: Mapping[str, np.ndarray] = {}) -> Described:
    """Look at every column of a typed table but the row ids.

    Args:
        table: N rows of `features.schema.COLUMN_TYPES`; text may be dictionary-encoded, which saves encoding it.
        words: `rowhash.text_words` of the dictionaries of such columns, where they were computed before.
    """
    return Described({name: _column(table[name], words.get(name)) for name in table.column_names if name != ROW_ID})


def merged(parts: Sequence[Described]) -> Described:
    """The columns of all rows; `parts`, at least one, in the order of the rows."""
    return Described({name: _merged_column([part.columns[name] for part in parts]) for name in parts[0].columns})


def rate(kept: int) -> float:
    """Which share of the kept rows makes a sample."""
    return min(1.0, SAMPLE_ROWS / max(1, kept))


def chosen(row_ids: np.ndarray, sides: np.ndarray, rate: float) -> np.ndarray:
    """Positions of the rows that belong to the sample: int64, ascending. Arguments as for `sample`."""
    if rate >= 1:
        return np.flatnonzero(sides > 0)
    return np.flatnonzero((mix(row_ids.copy()) < np.uint64(rate * 2.0**64)) & (sides > 0))


def sample(table: pa.Table, sides: np.ndarray, rate: float) -> bytes:
    """Some kept rows of a piece, the same whatever the cut into pieces: chosen by their row ids.

    Args:
        table: Typed source columns and `ROW_ID`, N rows.
        sides: int8 [N]: the side of each row (`split`); rows of side 0 are left out.
        rate: Which share of the rows is taken.

    Returns:
        Arrow IPC stream: the table's columns and `SIDE`.
    """
    positions = chosen(table[ROW_ID].combine_chunks().to_numpy(), sides, rate)
    rows = table.take(pa.array(positions)).append_column(SIDE, pa.array(sides[positions], pa.int8()))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()


def sampled(parts: Iterable[bytes]) -> pa.Table:
    """The sample of the whole data from those of its pieces, at least one, in the order of the rows."""
    return pa.concat_tables([pa.ipc.open_stream(part).read_all() for part in parts]).combine_chunks()


def _column(cells: pa.ChunkedArray, words: np.ndarray | None) -> Column:
    column = cells.combine_chunks() if isinstance(cells, pa.ChunkedArray) else cells
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    found = Column("float64" if pa.types.is_floating(kind) else str(kind), len(column), column.null_count)
    if pa.types.is_string(kind) or pa.types.is_boolean(kind):
        _look_at_names(found, column, words)
    else:
        _look_at_numbers(found, column)
    found.examples = _examples(column)
    return found


def _look_at_names(found: Column, column: pa.Array, words: np.ndarray | None) -> None:
    """Texts, or true and false: each different one is hashed and counted once."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    codes = encoded.indices.drop_null().to_numpy(zero_copy_only=False)
    counts = np.bincount(codes, minlength=len(encoded.dictionary))
    there = np.flatnonzero(counts)
    names = canonical_text(encoded.dictionary.take(pa.array(there)))
    counts = counts[there]
    if pa.types.is_string(encoded.dictionary.type):
        looks = pc.match_substring_regex(names, _DATE).to_numpy(zero_copy_only=False)
        if looks.all():  # reading dates is slower, and a column counts as one of dates only if every cell is one
            found.dates = int(counts[dates.parse(names)[1]].sum())
        if len(names) and numbers(names.slice(0, 1), ",").is_number[0] and numbers(names, ",").is_number.all():
            found.commas = int(counts.sum())
            found.has_comma = bool(pc.any(pc.match_substring(names, ",")).as_py())
    found.sketch = _smallest(text_words(names)[0] if words is None else words[0, there])
    order = np.argsort(-counts, kind="stable")[: 4 * _FREQUENT]
    texts = names.take(pa.array(order)).to_pylist()
    _keep_most_frequent(found, list(zip(texts, counts[order].tolist(), strict=True)), int(counts.sum()))
    if pa.types.is_boolean(column.type) and found.present:
        found.mean = found.frequent.get("true", 0) / found.present


def _look_at_numbers(found: Column, column: pa.Array) -> None:
    values = column.drop_null().to_numpy()
    if values.dtype == np.float64:
        values = values[~np.isnan(values)] + 0.0  # -0.0 becomes 0.0: they are equal
        found.missing = found.rows - len(values)
        finite = values[np.isfinite(values)]
        found.infinite = len(values) - len(finite)
        found.whole = bool((finite == np.trunc(finite)).all())
    else:
        finite = values
    if len(finite):
        found.minimum, found.maximum = finite.min().item(), finite.max().item()
        found.mean = float(finite.mean(dtype=np.float64))
    if values.dtype == np.int64 and len(values) and int(found.maximum or 0) - int(found.minimum or 0) < _NARROW:
        there = np.zeros(_NARROW, bool)
        there[values - values.min()] = True
        values = np.flatnonzero(there) + values.min()
    found.sketch = _smallest(mix(values.view(np.uint64).copy()))


def _smallest(hashes: np.ndarray) -> bytes:
    """The smallest different ones. Of many, only those below a bound that leaves enough as a rule are sorted."""
    if len(hashes) > 4 * _SKETCH:
        bound = np.uint64(2 * _SKETCH / len(hashes) * 2.0**64)
        found = np.unique(hashes[hashes < bound])
        if len(found) >= _SKETCH:
            return found[:_SKETCH].tobytes()
    return np.unique(hashes)[:_SKETCH].tobytes()


def _examples(column: pa.Array) -> list[str]:
    first = column.slice(0, _LOOK)
    if pa.types.is_dictionary(first.type):
        first = first.cast(first.type.value_type)
    values = pc.unique(first.drop_null()).slice(0, _EXAMPLES)
    return [text[:_LONGEST] for text in canonical_text(values).to_pylist() if text is not None]


def _merged_column(parts: list[Column]) -> Column:
    whole = Column(parts[0].type)
    if any(part.type == "float64" for part in parts):
        whole.type = "float64"
    counted, mean = 0, 0.0
    texts: dict[str, int] = {}
    for part in parts:
        whole.rows += part.rows
        whole.missing += part.missing
        whole.infinite += part.infinite
        whole.whole &= part.whole
        whole.lost += part.lost
        whole.dates += part.dates
        whole.commas += part.commas
        whole.has_comma |= part.has_comma
        count = part.present - part.infinite
        if count:
            counted += count
            mean += (part.mean - mean) * count / counted
        for text, number in part.frequent.items():
            texts[text] = texts.get(text, 0) + number
        whole.examples += [text for text in part.examples if text not in whole.examples]
    whole.mean = mean
    whole.minimum = min((part.minimum for part in parts if part.minimum is not None), default=None)
    whole.maximum = max((part.maximum for part in parts if part.maximum is not None), default=None)
    whole.examples = whole.examples[:_EXAMPLES]
    whole.sketch = np.unique(np.concatenate([np.frombuffer(part.sketch, np.uint64) for part in parts]))[
        :_SKETCH
    ].tobytes()
    _keep_most_frequent(whole, list(texts.items()), sum(texts.values()))
    return whole


def _keep_most_frequent(column: Column, texts: list[tuple[str, int]], cells: int) -> None:
    """Keep the most frequent texts, ties in code point order, and count the cells of the others as lost."""
    kept = sorted(texts, key=lambda each: (-each[1], each[0]))[:_FREQUENT]
    column.frequent = {}
    for text, count in kept:
        column.frequent[text[:_LONGEST]] = column.frequent.get(text[:_LONGEST], 0) + count
    column.lost += cells - sum(count for _, count in kept)
