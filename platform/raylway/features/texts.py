"""What a text says: a number, true or false, a category, or that there is nothing.

The one reading for files, whichever step reads them, and for requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.features.schema import canonical_text

Values = Literal["text", "number", "boolean"]
"""What a column holds, once that is decided."""
Decimal = Literal[".", ","]
MISSING_WORDS = ("NA", "N/A", "NaN", "nan", "null", "NULL", "None")
"""Missing in a column whose other cells are all numbers, all true and false or all dates; in text they are values."""

_BLANKS = " \t"
_NUMBER = r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?$|^[+-]?(?i:inf|infinity)$"
_WHOLE = r"^[+-]?[0-9]+$"
_LEADING_ZERO = r"^[+-]?0[0-9]"
_COMMA = r"^[+-]?[0-9]*,[0-9]+(?:[eE][+-]?[0-9]+)?$"
_TRUTHS = pa.array(["true", "false"])
_NOTHING = pa.array(["", *MISSING_WORDS])


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


def numbers(texts: pa.Array, decimal: Decimal = ".") -> Numbers:
    """Read N texts, none missing, as numbers. Blanks around a number do not matter.

    Args:
        texts: N texts.
        decimal: What stands before the fraction. With a comma, a text with a point is no number.
    """
    count = len(texts)
    if decimal == ",":
        pointed = pc.match_substring(texts, ".")
        texts = pc.if_else(pointed, "", pc.replace_substring(texts, ",", "."))
    no = np.zeros(count, bool)
    integers = _cast(texts, pa.int64())
    if integers is not None and pc.all(pc.equal(pc.cast(integers, pa.string()), texts)).as_py() is not False:
        values = integers.to_numpy(zero_copy_only=False)
        return Numbers(values.astype(np.float64), values, ~no, ~no, no, no, True)
    floats = _cast(texts, pa.float64())
    if floats is None:
        texts = pc.utf8_trim(texts, _BLANKS)
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


def missing_words(texts: pa.Array) -> np.ndarray:
    """Which of N texts, none missing, say that there is nothing: bool [N]. Blanks alone do."""
    return pc.is_in(pc.utf8_trim(texts, _BLANKS), _NOTHING).to_numpy(zero_copy_only=False)


class MissingCells:
    """Further cells that are missing (`data.read.missing`): these texts, and these numbers however they are written.

    Args:
        words: Texts; those that are numbers, with a point, count as numbers too.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = pa.array(words, pa.string())
        read = numbers(self.words)
        self._whole, self._real = read.integers[read.is_integer], read.floats[read.is_number]

    def __bool__(self) -> bool:
        return len(self.words) > 0

    def in_texts(self, texts: pa.Array, decimal: Decimal = ".") -> np.ndarray:
        """Which of N texts, none missing, are such cells: bool [N]. `007` is no number here."""
        found = pc.is_in(pc.utf8_trim(texts, _BLANKS), self.words).to_numpy(zero_copy_only=False)
        if not len(self._real) or not len(texts):
            return found
        read = numbers(texts, decimal)
        same = np.where(read.is_integer, np.isin(read.integers, self._whole), np.isin(read.floats, self._real))
        return found | (same & read.is_number & ~read.has_leading_zero)

    def in_numbers(self, values: np.ndarray) -> np.ndarray:
        """Which of N whole or real numbers are such cells: bool [N]."""
        return np.isin(values, self._whole if values.dtype.kind in "iu" else self._real)


def truths(texts: pa.Array) -> np.ndarray:
    """Which of N texts, none missing, are `true` or `false` in any case: bool [N]."""
    return pc.is_in(_lowered(texts), _TRUTHS).to_numpy(zero_copy_only=False)


def as_truths(texts: pa.Array) -> pa.Array:
    """N texts as booleans; what is neither `true` nor `false` is null."""
    lowered = _lowered(texts)
    known = pc.is_in(lowered, _TRUTHS)
    return pc.if_else(known, pc.equal(lowered, "true"), pa.scalar(None, pa.bool_()))


def with_commas(texts: pa.Array) -> np.ndarray:
    """Which of N texts, none missing, would be numbers if a comma were their decimal sign: bool [N]."""
    return _matches(pc.utf8_trim(texts, _BLANKS), _COMMA)


def category_names(texts: pa.Array, values: Values, decimal: Decimal = ".") -> pa.Array:
    """The names of the categories that N texts mean in a column of such values; null for none.

    In a column of text a text is its own name. In one of numbers `1`, `1.0` and ` 1` have one name and a missing word
    has none, in one of booleans `True` and `true` likewise; a text that is no such value names itself, and training
    knows no such category.
    """
    if values == "text":
        return texts
    present = pc.fill_null(texts, "")
    if values == "boolean":
        names = canonical_text(as_truths(present))
        is_named = names.is_valid()
    else:
        read = numbers(present, decimal)
        whole, real = canonical_text(pa.array(read.integers)), canonical_text(pa.array(read.floats))
        names = pc.if_else(pa.array(read.is_integer), whole, real)
        is_named = pa.array(read.is_number)
    is_nothing = pa.array(missing_words(present))
    return pc.if_else(is_named, names, pc.if_else(is_nothing, pa.scalar(None, pa.string()), texts))


def _lowered(texts: pa.Array) -> pa.Array:
    return pc.ascii_lower(pc.utf8_trim(texts, _BLANKS))


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
