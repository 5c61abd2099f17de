"""Parquet row groups and tables of `python://` functions, in the forms that `columns` stores."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raylway.data.columns import Cell, Seen, examine
from raylway.data.csv_text import check_columns
from raylway.data.files import Location
from raylway.errors import UserError

_PLAIN = "numbers, text, booleans, dates and times"


def footer(location: Location) -> tuple[list[str], str, list[tuple[int, int]]]:
    """The column names of a Parquet file, its schema as text, and rows and bytes of each row group.

    Raises:
        UserError: It is no Parquet file, or a column has no name of its own.
    """
    try:
        metadata = pq.read_metadata(location.path)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(location, error) from None
    schema = metadata.schema.to_arrow_schema()
    check_columns(schema.names, location.name)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return (
        schema.names,
        schema.remove_metadata().to_string(),
        [(group.num_rows, group.total_byte_size) for group in groups],
    )


def read_group(location: Location, group: int, columns: list[str]) -> pa.Table:
    """One row group, columns in the given order."""
    try:
        with pq.ParquetFile(location.path) as file:
            there = [name for name in columns if name in file.schema_arrow.names]
            return _completed(file.read_row_group(group, columns=there, use_threads=False), columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(location, error) from None


def read_some(location: Location, group: int, columns: list[str], rows: int) -> pa.Table:
    """The first rows of a row group."""
    try:
        with pq.ParquetFile(location.path) as file:
            schema = file.schema_arrow
            there = [name for name in columns if name in schema.names]
            batch = next(file.iter_batches(rows, [group], there, use_threads=False), None)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(location, error) from None
    return _completed(pa.Table.from_batches([batch]) if batch is not None else schema.empty_table(), columns)


def _completed(table: pa.Table, columns: list[str]) -> pa.Table:
    """The table with these columns in this order; one that its file lacks is missing in every row."""
    for name in columns:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows))
    return table.select(columns)


def stored(
    column: pa.ChunkedArray, name: str, row_ids: np.ndarray, as_numbers: bool, where: str
) -> tuple[pa.Array, Seen]:
    """A typed column in a stored form: NaN and empty text are missing, dates and times are ISO 8601 text.

    Args:
        column: N values of any flat type.
        name: Of the column, for messages.
        row_ids: uint64 [N].
        as_numbers: Whether text is to be read as numbers.
        where: The file, for messages.

    Raises:
        UserError: The type is not flat.
    """
    source = _type_name(column.type)
    array = _plain(column, name, where)
    if pa.types.is_null(array.type) or array.null_count == len(array):
        return pa.nulls(len(array)), Seen([source], ["null"], missing=len(array))
    if pa.types.is_uint64(array.type):
        fits = pc.max(array).as_py() < 2**63
        array = array.cast(pa.int64() if fits else pa.string())
        if not fits:
            return examine(array, row_ids, keep_text=True, source=source)
    if pa.types.is_string(array.type):
        array = pc.if_else(pc.equal(array, ""), pa.scalar(None, pa.string()), array)
        if as_numbers:
            return examine(array, row_ids, keep_text=False, source=source)
        array = array.dictionary_encode()
    elif pa.types.is_integer(array.type):
        array = array.cast(pa.int64())
    elif pa.types.is_floating(array.type):
        array = array.cast(pa.float64())
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, pa.float64()), array)
    missing = array.null_count
    form = (
        "string" if pa.types.is_dictionary(array.type) else {"double": "float64"}.get(str(array.type), str(array.type))
    )
    seen = Seen([source], [form], missing=missing, present=len(array) - missing)
    if form == "float64":
        seen.real = seen.present
        infinite = pc.fill_null(pc.is_inf(array), False).to_numpy(zero_copy_only=False)
        seen.infinite = int(infinite.sum())
        if seen.infinite:
            index = int(np.argmax(infinite))
            seen.first_infinite = Cell(int(row_ids[index]), str(array[index].as_py()))
    return array, seen


def _plain(column: pa.ChunkedArray, name: str, where: str) -> pa.Array:
    """One array without dictionary, of null, bool, an integer or real type, or text."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.cast(kind.value_type)
        kind = array.type
    flat = (
        pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)
    )
    if flat:
        return array
    if pa.types.is_decimal(kind):
        return array.cast(pa.float64())
    if pa.types.is_large_string(kind) or pa.types.is_string(kind) or str(kind) == "string_view":
        return array.cast(pa.string())
    if pa.types.is_date(kind):
        return array.cast(pa.date32()).cast(pa.string())
    if pa.types.is_time(kind) or pa.types.is_timestamp(kind):
        return _iso(array.cast(pa.string()))
    raise UserError(
        f"the column {name!r} has a type that is not read",
        where=where,
        expected=_PLAIN,
        found=_type_name(kind),
        fix="leave the column out of the file, or spread it over plain columns",
    )


def _iso(texts: pa.Array) -> pa.Array:
    """`2013-01-01 05:00:00.500000` as `2013-01-01T05:00:00.5`: the same instant has one text in every unit."""
    texts = pc.replace_substring(texts, " ", "T", max_replacements=1)
    texts = pc.replace_substring_regex(texts, r"(\.[0-9]*?)0+($|[Z+-])", r"\1\2")
    return pc.replace_substring_regex(texts, r"\.($|[Z+-])", r"\1")


def _type_name(kind: pa.DataType) -> str:
    return _type_name(kind.value_type) if pa.types.is_dictionary(kind) else str(kind)


def _damaged(location: Location, error: Exception) -> UserError:
    return UserError(
        "the file is not a whole Parquet file",
        where=location.name,
        found=str(error).splitlines()[0],
        fix="write it again, or take it out of the source",
    )
