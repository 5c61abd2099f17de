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

from raylway.data import arrow_read, columns, csv_read, lines_read, missing, packed
from raylway.data.columns import Seen
from raylway.data.csv_read import Parsed, Reject
from raylway.data.csv_text import Heading, Scan
from raylway.data.location import Location
from raylway.features.prepared import LINE_BITS
from raylway.features.texts import Decimal, MissingCells

ROW_ID = ""
"""Column of a piece's table that holds the row ids (uint64); no source column can have this name."""


class Stream(msgspec.Struct, frozen=True, tag=True):
    """A whole CSV, JSON Lines or text file."""

    file: int
    location: Location
    heading: Heading
    size: int

    @property
    def is_cut(self) -> bool:
        """Whether ranges of it can be read, if its quotes are regular."""
        return self.location.is_plain and (self.location.format != "csv" or self.heading.quote == '"')


class Range(msgspec.Struct, frozen=True, tag=True):
    """A byte range of a plain file, of a CSV file whose quotes are regular."""

    file: int
    location: Location
    heading: Heading
    start: int
    end: int
    in_quotes: bool
    line: int

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def name(self) -> str:
        return self.location.name


class Group(msgspec.Struct, frozen=True, tag=True):
    """A row group of a Parquet file, or a record batch of an Arrow file."""

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

    @property
    def name(self) -> str:
        """Of its file; of the first of several, and how many there are."""
        names = list(dict.fromkeys(part.location.name for part in self.parts))
        return names[0] if len(names) == 1 else f"{names[0]} and the next {len(names) - 1} files"


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
    decimal: Decimal = "."
    """The decimal sign of CSV files, and of folders' names."""
    missing: list[str] = []
    """Further texts and numbers that are missing cells (`texts.MissingCells`)."""


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
    """Where a plain file is cut: from byte, to byte."""
    first = stream.heading.offset
    return [(start, min(start + piece_bytes, stream.size)) for start in range(first, stream.size, piece_bytes)]


def scan(part: Range) -> Scan:
    """Look at a byte range without knowing what precedes it."""
    if part.location.format == "csv":
        return csv_read.scan_range(part.location, part.start, part.end, part.heading)
    with packed.opened(part.location) as file:
        file.seek(part.start)
        return Scan(packed.exactly(file, part.size).count(b"\n"), 0, (True, True))


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
    read_now: list[pa.Table] = []
    rejects: list[Reject] = []
    for part in item.parts:
        for table, refused in tables(part, reading):
            read_now.append(table)
            rejects += refused
            size += table.nbytes
            if size >= reading.piece_bytes:
                yield _piece(item, number, read_now, rejects, reading)
                number, size, read_now, rejects = number + 1, 0, [], []
    if read_now or not number:
        yield _piece(item, number, read_now, rejects, reading)


