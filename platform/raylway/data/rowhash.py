"""A 128-bit hash of a typed row, the same on every machine and version; equal rows, and only they, share it.

A number gives its own 8 bytes, a text both halves of its XXH3-128, a missing cell a bit of its own. Two lanes then mix
the columns one after the other, each step a bijection of 64 bits. Not made against malice.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

_LANES = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03))


def hash_rows(table: pa.Table) -> np.ndarray:
    """Hash every row over all columns, taken in the order of their names.

    Args:
        table: N rows of `features.schema.COLUMN_TYPES`.

    Returns:
        uint64 [N, 2].
    """
    lanes = [np.full(table.num_rows, lane, np.uint64) for lane in _LANES]
    absent = np.zeros(table.num_rows, np.uint64)
    for index, name in enumerate(sorted(table.column_names)):
        column = table[name].combine_chunks()
        words = _words(column)
        if column.null_count:
            missing = pc.is_null(column).to_numpy(zero_copy_only=False)
            absent |= missing.astype(np.uint64) << np.uint64(index % 64)
        for lane, step, word in zip(lanes, _LANES, words, strict=True):
            lane += step
            lane ^= word
            mix(lane)
        if index % 64 == 63:
            _add(lanes, absent)
            absent[:] = 0
    _add(lanes, absent)
    return np.stack(lanes, axis=1)


def mix(words: np.ndarray) -> np.ndarray:
    """Scramble 64-bit words in place, one to one (the finaliser of splitmix64; Steele, Lea, Flood 2014)."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def _add(lanes: list[np.ndarray], words: np.ndarray) -> None:
    for lane, step in zip(lanes, _LANES, strict=True):
        lane += step
        lane ^= words
        mix(lane)


def _words(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Both lanes' 64 bits of each value; missing is 0."""
    if pa.types.is_string(column.type):
        encoded = column.dictionary_encode()
        digests = [xxhash.xxh3_128_intdigest(text) for text in encoded.dictionary.to_pylist()]
        halves = np.array([(digest & (2**64 - 1), digest >> 64) for digest in digests] or [(0, 0)], np.uint64)
        halves = np.concatenate([halves, np.zeros((1, 2), np.uint64)])
        codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
        return halves[codes, 0], halves[codes, 1]
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    values = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
    if values.dtype == np.float64:
        values = values + 0.0  # -0.0 becomes 0.0: they are equal
    words = values.view(np.uint64)
    return words, words
