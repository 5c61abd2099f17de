"""Read items: what one task reads, cut by file sizes and constants only, and the pieces that come out of them.

A piece is some tens of thousands of consecutive rows as an Arrow table in stored form (`columns`), with what was seen
in it. Pieces are the unit of every later pass, and the same whatever the number of CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import pyarrow as pa

from raylway.data import arrow_read, columns, csv_read
from raylway.data.columns import Seen
from raylway.data.csv_read import Parsed, Reject
from raylway.data.csv_text import Heading, Scan
from raylway.data.files import Location
from raylway.features.prepared import LINE_BITS

ROW_ID = ""
"""Column of a piece's table that holds the row ids (uint64); no source column can have this name."""


class Stream(msgspec.Struct, frozen=True, tag=True):
    """A whole CSV file."""

    file: int
    location: Location
    heading: Heading
    size: int


class Range(msgspec.Struct, frozen=True, tag=True):
    """A byte range of a plain CSV file whose quotes are regular."""

    file: int
    location: Location
    heading: Heading
    start: int
    end: int
    in_quotes: bool
    line: int

    @property
    def path(self) -> str:
        return self.location.path

    @property
    def size(self) -> int:
        return self.end - self.start


class Group(msgspec.Struct, frozen=True, tag=True):
    """A row group of a Parquet file."""

    file: int
    location: Location
    group: int
    first_row: int
    rows: int
    size: int
    schema: str
    """Groups of one piece must have the same."""


class Slice(msgspec.Struct, frozen=True, tag=True):
    """Some rows that a `python://` function returned."""

    file: int
    location: Location
    first_row: int
    table: bytes
    """Arrow IPC stream."""

    @property
    def size(self) -> int:
        return len(self.table)


Part = Stream | Range | Group | Slice


class Item(msgspec.Struct, frozen=True):
    index: int
    parts: list[Part]


class Reading(msgspec.Struct, frozen=True):
    """How items are read."""

    columns: list[str]
    """All columns of the source, in its order."""
    numeric: list[str]
    """Columns that the job declares as numbers."""
    piece_bytes: int
    """About so much text makes a piece (`csv_read.RANGE_BYTES`)."""
    as_text: list[str] = []
    """Columns that are known to be text."""
    direct: dict[str, str] = {}
    """Columns that are expected to hold numbers, used for ranges of large CSV files (`csv_read.parse`)."""
    worded: list[str] = []
    """Those among them in which missing words are expected."""


class Facts(msgspec.Struct, frozen=True):
    """What a piece says of itself."""

    item: int
    number: int
    """Within the item."""
    rows: int
    seen: dict[str, Seen]
    rejects: list[Reject]
    read: int
    """Rows read, rejects among them."""


@dataclass(frozen=True)
class Piece:
    table: pa.Table
    """Stored columns and `ROW_ID`."""
    facts: Facts


def grouped(parts: list[Part], piece_bytes: int) -> list[Item]:
    """Consecutive parts together as long as they are small and of one schema: many little files make few pieces."""
    items: list[list[Part]] = []
    size = 0
    for part in parts:
        fits = items and size + part.size <= piece_bytes and _schema(items[-1][-1]) == _schema(part)
        if not fits:
            items.append([])
            size = 0
        items[-1].append(part)
        size += part.size
    return [Item(index, parts) for index, parts in enumerate(items)]


def ranges(stream: Stream, piece_bytes: int) -> list[tuple[int, int]]:
    """Where a plain CSV file is cut: from byte, to byte."""
    first = stream.heading.offset
    return [(start, min(start + piece_bytes, stream.size)) for start in range(first, stream.size, piece_bytes)]


def scan(part: Range) -> Scan:
    """Look at a byte range without knowing what precedes it."""
    return csv_read.scan_range(part.location.path, part.start, part.end, part.heading)


def placed(scanned: list[tuple[Range, Scan]]) -> list[Part]:
    """One file's ranges with the line and the state that each begins in; nothing if its quotes are irregular."""
    result: list[Part] = []
    in_quotes = False
    line = scanned[0][0].heading.line if scanned else 0
    for part, found in scanned:
        if not found.regular[in_quotes]:
            return []
        result.append(msgspec.structs.replace(part, in_quotes=in_quotes, line=line))
        line += found.line_ends
        in_quotes ^= found.quotes % 2 == 1
    return [] if in_quotes else result


