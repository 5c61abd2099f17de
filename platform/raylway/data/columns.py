"""The type of each column, decided over the whole data: every piece says what it saw, the driver decides.

A piece holds a column in the narrowest form that loses nothing that could still matter; `Seen` says which that is.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.features import dates
from raylway.features.texts import Decimal, as_truths, missing_words, numbers, truths

_MANY = 64
"""A column of more different texts than these is none of true and false (in all their spellings)."""

_EARLY = 50
"""So many different texts of a piece are looked at before its dates are."""
_LIKE_DATE = r"^[ \t]*[0-9]{4}-[0-9]{2}-[0-9]{2}"


class Cell(msgspec.Struct, frozen=True):
    """One cell as an example for a message."""

    row_id: int
    text: str


class Seen(msgspec.Struct):
    """What a piece found in one column; merges into what the whole data holds.

    Counts are of cells. `present` are those that are neither empty nor missing otherwise; the missing words count as
    `words` and as `present`.
    """

    sources: list[str]
    """The types that the column had in its files; `text` for CSV."""
    stored: list[str]
    """The forms that pieces hold it in: int64, float64, bool, string, or null for nothing but missing cells."""
    lossy: bool = False
    """Whether the stored form has lost the text of a cell (`1.50`, a missing word)."""
    missing: int = 0
    present: int = 0
    words: int = 0
    bad: int = 0
    """Neither number nor missing word."""
    zeros: int = 0
    """Numbers with a leading zero, such as 007."""
    beyond: int = 0
    """Whole numbers that int64 can't hold."""
    real: int = 0
    """Numbers that are not written as whole ones."""
    infinite: int = 0
    truths: int = 0
    """Texts that are true or false (`features.texts.truths`), all of them bad as numbers; in a piece of many different
    texts they are not counted."""
    dates: int = 0
    """Texts that are dates (`features.dates`)."""
    first_bad: Cell | None = None
    first_zero: Cell | None = None
    first_infinite: Cell | None = None
    first_no_date: Cell | None = None
    """Neither date nor missing word, in a piece with dates."""

    def merged(self, other: Seen) -> Seen:
        """These rows followed by the other's."""
        return Seen(
            sorted({*self.sources, *other.sources}),
            sorted({*self.stored, *other.stored}),
            self.lossy or other.lossy,
            *(getattr(self, name) + getattr(other, name) for name in _COUNTS),
            *(getattr(self, name) or getattr(other, name) for name in _FIRSTS),
        )

    @property
    def numbers(self) -> int:
        return self.present - self.words - self.bad

    @property
    def is_truth(self) -> bool:
        """Whether it holds true and false, and nothing else but missing words."""
        return 0 < self.truths == self.present - self.words


_COUNTS = ("missing", "present", "words", "bad", "zeros", "beyond", "real", "infinite", "truths", "dates")
_FIRSTS = ("first_bad", "first_zero", "first_infinite", "first_no_date")


