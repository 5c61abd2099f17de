"""From locations to a source that can be read: columns, headings, and the parts that the items are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pyarrow as pa

from raylway.data import arrow_read, csv_read
from raylway.data.csv_text import Heading, check_columns
from raylway.data.decide import Places
from raylway.data.files import Format, Location, locate, zip_members
from raylway.data.function import call
from raylway.data.items import Group, Part, Slice, Stream
from raylway.errors import UserError
from raylway.features.prepared import SPLITS
from raylway.job.load import LoadedJob


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
        return Places(self.files, self.format in ("csv", "jsonl", "text"))

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


def open_source(loaded: LoadedJob, locations: list[Location] | None = None) -> Source:
    """Find the job's source and read what its files say about their columns.

    Args:
        loaded: The job.
        locations: Its files in the order of the row ids; looked for and sorted by name if left out.

    Raises:
        UserError: The source can't be read, its files have different columns, or it has none.
    """
    locations = locations or locate(loaded)
    where = loaded.location("data.source")
    kind = locations[0].format
    if kind == "python":
        return _from_function(locations[0], where)
    source = _from_parquet(locations) if kind == "parquet" else _from_csv(locations)
    if not source.columns:
        raise no_rows(where, ", ".join(source.files[:5]))
    return source


def no_rows(where: str, found: str) -> UserError:
    return UserError("the source has no rows to train on", where=where, expected="at least one row", found=found)


def _from_csv(locations: list[Location]) -> Source:
    files: list[Location] = []
    for location in locations:
        files += zip_members(location) if location.compression == "zip" else [location]
    parts: list[Stream] = []
    notes: list[str] = []
    columns: list[str] = []
    first = ""
    for index, location in enumerate(files):
        heading: Heading | None = csv_read.heading(location)
        if heading is None:
            notes.append(f"{location.name} is empty; it adds no rows")
            continue
        first = first or location.name
        if location.format == "jsonl":  # an absent key is a missing cell
            columns = list(dict.fromkeys([*columns, *heading.columns]))
        else:
            columns = _agreed(columns, heading.columns, first, location.name)
        parts.append(Stream(index, location, heading, csv_read.text_bytes(location)))
    if files[0].format == "jsonl":
        parts = [
            msgspec.structs.replace(part, heading=msgspec.structs.replace(part.heading, columns=columns))
            for part in parts
        ]
    return Source(files[0].format, [location.name for location in files], columns, list(parts), notes)


def _from_parquet(locations: list[Location]) -> Source:
    parts: list[Part] = []
    columns: list[str] = []
    notes: list[str] = []
    for index, location in enumerate(locations):
        names, schema, groups = arrow_read.footer(location)
        if columns and sorted(columns) != sorted(names):
            notes.append(_differing(columns, names, location.name))
        columns = list(dict.fromkeys([*columns, *names]))
        row = 1
        for group, (rows, size) in enumerate(groups):
            parts.append(Group(index, location, group, row, rows, size, schema))
            row += rows
    return Source("parquet", [location.name for location in locations], columns, parts, notes)


def _differing(columns: list[str], names: list[str], file: str) -> str:
    lacking = [repr(name) for name in columns if name not in names]
    further = [repr(name) for name in names if name not in columns]
    without = f"lacks {', '.join(lacking[:10])}" if lacking else ""
    more = f"has {', '.join(further[:10])}, which files before it lack" if further else ""
    return f"{file} {' and '.join(filter(None, [without, more]))}: such cells are missing"


def _from_function(location: Location, where: str) -> Source:
    table = call(location, where)
    check_columns(table.column_names, location.name)
    rows = max(1, csv_read.RANGE_BYTES * table.num_rows // max(1, table.nbytes))
    parts: list[Part] = []
    for start in range(0, table.num_rows, rows):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(start, rows))
        parts.append(Slice(0, location, start + 1, sink.getvalue().to_pybytes()))
    return Source("python", [location.name], table.column_names, parts)


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
