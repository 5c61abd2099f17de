"""The cells of regular CSV text by Arrow's parser: as bytes, or as numbers where nothing is lost by it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from raylway.data.columns import MISSING_WORDS
from raylway.data.csv_text import Heading

Direct = dict[str, str]
"""Columns to read as numbers at once, each int64 or float64."""


def numbers(body: bytes, head: Heading, multiline: bool, direct: Direct) -> pa.Table | None:
    """The cells with the columns in `direct` as numbers; None if one of them holds anything else."""
    if _has_odd_zero(body, head.delimiter):
        return None
    try:
        table = columns(body, head, multiline, direct)
    except pa.ArrowInvalid:
        return None
    for name, kind in direct.items():
        column = table[name]
        finite = kind == "int64" or pc.all(pc.is_finite(column)).as_py() is not False
        if not finite or column.null_count == len(column):
            return None
    return table


def _has_odd_zero(body: bytes, delimiter: str) -> bool:
    """Whether a cell begins like 007 or 0x7, which Arrow would read as a number; a sign, a quote or blanks may precede
    it. Finds a few more, which costs time only."""
    text = np.frombuffer(b"".join([b"\n\n", body, b"\n"]), np.uint8)
    zero, following, before, first = text[2:-1] == ord("0"), text[3:], text[1:-2], text[:-3]
    odd = zero & ((following - np.uint8(ord("0")) < 10) | (following | np.uint8(32) == ord("x")))
    begins = _begins_cell(before, delimiter)
    signed = ((before == ord("-")) | (before == ord("+"))) & _begins_cell(first, delimiter)
    return bool((odd & (begins | signed)).any())


def _begins_cell(before: np.ndarray, delimiter: str) -> np.ndarray:
    found = before == ord(delimiter)
    for other in b'\n\r" \t':
        found |= before == other
    return found


def columns(body: bytes, head: Heading, multiline: bool, direct: Direct) -> pa.Table:
    """Every cell as bytes, those in `direct` as numbers. One block, so that no cell straddles two and no type changes
    on the way."""
    kinds = {"int64": pa.int64(), "float64": pa.float64()}
    table = _read(body, head, multiline, {name: kinds[kind] for name, kind in direct.items()})
    if not direct:
        return table
    columns = [
        column if name in direct else _without_empty(column) for name, column in zip(head.columns, table, strict=True)
    ]
    return pa.table(columns, head.columns)


def _without_empty(column: pa.ChunkedArray) -> pa.Array:
    """Cells of bytes, the empty ones null; nothing is copied but the mask."""
    cells = column.combine_chunks()
    _, offsets, content = cells.buffers()
    filled = np.diff(np.frombuffer(offsets, np.int32, len(cells) + 1, 4 * cells.offset)) > 0
    if filled.all():
        return cells
    mask = pa.py_buffer(np.packbits(filled, bitorder="little"))
    return pa.Array.from_buffers(pa.binary(), len(cells), [mask, offsets, content], offset=0)


def _read(body: bytes, head: Heading, multiline: bool, numbers: dict[str, pa.DataType]) -> pa.Table:
    return pa_csv.read_csv(
        pa.BufferReader(body),
        pa_csv.ReadOptions(column_names=head.columns, block_size=len(body) + 1, use_threads=False),
        pa_csv.ParseOptions(delimiter=head.delimiter, newlines_in_values=multiline),
        pa_csv.ConvertOptions(
            column_types=dict.fromkeys(head.columns, pa.binary()) | numbers,
            null_values=["", *MISSING_WORDS] if numbers else [""],
            # text columns keep their missing words, so their empty cells are found in another way then
            strings_can_be_null=not numbers,
            quoted_strings_can_be_null=True,
        ),
    )