def examine(
    texts: pa.Array, row_ids: np.ndarray, keep_text: bool, source: str = "text", decimal: Decimal = "."
) -> tuple[pa.Array, Seen]:
    """Look at a column of text and store it as narrowly as it allows.

    Args:
        texts: N texts, null for an empty cell.
        row_ids: uint64 [N].
        keep_text: Whether the column is known to stay text in the end.
        source: Type in the file.
        decimal: The decimal sign of its numbers.

    Returns:
        The stored form (text is dictionary-encoded), and what was seen.
    """
    encoded = texts if pa.types.is_dictionary(texts.type) else texts.dictionary_encode()
    values = encoded.dictionary
    codes = pc.fill_null(encoded.indices, len(values)).to_numpy(zero_copy_only=False)
    counts = np.bincount(codes, minlength=len(values) + 1)
    missing, counts = int(counts[-1]), counts[:-1]
    if not len(values):
        return pa.nulls(len(texts)), Seen([source], ["null"], missing=missing)
    read = numbers(values, decimal)
    is_word = missing_words(values)
    is_bad = ~read.is_number & ~is_word
    is_infinite = np.isinf(read.floats)
    seen = Seen([source], ["string"], missing=missing, present=len(texts) - missing)
    seen.words, seen.bad = _total(counts, is_word), _total(counts, is_bad)
    seen.zeros, seen.beyond = _total(counts, read.has_leading_zero), _total(counts, read.is_beyond)
    seen.real = _total(counts, read.is_number & ~read.is_integer & ~read.is_beyond)
    seen.infinite = _total(counts, is_infinite)
    if seen.bad and len(values) <= _MANY:
        seen.truths = _total(counts, truths(values))
    if seen.bad:
        look_for_dates(seen, encoded, row_ids)
    seen.first_bad = _first(is_bad, values, codes, row_ids)
    seen.first_zero = _first(read.has_leading_zero, values, codes, row_ids)
    seen.first_infinite = _first(is_infinite, values, codes, row_ids)
    if keep_text or seen.bad or seen.zeros or seen.beyond or not seen.numbers:
        return encoded, seen
    seen.lossy = not read.is_canonical
    seen.stored = ["float64" if seen.real else "int64"]
    table = pa.array(read.floats if seen.real else read.integers, mask=is_word)
    return table.take(encoded.indices), seen


def look_for_dates(seen: Seen, encoded: pa.DictionaryArray, row_ids: np.ndarray) -> None:
    """Count a column's dates and its missing words. Reading dates is slow, so some early text must look like one."""
    values = encoded.dictionary
    if not pc.any(pc.match_substring_regex(values.slice(0, _EARLY), _LIKE_DATE)).as_py():
        return
    codes = pc.fill_null(encoded.indices, len(values)).to_numpy(zero_copy_only=False)
    counts = np.bincount(codes, minlength=len(values) + 1)[:-1]
    is_date, is_word = dates.parse(values)[1], missing_words(values)
    seen.dates, seen.words = _total(counts, is_date), _total(counts, is_word)
    seen.first_no_date = _first(~is_date & ~is_word, values, codes, row_ids)


def as_numbers(stored: pa.Array, whole: bool, decimal: Decimal = ".") -> tuple[pa.Array, np.ndarray]:
    """A stored column of text as int64 or float64, and which of its N cells are neither number nor missing."""
    values = stored.dictionary
    read = numbers(values, decimal)
    is_word = missing_words(values)
    usable = read.is_integer if whole else read.is_number
    table = pa.array(read.integers if whole else read.floats, mask=~usable)
    invalid = pa.array(~usable & ~is_word).take(stored.indices)
    return table.take(stored.indices), pc.fill_null(invalid, False).to_numpy(zero_copy_only=False)


def final(
    stored: pa.Array, wanted: str, infinite_is_missing: bool, decimal: Decimal = "."
) -> tuple[pa.Array, np.ndarray | None]:
    """A stored column in its decided type, and which cells are invalid (None if none can be).

    Args:
        stored: As `examine` or the Parquet reader left it.
        wanted: int64, float64, bool or string.
        infinite_is_missing: What an infinite number becomes.
        decimal: The decimal sign of numbers in it.
    """
    invalid = None
    column = stored
    if pa.types.is_dictionary(stored.type):
        if wanted == "string":
            return stored.cast(pa.string()), None
        if wanted == "bool":
            return as_truths(stored.dictionary).take(stored.indices), None
        column, invalid = as_numbers(stored, wanted == "int64", decimal)
    kind = {"int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_(), "string": pa.string()}[wanted]
    column = pc.cast(column, kind, safe=False)
    if wanted == "float64" and infinite_is_missing:
        column = pc.if_else(pc.is_inf(column), pa.scalar(None, pa.float64()), column)
    return column, invalid


def _total(counts: np.ndarray, of: np.ndarray) -> int:
    return int(counts[of].sum())


def _first(of: np.ndarray, values: pa.Array, codes: np.ndarray, row_ids: np.ndarray) -> Cell | None:
    if not of.any():
        return None
    index = int(np.argmax(np.append(of, False)[codes]))
    return Cell(int(row_ids[index]), values[int(codes[index])].as_py())