def read(item: Item, reading: Reading) -> Iterator[Piece]:
    """The pieces of an item, at least one.

    Raises:
        UserError: A file is damaged or a column is of a type that is not read.
    """
    number, size = 0, 0
    tables: list[pa.Table] = []
    rejects: list[Reject] = []
    if len(item.parts) > 1:  # a column might be numbers in one part and text in the next
        reading = msgspec.structs.replace(reading, direct={})
    for part in item.parts:
        for table, refused in _tables(part, reading):
            tables.append(table)
            rejects += refused
            size += table.nbytes
            if size >= reading.piece_bytes:
                yield _piece(item, number, tables, rejects, reading)
                number, size, tables, rejects = number + 1, 0, [], []
    if tables or not number:
        yield _piece(item, number, tables, rejects, reading)


def read_head(part: Part, reading: Reading) -> tuple[Piece, float]:
    """About `piece_bytes` from the beginning of a part as one piece, and which share of the part it is."""
    base = part.file << LINE_BITS
    item = Item(0, [part])
    match part:
        case Stream(location=location, heading=heading):
            parsed, share = csv_read.read_head(location, heading, reading.piece_bytes)
            both = [_from_csv(each, base, reading) for each in parsed]
        case Group(location=location) if part.size > reading.piece_bytes:
            rows = max(1, part.rows * reading.piece_bytes // part.size)
            both = [
                (numbered(arrow_read.read_some(location, part.group, reading.columns, rows), base + part.first_row), [])
            ]
            share = rows / part.rows
        case _:
            both, share = list(_tables(part, reading)), 1.0
    rejects = [reject for _, refused in both for reject in refused]
    return _piece(item, 0, [table for table, _ in both], rejects, reading), share


def _piece(item: Item, number: int, tables: list[pa.Table], rejects: list[Reject], reading: Reading) -> Piece:
    table = pa.concat_tables(tables)
    row_ids = table[ROW_ID].combine_chunks().to_numpy()
    stored, seen = {}, {}
    is_text = isinstance(item.parts[0], Stream | Range)
    for name in reading.columns:
        column = table[name]
        if is_text:
            cells = column.combine_chunks()
            if pa.types.is_string(cells.type):
                stored[name], seen[name] = columns.examine(cells, row_ids, name in reading.as_text)
            else:
                stored[name], seen[name] = cells, columns.seen_of_numbers(cells, name in reading.worded)
        else:
            where = item.parts[0].location.name
            stored[name], seen[name] = arrow_read.stored(column, name, row_ids, name in reading.numeric, where)
    stored[ROW_ID] = table[ROW_ID].combine_chunks()
    return Piece(
        pa.table(stored), Facts(item.index, number, table.num_rows, seen, rejects, table.num_rows + len(rejects))
    )


def _tables(part: Part, reading: Reading) -> Iterator[tuple[pa.Table, list[Reject]]]:
    base = part.file << LINE_BITS
    match part:
        case Stream(location=location, heading=heading):
            for parsed in csv_read.read_stream(location, heading, reading.piece_bytes):
                yield _from_csv(parsed, base, reading)
        case Range(heading=heading):
            parsed = csv_read.read_range(part, heading, reading.direct)
            yield _from_csv(parsed, base, reading)
        case Group(location=location):
            yield numbered(arrow_read.read_group(location, part.group, reading.columns), base + part.first_row), []
        case Slice():
            yield numbered(pa.ipc.open_stream(part.table).read_all(), base + part.first_row), []


def _from_csv(parsed: Parsed, base: int, reading: Reading) -> tuple[pa.Table, list[Reject]]:
    table = pa.table({name: parsed.columns[name] for name in reading.columns})
    rejects = [msgspec.structs.replace(reject, row_id=base + reject.row_id) for reject in parsed.rejects]
    return table.append_column(ROW_ID, pa.array(base + parsed.lines, pa.uint64())), rejects


def numbered(table: pa.Table, first: int) -> pa.Table:
    """The table with row ids from `first` on."""
    return table.append_column(ROW_ID, pa.array(np.arange(first, first + table.num_rows, dtype=np.uint64)))


def _schema(part: Part) -> str:
    return part.schema if isinstance(part, Group) else ""