def read_head(part: Part, reading: Reading) -> tuple[Piece, float]:
    """About `piece_bytes` from the beginning of a part as one piece, and which share of the part it is."""
    base = part.file << LINE_BITS
    item = Item(0, [part])
    match part:
        case Stream(location=location, heading=heading) if location.format == "csv":
            parsed, share = csv_read.read_head(location, heading, reading.piece_bytes)
            both = [_parsed(each, part, base, reading) for each in parsed]
        case Stream(location=location, heading=heading):
            body, line = next(lines_read.bodies(location, heading, reading.piece_bytes), (b"", 1))
            both, share = [_parsed(_of_lines(part, body, line, reading), part, base, reading)], 1.0
            if len(body) >= reading.piece_bytes // 2 and len(body) < part.size:
                share = len(body) / part.size
        case Group(location=location) if part.rows and part.size > reading.piece_bytes:
            rows = max(1, part.rows * reading.piece_bytes // part.size)
            table = arrow_read.read_some(location, part.group, reading.columns, rows)
            both, share = [(_numbered(table, part, base + part.first_row), [])], rows / part.rows
        case _:
            both, share = list(tables(part, reading)), 1.0
    rejects = [reject for _, refused in both for reject in refused]
    return _piece(item, 0, [table for table, _ in both], rejects, reading), share


def _piece(item: Item, number: int, found: list[pa.Table], rejects: list[Reject], reading: Reading) -> Piece:
    table = pa.concat_tables(found, promote_options="default")
    row_ids = table[ROW_ID].combine_chunks().to_numpy()
    stored, seen = {}, {}
    first = item.parts[0]
    location, words = first.location, MissingCells(reading.missing)
    for name in reading.columns:
        cells = table[name].combine_chunks()
        as_text, numeric = name in reading.as_text, name in reading.numeric
        is_partition = any(name in part.location.partitions for part in item.parts)
        if is_partition or location.format == "csv":
            cells = cells.cast(pa.string())
            cells = missing.without(cells, words, reading.decimal) if words else cells
            stored[name], seen[name] = columns.examine(cells, row_ids, as_text, decimal=reading.decimal)
        elif location.format == "jsonl":
            cells = cells.cast(pa.string())
            cells = missing.without_marked(cells, words) if words else cells
            stored[name], seen[name] = lines_read.split_cells(cells, row_ids, as_text, numeric)
        else:
            typed = pa.chunked_array([missing.without(cells, words)]) if words else table[name]
            stored[name], seen[name] = arrow_read.stored(typed, name, row_ids, numeric, location.name)
    stored[ROW_ID] = table[ROW_ID].combine_chunks()
    return Piece(
        pa.table(stored), Facts(item.index, number, table.num_rows, seen, rejects, table.num_rows + len(rejects))
    )


def tables(part: Part, reading: Reading) -> Iterator[tuple[pa.Table, list[Reject]]]:
    """The rows of a part as its file has them: the reading's columns and `ROW_ID`, and the rows that can't be read.

    CSV cells are text, JSON cells marked text (`lines_read.split_cells`), others typed; columns that the file lacks are
    null.

    Raises:
        UserError: The file is damaged, or was changed while it was read.
    """
    base = part.file << LINE_BITS
    match part:
        case Stream(location=location, heading=heading) if location.format == "csv":
            for parsed in csv_read.read_stream(location, heading, reading.piece_bytes):
                yield _parsed(parsed, part, base, reading)
        case Range(location=location, heading=heading) if location.format == "csv":
            yield _parsed(csv_read.read_range(part, heading), part, base, reading)
        case Stream(location=location, heading=heading):
            for body, line in lines_read.bodies(location, heading, reading.piece_bytes):
                yield _parsed(_of_lines(part, body, line, reading), part, base, reading)
        case Range():
            body, line = lines_read.body_of(part, part.heading)
            yield _parsed(_of_lines(part, body, line, reading), part, base, reading)
        case Group(location=location):
            row = base + part.first_row
            for table in arrow_read.read_group(location, part.group, reading.columns):
                yield _numbered(table, part, row), []
                row += table.num_rows
        case Slice():
            table = arrow_read.as_text(arrow_read.flat(pa.ipc.open_stream(part.table).read_all()))
            yield numbered(table, base + part.first_row), []


def _of_lines(part: Stream | Range, body: bytes, line: int, reading: Reading) -> Parsed:
    if part.location.format == "text":
        return lines_read.parse_text(body, line)
    return lines_read.parse_json(body, line, [name for name in reading.columns if name in part.heading.columns])


def _parsed(parsed: Parsed, part: Part, base: int, reading: Reading) -> tuple[pa.Table, list[Reject]]:
    location = part.location
    rows = len(parsed.lines)
    found = {name: cells for name, cells in parsed.columns.items() if name in reading.columns}
    table = _with_partitions(pa.table({**found, ROW_ID: pa.array(base + parsed.lines, pa.uint64())}), location)
    lacking = {name: pa.nulls(rows, pa.string()) for name in reading.columns if name not in table.column_names}
    for name, nulls in lacking.items():
        table = table.append_column(name, nulls)
    rejects = [msgspec.structs.replace(reject, row_id=base + reject.row_id) for reject in parsed.rejects]
    if location.encoding != "utf-8":
        told = {"the cell is not UTF-8": f"the cell is not {location.encoding}"}
        rejects = [msgspec.structs.replace(reject, reason=told.get(reject.reason, reject.reason)) for reject in rejects]
    return table.select([*reading.columns, ROW_ID]), rejects


def _with_partitions(table: pa.Table, location: Location) -> pa.Table:
    for name, value in location.partitions.items():
        cells = pa.repeat(pa.scalar(value, pa.string()), table.num_rows)
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, cells)
    return table


def _numbered(table: pa.Table, part: Part, first: int) -> pa.Table:
    names = table.column_names
    return numbered(_with_partitions(table, part.location).select(names), first)


def numbered(table: pa.Table, first: int) -> pa.Table:
    """The table with row ids from `first` on."""
    return table.append_column(ROW_ID, pa.array(np.arange(first, first + table.num_rows, dtype=np.uint64)))


def _schema(part: Part) -> str:
    partitions = ", ".join(part.location.partitions)
    return f"{part.schema if isinstance(part, Group) else ''}; {partitions}"
