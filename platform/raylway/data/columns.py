"""The type of each column, decided over the whole data: every piece says what it saw, the driver decides.

A piece holds a column in the narrowest form that loses nothing that could still matter; `Seen` says which that is.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MISSING_WORDS = ("NA", "N/A", "NaN", "nan", "null", "NULL", "None")
"""Missing in a column whose other cells are all numbers; values in a column of text."""

_NUMBER = r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?$|^[+-]?(?i:inf|infinity)$"
_WHOLE = r"^[+-]?[0-9]+$"
_LEADING_ZERO = r"^[+-]?0[0-9]"


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
    first_bad: Cell | None = None
    first_zero: Cell | None = None
    first_infinite: Cell | None = None

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

    def missing_as(self, kind: str) -> int:
        """Missing cells once the type is decided: in a column of numbers the missing words are among them."""
        return self.missing + (self.words if kind in ("int64", "float64") else 0)


_COUNTS = ("missing", "present", "words", "bad", "zeros", "beyond", "real", "infinite")
_FIRSTS = ("first_bad", "first_zero", "first_infinite")


@dataclass(frozen=True)
class Numbers:
    """N texts read as numbers; all arrays have length N."""

    floats: np.ndarray
    """float64; NaN where the text is no number."""
    integers: np.ndarray
    """int64; 0 where it is no whole number in range."""
    is_number: np.ndarray
    is_integer: np.ndarray
    is_beyond: np.ndarray
    has_leading_zero: np.ndarray
    is_canonical: bool
    """Whether every text is exactly what its whole number prints as."""


def numbers(texts: pa.Array) -> Numbers:
    """Read N texts, none missing, as numbers. Blanks around a number do not matter."""
    count = len(texts)
    no = np.zeros(count, bool)
    integers = _cast(texts, pa.int64())
    if integers is not None and pc.all(pc.equal(pc.cast(integers, pa.string()), texts)).as_py() is not False:
        values = integers.to_numpy(zero_copy_only=False)
        return Numbers(values.astype(np.float64), values, ~no, ~no, no, no, True)
    floats = _cast(texts, pa.float64())
    if floats is None:
        texts = pc.utf8_trim(texts, " \t")
        is_number = _matches(texts, _NUMBER)
        readable = pc.if_else(pa.array(is_number), texts, pa.scalar("nan", pa.string()))
        values = pc.cast(readable, pa.float64()).to_numpy(zero_copy_only=False).copy()
    else:
        values = floats.to_numpy(zero_copy_only=False).copy()
        is_number = ~np.isnan(values)
    # only few texts need the slower questions: whole values for being whole numbers, those with two digits for zeros
    is_whole = _matches_some(texts, _WHOLE, is_number & np.isfinite(values) & (values == np.trunc(values)))
    has_zero = _matches_some(
        texts, _LEADING_ZERO, is_number & (pc.binary_length(texts).to_numpy(zero_copy_only=False) > 1)
    )
    values[is_whole & (values == 0)] = 0.0  # as the integer is: -0 has one value however pieces are cut
    whole = np.zeros(count, np.int64)
    is_beyond = no.copy()
    for index in np.flatnonzero(is_whole & (np.abs(values) >= 2**53)):
        exact = int(texts[index].as_py())
        is_beyond[index] = not -(2**63) <= exact < 2**63
        whole[index] = 0 if is_beyond[index] else exact
    small = is_whole & (np.abs(values) < 2**53)
    whole[small] = values[small].astype(np.int64)
    return Numbers(values, whole, is_number, is_whole & ~is_beyond, is_beyond, has_zero, False)


def examine(texts: pa.Array, row_ids: np.ndarray, keep_text: bool, source: str = "text") -> tuple[pa.Array, Seen]:
    """Look at a column of text and store it as narrowly as it allows.

    Args:
        texts: N texts, null for an empty cell.
        row_ids: uint64 [N].
        keep_text: Whether the column is known to stay text in the end.
        source: Type in the file.

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
    read = numbers(values)
    is_word = pc.is_in(values, pa.array(MISSING_WORDS)).to_numpy(zero_copy_only=False)
    is_bad = ~read.is_number & ~is_word
    is_infinite = np.isinf(read.floats)
    seen = Seen([source], ["string"], missing=missing, present=len(texts) - missing)
    seen.words, seen.bad = _total(counts, is_word), _total(counts, is_bad)
    seen.zeros, seen.beyond = _total(counts, read.has_leading_zero), _total(counts, read.is_beyond)
    seen.real = _total(counts, read.is_number & ~read.is_integer & ~read.is_beyond)
    seen.infinite = _total(counts, is_infinite)
    seen.first_bad = _first(is_bad, values, codes, row_ids)
    seen.first_zero = _first(read.has_leading_zero, values, codes, row_ids)
    seen.first_infinite = _first(is_infinite, values, codes, row_ids)
    if keep_text or seen.bad or seen.zeros or seen.beyond or not seen.numbers:
        return encoded, seen
    seen.lossy = not read.is_canonical
    seen.stored = ["float64" if seen.real else "int64"]
    table = pa.array(read.floats if seen.real else read.integers, mask=is_word)
    return table.take(encoded.indices), seen


