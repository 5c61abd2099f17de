"""Parquet row groups, Arrow batches and tables of `python://` functions, in the forms that `columns` stores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raylway.data import packed
from raylway.data.columns import Cell, Seen, examine, look_for_dates
from raylway.data.csv_text import check_columns
from raylway.data.location import Location
from raylway.errors import UserError

_PLAIN = "numbers, text, booleans, dates and times"
_ARROW_MAGIC = b"ARROW1"


class Footer(msgspec.Struct, frozen=True):
    """What a Parquet or Arrow file says of itself."""

    types: dict[str, str]
    """Of its columns, structs flattened, in order."""
    kinds: dict[str, str]
    """number, boolean, text or nothing; empty for a type that is not read."""
    groups: list[tuple[int, int]]
    """Rows and bytes of each row group or record batch; of an Arrow stream one group of unknown rows."""

    @property
    def schema(self) -> str:
        return ", ".join(f"{name}: {kind}" for name, kind in self.types.items())


def footer(location: Location) -> Footer:
    """Columns and groups of a Parquet or Arrow file.

    Raises:
        UserError: It is no such file, or a column has no name of its own.
    """
    with _whole(location):
        if location.format == "arrow":
            with _ipc(location) as (reader, rows):
                schema = reader.schema
                share = location.size // max(1, len(rows))
                groups = [(count, share) for count in rows] or [(0, location.size)]
        else:
            with _parquet(location) as file:
                schema = file.schema_arrow
                found = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
                groups = [(group.num_rows, group.total_byte_size) for group in found]
    fields = flat(schema.empty_table()).schema
    check_columns(fields.names, location.name)
    return Footer(
        {field.name: _type_name(field.type) for field in fields},
        {field.name: kind_of(field.type) for field in fields},
        groups,
    )


def read_group(location: Location, group: int, columns: list[str]) -> Iterator[pa.Table]:
    """One row group, columns in the given order, those that the file lacks null; of an Arrow stream batch by batch."""
    with _whole(location):
        if location.format == "arrow":
            with _ipc(location) as (reader, rows):
                batches = [reader.get_batch(group)] if rows else reader
                for batch in batches:
                    yield _selected(pa.Table.from_batches([batch]), columns)
            return
        with _parquet(location) as file:
            yield _selected(file.read_row_group(group, columns=_top(file, columns), use_threads=False), columns)


def read_some(location: Location, group: int, columns: list[str], rows: int) -> pa.Table:
    """The first rows of a group."""
    if location.format == "arrow":
        return next(read_group(location, group, columns), pa.table({name: pa.nulls(0) for name in columns})).slice(
            0, rows
        )
    with _whole(location), _parquet(location) as file:
        batch = next(file.iter_batches(rows, [group], _top(file, columns), use_threads=False), None)
        table = pa.Table.from_batches([batch]) if batch is not None else file.schema_arrow.empty_table()
    return _selected(table, columns)


def flat(table: pa.Table) -> pa.Table:
    """The table with structs spread over columns `struct.field`."""
    while any(pa.types.is_struct(kind) for kind in table.schema.types):
        table = table.flatten()
    return table


def kind_of(kind: pa.DataType) -> str:
    """number, boolean, text or nothing; empty for a type that is not read. Dates and times are text."""
    if pa.types.is_dictionary(kind):
        return kind_of(kind.value_type)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_null(kind):
        return "nothing"
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view"
    return "text" if text or pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_timestamp(kind) else ""


def not_read(name: str, kind: str, where: str) -> UserError:
    """A column's type is none that can feed a model."""
    return UserError(
        f"the column {name!r} has a type that is not read",
        where=where,
        expected=_PLAIN,
        found=kind,
        fix="list it under features.drop, leave it out of the file, or spread it over plain columns",
    )


def as_text(table: pa.Table) -> pa.Table:
    """The table with its lists and other columns that are not read as JSON text: the job drops them, but they still
    tell rows apart."""
    for index, field in enumerate(table.schema):
        if not kind_of(field.type):
            cells = [
                None if cell is None else json.dumps(cell, ensure_ascii=False, default=str)
                for cell in table.column(index).to_pylist()
            ]
            table = table.set_column(index, field.name, pa.array(cells, pa.string()))
    return table


