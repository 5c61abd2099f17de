"""A 128-bit hash of a typed row, the same on every machine and version; equal rows, and only they, share it.

A number gives its own 8 bytes, a text both halves of its XXH3-128, a missing cell a bit of its own. Two lanes then mix
the columns one after the other, each step a bijection of 64 bits. Not made against malice.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

_STEPS = np.array([[0x9E3779B97F4A7C15], [0xD1B54A32D192ED03]], np.uint64)
"""Of the two lanes: what keeps them apart although both see the same numbers."""


def hash_rows(table: pa.Table, known: Mapping[str, np.ndarray] = {}) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Hash every row over all columns, taken in the order of their names.

    Args:
        table: N rows of `features.schema.COLUMN_TYPES`; text may be dictionary-encoded.
        known: `text_words` of the dictionaries of such columns, where they were computed before.

    Returns:
        uint64 [N, 2]; and of each column of text the 64-bit hashes of its different values.
    """
    texts: dict[str, np.ndarray] = {}
    lanes = np.zeros((2, table.num_rows), np.uint64)
    absent = np.zeros(table.num_rows, np.uint64)
    for index, name in enumerate(sorted(table.column_names)):
        column = table[name].combine_chunks()
        if pa.types.is_string(column.type) or pa.types.is_dictionary(column.type):
            words, texts[name] = _text_words(column, known.get(name))
        else:
            words = _number_words(column)
        _add(lanes, words)
        if column.null_count:
            missing = pc.is_null(column).to_numpy(zero_copy_only=False)
            absent |= missing.astype(np.uint64) << np.uint64(index % 64)
        if index % 64 == 63:
            _add(lanes, absent)
            absent[:] = 0
    _add(lanes, absent)
    return np.ascontiguousarray(lanes.T), texts


def mix(words: np.ndarray) -> np.ndarray:
    """Scramble 64-bit words in place, one to one (the finaliser of splitmix64; Steele, Lea, Flood 2014)."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def _add(lanes: np.ndarray, words: np.ndarray) -> None:
    """Take one more word a row into both lanes: [N], or [2, N]."""
    lanes += _STEPS
    lanes ^= words
    mix(lanes)


def text_words(texts: pa.Array) -> np.ndarray:
    """uint64 [2, N]: both halves of the hash of each of N texts, none missing."""
    digests = [xxhash.xxh3_128_intdigest(text) for text in texts.cast(pa.binary()).to_pylist()]
    return np.array([(digest & (2**64 - 1), digest >> 64) for digest in digests], np.uint64).reshape(-1, 2).T


def _text_words(column: pa.Array, known: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [2, N]: the words of each text, 0 for a missing one; and the first of each different one that is there."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    words = text_words(encoded.dictionary) if known is None else known
    codes = pc.fill_null(encoded.indices, words.shape[1]).to_numpy(zero_copy_only=False)
    there = np.bincount(codes, minlength=words.shape[1] + 1)[:-1] > 0
    return np.concatenate([words, np.zeros((2, 1), np.uint64)], axis=1).take(codes, axis=1), words[0, there]


def _number_words(column: pa.Array) -> np.ndarray:
    """uint64 [N]: the 8 bytes of each number; 0 for a missing one."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    values = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
    if values.dtype == np.float64:
        values = values + 0.0  # -0.0 becomes 0.0: they are equal
    return values.view(np.uint64)
