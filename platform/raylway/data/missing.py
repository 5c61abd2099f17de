"""Cells that the job says are missing (`data.read.missing`), as nulls before anything else looks at them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.features.texts import Decimal, MissingCells


def without(cells: pa.Array, words: MissingCells, decimal: Decimal = ".") -> pa.Array:
    """A column of any type without the cells that are missing; of types that are neither text nor numbers all stay."""
    if pa.types.is_dictionary(cells.type):
        cells = cells.cast(cells.type.value_type)
    kind = cells.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _nulled(cells, words.in_numbers(cells.fill_null(0).to_numpy(zero_copy_only=False)))
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view"
    if is_text or pa.types.is_decimal(kind):
        encoded = cells.cast(pa.string()).dictionary_encode()
        return _nulled(cells, _taken(words.in_texts(encoded.dictionary, decimal), encoded))
    return cells


def without_marked(cells: pa.Array, words: MissingCells) -> pa.Array:
    """As `without`, of cells that say by their first letter what they were in JSON (`lines_read`)."""
    encoded = cells.dictionary_encode()
    return _nulled(cells, _taken(words.in_texts(pc.utf8_slice_codeunits(encoded.dictionary, 1, None)), encoded))


def _taken(of_values: np.ndarray, encoded: pa.DictionaryArray) -> np.ndarray:
    codes = pc.fill_null(encoded.indices, len(of_values)).to_numpy(zero_copy_only=False)
    return np.append(of_values, False)[codes]


def _nulled(cells: pa.Array, mask: np.ndarray) -> pa.Array:
    return pc.if_else(pa.array(mask), pa.scalar(None, cells.type), cells) if mask.any() else cells