def _selected(table: pa.Table, columns: list[str]) -> pa.Table:
    table = as_text(flat(table).select([name for name in columns if name in set(flat(table).column_names)]))
    lacking = {name: pa.nulls(table.num_rows) for name in columns if name not in set(table.column_names)}
    if not table.num_columns:
        return pa.table(lacking)
    for name, nulls in lacking.items():
        table = table.append_column(name, nulls)
    return table.select(columns)


def _top(file: pq.ParquetFile, columns: list[str]) -> list[str]:
    """The columns of the file that hold the wanted ones."""
    names = file.schema_arrow.names
    return [name for name in names if any(column == name or column.startswith(f"{name}.") for column in columns)]


@contextmanager
def _parquet(location: Location) -> Iterator[pq.ParquetFile]:
    with ExitStack() as stack:
        source = stack.enter_context(packed.opened(location)) if location.is_remote else location.path
        yield stack.enter_context(pq.ParquetFile(source, pre_buffer=location.is_remote))


@contextmanager
def _ipc(location: Location) -> Iterator[tuple[Any, list[int]]]:
    """An Arrow file's reader and the rows of its batches; of a stream or remote file no rows: it is read in turn."""
    with ExitStack() as stack:
        source: Any
        if location.is_remote:
            source = pa.PythonFile(stack.enter_context(packed.opened(location)), mode="r")
        else:
            source = stack.enter_context(pa.memory_map(location.path))
        magic = source.read(6)
        source.seek(0)
        if magic != _ARROW_MAGIC:
            yield stack.enter_context(pa.ipc.open_stream(source)), []
            return
        reader = stack.enter_context(pa.ipc.open_file(source))
        if location.is_remote:
            yield _Batches(reader), []
        else:
            yield reader, [reader.get_batch(index).num_rows for index in range(reader.num_record_batches)]


class _Batches:
    """The batches of an Arrow file in turn."""

    def __init__(self, reader: Any) -> None:
        self._reader, self.schema = reader, reader.schema

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return (self._reader.get_batch(index) for index in range(self._reader.num_record_batches))


@contextmanager
def _whole(location: Location) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise _damaged(location, error) from None


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
    if pa.types.is_decimal(array.type):
        return examine(array.cast(pa.string()), row_ids, keep_text=False, source=source)
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
    if form == "string":
        look_for_dates(seen, array, row_ids)
    if form == "float64":
        seen.real = seen.present
        infinite = pc.fill_null(pc.is_inf(array), False).to_numpy(zero_copy_only=False)
        seen.infinite = int(infinite.sum())
        if seen.infinite:
            index = int(np.argmax(infinite))
            seen.first_infinite = Cell(int(row_ids[index]), str(array[index].as_py()))
    return array, seen


def _plain(column: pa.ChunkedArray, name: str, where: str) -> pa.Array:
    """One array without dictionary, of null, bool, an integer, real or decimal type, or text."""
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
    if flat or pa.types.is_decimal(kind):
        return array
    if pa.types.is_large_string(kind) or pa.types.is_string(kind) or str(kind) == "string_view":
        return array.cast(pa.string())
    if pa.types.is_date(kind):
        return array.cast(pa.date32()).cast(pa.string())
    if pa.types.is_timestamp(kind) and kind.tz:
        array = array.cast(pa.timestamp(kind.unit, "UTC"))  # one instant has one text whatever its zone
    if pa.types.is_time(kind) or pa.types.is_timestamp(kind):
        return _iso(array.cast(pa.string()))
    raise not_read(name, _type_name(kind), where)


def _iso(texts: pa.Array) -> pa.Array:
    """`2013-01-01 05:00:00.500000` as `2013-01-01T05:00:00.5`: the same instant has one text in every unit and zone."""
    texts = pc.replace_substring(texts, " ", "T", max_replacements=1)
    texts = pc.replace_substring_regex(texts, r"(\.[0-9]*?)0+($|[Z+-])", r"\1\2")
    return pc.replace_substring_regex(texts, r"\.($|[Z+-])", r"\1")


def _type_name(kind: pa.DataType) -> str:
    return _type_name(kind.value_type) if pa.types.is_dictionary(kind) else str(kind)


def _damaged(location: Location, error: Exception) -> UserError:
    return UserError(
        f"the file is not a whole {'Arrow' if location.format == 'arrow' else 'Parquet'} file",
        where=location.name,
        found=(str(error) or type(error).__name__).splitlines()[0],
        fix="write it again, or take it out of the source",
    )
