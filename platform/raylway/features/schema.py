"""The few column types of Raylway, and the one way in which a value becomes a number or the name of a category.

Preparation, evaluation and serving all call these two functions, so a store `1`, `"1"` and `1.0` is one category
everywhere.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

COLUMN_TYPES = (pa.int64(), pa.float64(), pa.bool_(), pa.string())
"""Every column of a typed table has one of these types."""


def canonical_text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The name of each value as a category: whole numbers without a fraction, booleans as `true` and `false`.

    Args:
        column: N values of one of `COLUMN_TYPES`, or a null column.

    Returns:
        N strings; missing stays missing.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_floating(column.type):
        values = column.to_numpy(zero_copy_only=False)
        whole = np.isfinite(values) & (values == np.trunc(values)) & (np.abs(values) < 2**63)
        integers = pc.cast(pa.array(np.where(whole, values, 0).astype(np.int64)), pa.string())
        texts = pa.array([None if np.isnan(value) else repr(float(value)) for value in values[~whole]], pa.string())
        return pc.replace_with_mask(integers, pa.array(~whole), texts)
    return pc.cast(column, pa.string())


def as_float64(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """N values as float64; missing is NaN. Booleans are 0 and 1."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_boolean(column.type):
        column = pc.cast(column, pa.int8())
    return pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def sorted_names(names: set[str]) -> list[str]:
    """Names in a stable order: by value when all are finite numbers, else by code point."""
    try:
        values = {name: float(name) for name in names}
    except ValueError:
        return sorted(names)
    if not all(np.isfinite(value) for value in values.values()):
        return sorted(names)
    return sorted(names, key=lambda name: (values[name], name))