def as_numbers(stored: pa.Array, whole: bool) -> tuple[pa.Array, np.ndarray]:
    """A stored column of text as int64 or float64, and which of its N cells are neither number nor missing."""
    values = stored.dictionary
    read = numbers(values)
    is_word = pc.is_in(values, pa.array(MISSING_WORDS)).to_numpy(zero_copy_only=False)
    usable = read.is_integer if whole else read.is_number
    table = pa.array(read.integers if whole else read.floats, mask=~usable)
    invalid = pa.array(~usable & ~is_word).take(stored.indices)
    return table.take(stored.indices), pc.fill_null(invalid, False).to_numpy(zero_copy_only=False)


def final(stored: pa.Array, wanted: str, infinite_is_missing: bool) -> tuple[pa.Array, np.ndarray | None]:
    """A stored column in its decided type, and which cells are invalid (None if none can be).

    Args:
        stored: As `examine` or the Parquet reader left it.
        wanted: int64, float64, bool or string.
        infinite_is_missing: What an infinite number becomes.
    """
    invalid = None
    column = stored
    if pa.types.is_dictionary(stored.type):
        if wanted == "string":
            return stored.cast(pa.string()), None
        if wanted == "bool":  # of JSON
            return pc.equal(stored.cast(pa.string()), "true"), None
        column, invalid = as_numbers(stored, wanted == "int64")
    kind = {"int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_(), "string": pa.string()}[wanted]
    column = pc.cast(column, kind, safe=False)
    if wanted == "float64" and infinite_is_missing:
        column = pc.if_else(pc.is_inf(column), pa.scalar(None, pa.float64()), column)
    return column, invalid


def _cast(texts: pa.Array, kind: pa.DataType) -> pa.Array | None:
    try:
        return pc.cast(texts, kind)
    except pa.ArrowInvalid:
        return None


def _matches(texts: pa.Array, pattern: str) -> np.ndarray:
    return pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False)


def _matches_some(texts: pa.Array, pattern: str, candidates: np.ndarray) -> np.ndarray:
    found = np.zeros(len(texts), bool)
    found[candidates] = _matches(texts.filter(pa.array(candidates)), pattern)
    return found


def _total(counts: np.ndarray, of: np.ndarray) -> int:
    return int(counts[of].sum())


def _first(of: np.ndarray, values: pa.Array, codes: np.ndarray, row_ids: np.ndarray) -> Cell | None:
    if not of.any():
        return None
    index = int(np.argmax(np.append(of, False)[codes]))
    return Cell(int(row_ids[index]), values[int(codes[index])].as_py())
