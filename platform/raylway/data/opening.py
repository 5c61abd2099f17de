"""From locations to a source that can be read: columns, headings, and the parts that the items are made of."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from raylway.data import arrow_read, csv_read, function, lines_read, packed
from raylway.data.csv_text import Dialect, Heading, check_columns
from raylway.data.decide import Places
from raylway.data.files import locate
from raylway.data.items import Group, Part, Slice, Stream
from raylway.data.location import TEXT_FORMATS, Format, Location
from raylway.errors import UserError
from raylway.features.prepared import SPLITS
from raylway.job.load import LoadedJob
from raylway.job.schema import Read

_STEP = 8 << 20


@dataclass(frozen=True)
class Source:
    """An opened source; nothing but headings and footers has been read of its files."""

    format: Format
    files: list[str]
    """Names by file index."""
    columns: list[str]
    """Of the first file that has any."""
    parts: list[Part]
    """In the order of the row ids; a CSV file is one part here."""
    notes: list[str] = field(default_factory=list)
    """About files without rows."""

    @property
    def places(self) -> Places:
        return Places(self.files, self.format in TEXT_FORMATS)

    @property
    def sides(self) -> list[int]:
        """The side of each file (`split`); empty unless the job names files for each side."""
        sides = [0] * len(self.files)
        for part in self.parts:
            if part.location.side:
                sides[part.file] = SPLITS.index(part.location.side) + 1
        return sides if any(sides) else []

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


def open_source(
    loaded: LoadedJob, locations: list[Location] | None = None, head: bool = False, may_be_empty: bool = False
) -> Source:
    """Find the job's source and read what its files say about their columns.

    Args:
        loaded: The job.
        locations: Its files in the order of the row ids; looked for and sorted by name if left out.
        head: As `open_files` takes it.
        may_be_empty: Whether a source without any column is one.

    Raises:
        UserError: The source can't be read, its files have different columns, or it has none.
    """
    where = loaded.location("data.source")
    asked = Asked(
        loaded.job.data.read,
        frozenset(loaded.job.data.features.drop),
        numeric=frozenset(loaded.job.data.features.numeric),
    )
    source = open_files(locations or locate(loaded), asked, where, head)
    if not source.columns and not may_be_empty:
        raise no_rows(where, ", ".join(source.files[:5]))
    return source


@dataclass(frozen=True)
class Asked:
    """What matters of a job when its files are opened."""

    read: Read = field(default_factory=Read)
    drop: frozenset[str] = frozenset()
    """Columns that may be of a type that is not read."""
    wanted: frozenset[str] | None = None
    """The columns that matter; None: all."""
    numeric: frozenset[str] = frozenset()
    """Columns whose text is read as numbers, so that files need not agree on text or number."""

    def refuses(self, name: str) -> bool:
        """Whether the column must be of a type that is read."""
        return name not in self.drop and (self.wanted is None or name in self.wanted)


def open_files(locations: list[Location], asked: Asked, where: str, head: bool = False) -> Source:
    """Read what files say about their columns.

    Args:
        locations: Of one format.
        asked: What the job says of them.
        where: What names the files, for messages.
        head: Whether the columns of JSON Lines are those of each file's beginning only; else the files are read whole.

    Raises:
        UserError: As `open_source`.
    """
    kind = locations[0].format
    if kind == "python":
        return _from_function(locations[0], asked, where)
    if kind in ("parquet", "arrow"):
        return _from_arrow(locations, asked, where)
    encoding = packed.known_encoding(asked.read.encoding, where.replace("data.source", "data.read.encoding"))
    locations = [packed.recognised(location, encoding) for location in locations]
    if kind == "csv":
        return _from_csv(locations, _dialect(asked.read, where))
    return _from_json(locations, asked, head) if kind == "jsonl" else _from_text(locations)


def no_rows(where: str, found: str) -> UserError:
    return UserError("the source has no rows to train on", where=where, expected="at least one row", found=found)


def _dialect(read: Read, where: str) -> Dialect:
    delimiter = None if read.delimiter == "auto" else read.delimiter
    quote = "" if read.quote == "none" else read.quote
    if delimiter and (delimiter in "\r\n\0" or ord(delimiter) > 126 or delimiter == quote):
        raise UserError(
            "this can't be a delimiter",
            where=where.replace("data.source", "data.read.delimiter"),
            expected="one ASCII character, no line end and not the quote",
            found=repr(delimiter),
        )
    check_columns(read.columns, where.replace("data.source", "data.read.columns"))
    return Dialect(delimiter, quote, read.columns)


def _from_csv(files: list[Location], dialect: Dialect) -> Source:
    parts: list[Part] = []
    notes: list[str] = []
    columns: list[str] = []
    first = ""
    for index, location in enumerate(files):
        heading: Heading | None = csv_read.heading(location, dialect)
        if heading is None:
            notes.append(f"{location.name} is empty; it adds no rows")
            continue
        first = first or location.name
        columns = _agreed(columns, _with_partitions(heading.columns, location), first, location.name)
        parts.append(Stream(index, location, heading, packed.text_bytes(location)))
    return Source("csv", [location.name for location in files], columns, parts, notes)


def _from_text(files: list[Location]) -> Source:
    parts: list[Part] = []
    columns = [lines_read.TEXT]
    for index, location in enumerate(files):
        _with_partitions([lines_read.TEXT], location)
        columns += [name for name in location.partitions if name not in columns]
        parts.append(_lines(index, location, [lines_read.TEXT]))
    notes = _lacking(files, [[*part.heading.columns] for part in parts if isinstance(part, Stream)], columns)
    return Source("text", [location.name for location in files], columns, parts, notes)


def _from_json(files: list[Location], asked: Asked, head: bool) -> Source:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(functools.partial(_keys, asked=asked, head=head), files))
    every = list(dict.fromkeys(name for names in found for name in names))
    # null where others have an object is an absent object, not a column
    valued = {name for names in found for name, has_value in names.items() if has_value}
    columns = [name for name in every if name in valued or not any(other.startswith(f"{name}.") for other in every)]
    if not columns:
        _refuse_other_lines(files)
    check_columns(columns, files[0].name)
    for location in files:
        _with_partitions(columns, location)
    present = [[name for name in columns if name in names] for names in found]
    parts: list[Part] = [_lines(index, location, columns) for index, location in enumerate(files)]
    columns = [*columns, *(name for location in files for name in location.partitions)]
    if not every:
        _refuse_other_json(parts)
    notes = _lacking(files, present, list(dict.fromkeys(columns)))
    return Source("jsonl", [location.name for location in files], list(dict.fromkeys(columns)), parts, notes)


def _refuse_other_json(parts: list[Part]) -> None:
    """None of the files has a column: say so of the first line that is no object."""
    for part in parts:
        body, line = next(lines_read.bodies(part.location, Heading("", [], 0, 1), _STEP), (b"", 1))
        if rejects := lines_read.parse_json(body, line, []).rejects:
            raise UserError(
                "the file is no JSON Lines",
                where=f"{part.location.name}:{rejects[0].row_id}",
                expected="one object in each line",
                found=rejects[0].reason,
                fix="write one object a line (pandas: to_json(..., orient='records', lines=True))",
            )


def _keys(location: Location, asked: Asked, head: bool) -> dict[str, bool]:
    """The columns of a file of JSON Lines, and whether each has a value."""
    found: dict[str, bool] = {}
    heading = _lines(0, location, []).heading
    for body, line in lines_read.bodies(location, heading, _STEP):
        names, lists = lines_read.keys(body, line)
        for name, has_value in names.items():
            found[name] = found.get(name, False) or has_value
        for name, number in lists.items():
            if asked.refuses(name):
                raise arrow_read.not_read(name, "a list", f"{location.name}:{number}")
        if head:
            break
    return found


def _refuse_other_lines(files: list[Location]) -> None:
    """Files without any object are empty or of another form, such as one array over many lines."""
    for location in files:
        for body, line in lines_read.bodies(location, _lines(0, location, []).heading, _STEP):
            for reject in lines_read.parse_json(body, line, []).rejects:
                raise UserError(
                    reject.reason,
                    where=f"{location.name}:{reject.row_id}",
                    expected="JSON Lines: on each line one object",
                    found=reject.cell[:200],
                    fix="write it so (pandas: to_json(..., orient='records', lines=True))",
                )


def _lines(index: int, location: Location, columns: list[str]) -> Stream:
    with packed.text_of(location) as text:
        offset = lines_read.offset(packed.exactly(text, 3))
    return Stream(index, location, Heading("", columns, offset, 1), packed.text_bytes(location))


def _from_arrow(files: list[Location], asked: Asked, where: str) -> Source:
    parts: list[Part] = []
    present: list[list[str]] = []
    columns: dict[str, None] = {}
    first: dict[str, tuple[str, str, str]] = {}
    for index, location in enumerate(files):
        footer = arrow_read.footer(location)
        for name, kind in footer.kinds.items():
            _check_type(name, kind, footer.types[name], location.name, asked)
            if kind == "nothing" or name in asked.numeric or not asked.refuses(name):
                continue
            known, type_name, file = first.setdefault(name, (kind, footer.types[name], location.name))
            if known != kind:
                raise UserError(
                    f"the files do not agree on the column {name!r}",
                    where=where,
                    expected="one type, or whole and real numbers",
                    found=f"{type_name} in {file} and {footer.types[name]} in {location.name}",
                    fix="write the column with one type in every file",
                )
        present.append(list(footer.types))
        columns |= dict.fromkeys(_with_partitions(present[-1], location))
        row = 1
        for group, (rows, size) in enumerate(footer.groups):
            parts.append(Group(index, location, group, row, rows, size, footer.schema))
            row += rows
    notes = _lacking(files, present, list(columns))
    return Source(files[0].format, [location.name for location in files], list(columns), parts, notes)


def _check_type(name: str, kind: str, type_name: str, file: str, asked: Asked) -> None:
    if not kind and asked.refuses(name):
        raise arrow_read.not_read(name, type_name, file)


def _from_function(location: Location, asked: Asked, where: str) -> Source:
    table = function.call(location, where)
    shown = arrow_read.flat(table.slice(0, 0)).schema
    check_columns(shown.names, location.name)
    for field_ in shown:
        _check_type(field_.name, arrow_read.kind_of(field_.type), str(field_.type), location.name, asked)
    rows = max(1, csv_read.RANGE_BYTES * table.num_rows // max(1, table.nbytes))
    parts: list[Part] = []
    for start in range(0, table.num_rows, rows):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(start, rows))
        parts.append(Slice(0, location, start + 1, sink.getvalue().to_pybytes()))
    return Source("python", [location.name], shown.names, parts)


def _with_partitions(columns: list[str], location: Location) -> list[str]:
    """The columns of a file and those that its folders give."""
    for name in location.partitions:
        if name in columns:
            raise UserError(
                f"the column {name!r} is in the file and in the name of its folder",
                where=location.name,
                expected="each column once",
                fix="rename the folder, or write the file without the column",
            )
    return [*columns, *location.partitions]


def _lacking(files: list[Location], present: list[list[str]], columns: list[str]) -> list[str]:
    """A sentence for each column that some files lack."""
    notes = []
    for name in columns:
        without = [
            location.name
            for location, names in zip(files, present, strict=True)
            if name not in names and name not in location.partitions
        ]
        if without:
            more = f" and {len(without) - 1} more" if len(without) > 1 else ""
            notes.append(f"column {name!r} is not in {without[0]}{more}: it is missing in every row there")
    return notes


def _agreed(columns: list[str], found: list[str], first: str, name: str) -> list[str]:
    """The columns of the set, when those of one more file are the same in any order."""
    if not columns or sorted(columns) == sorted(found):
        return columns or found
    lacking = [column for column in columns if column not in found]
    further = [column for column in found if column not in columns]
    differences = [f"without {', '.join(lacking[:10])}"] * bool(lacking) + [f"with {', '.join(further[:10])}"] * bool(
        further
    )
    raise UserError(
        "the files of one source must have the same columns",
        where=name,
        expected=f"the columns of {first}: {', '.join(columns[:20])}",
        found=" and ".join(differences),
        fix="take the file out of the source, or write it with the same columns",
    )
