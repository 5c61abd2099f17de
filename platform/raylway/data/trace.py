"""From a row id, or a file and line, back to the record in the source, and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raylway import storage
from raylway.data import csv_read, items, lines_read
from raylway.data import prepare as data_prepare
from raylway.data.files import locate
from raylway.data.location import TEXT_FORMATS, Location
from raylway.data.opening import open_source
from raylway.errors import RunFailed, UserError
from raylway.evaluate.record import reading
from raylway.features.prepared import DUPLICATES, LINE_BITS, QUARANTINE, SPLITS, Prepared, Shard, damaged
from raylway.job.load import LoadedJob
from raylway.storage import Place


@dataclass
class Traced:
    """One row of the source and what became of it."""

    row_id: int
    file: str
    line: int
    by_line: bool
    fate: str
    """In a sentence."""
    record: dict[str, Any] = field(default_factory=dict)
    """The record's cells as they stand in the source; empty if it could not be read."""
    raw: str = ""
    """Of a record that could not be read: what the quarantine kept of it."""
    types: dict[str, str] = field(default_factory=dict)
    side: str = ""
    numeric: dict[str, float] = field(default_factory=dict)
    """The model's numbers."""
    categorical: dict[str, int] = field(default_factory=dict)
    """The model's codes."""
    prediction: dict[str, Any] = field(default_factory=dict)
    """Of a test row: what the run's model answered."""
    changed: str = ""
    """A sentence, if the source is no longer what was prepared."""


def trace(prepared: Prepared, loaded: LoadedJob, row: str, predictions: Place | None) -> Traced:
    """Follow one row.

    Args:
        prepared: The prepared data.
        loaded: The job, whose source is read for this one record.
        row: A row id, or `file:line` (of Parquet the row's number from 1).
        predictions: The run's answers, if it has any.

    Raises:
        UserError: There is no such row, the source is gone, or the prepared data is damaged.
    """
    files = prepared.manifest.files
    row_id = _row_id(row, files)
    file, line = files[row_id >> LINE_BITS], row_id & ((1 << LINE_BITS) - 1)
    location = _location(loaded, file, row_id >> LINE_BITS)
    found = Traced(row_id, file, line, location.format in TEXT_FORMATS, "")
    if data_prepare.fingerprint(loaded) != prepared.manifest.fingerprint:
        found.changed = "the source or the job has changed since it was prepared: what is shown may be another record"
    found.record = _record(loaded, location, line)
    found.types = {each["name"]: each["type"] for each in prepared.profile()}
    _add_fate(found, prepared)
    if found.side == "test" and predictions is not None and predictions.exists():
        found.prediction = _prediction(predictions, row_id)
    return found


def as_text(found: Traced) -> str:
    """For people."""
    place = f"{found.file}:{found.line}" if found.by_line else f"{found.file}, row {found.line}"
    lines = [f"{place} (row id {found.row_id})", found.fate]
    lines += [f"note: {found.changed}"] * bool(found.changed)
    lines += [f"  as it stands: {found.raw}"] * bool(found.raw and not found.record)
    width = max(map(len, found.record), default=0)
    for name, cell in found.record.items():
        shown = "(missing)" if cell is None else str(cell)
        encoded = ""
        if name in found.numeric:
            encoded = f"  -> {found.numeric[name]:.6g}"
        elif name in found.categorical:
            code = found.categorical[name]
            encoded = f"  -> code {code}" + (" (unknown)" if code == 0 else "")
        lines.append(f"  {name:<{width}}  {found.types.get(name, ''):<8}{shown}{encoded}")
    for name, value in found.numeric.items():
        if name not in found.record:
            lines.append(f"  {name:<{width}}  derived -> {value:.6g}")
    for name, answer in found.prediction.items():
        lines.append(f"  {name}: {answer:.6g}" if isinstance(answer, float) else f"  {name}: {answer}")
    return "\n".join(lines)


class Set(msgspec.Struct, frozen=True):
    """Rows that were set aside, counted and listed."""

    quarantined: int
    duplicates: int
    by_reason: dict[str, int]
    by_column: dict[str, int]
    by_file: dict[str, int]
    rows: list[dict[str, Any]]
    """Quarantined: row_id, file, line (of Parquet and Arrow files the row's number from 1, and row_group and row in it
    from 0), column, reason, cell."""
    duplicate_rows: list[dict[str, Any]]
    """file, line, first_file, first_line."""


def quarantined(prepared: Prepared, limit: int) -> Set:
    """What preparation has set aside; at most `limit` rows of each kind are listed, all are counted.

    Raises:
        UserError: The prepared data is damaged.
    """
    counts: tuple[Counter[str], Counter[str], Counter[str]] = Counter(), Counter(), Counter()
    rows: list[dict[str, Any]] = []
    listed: list[dict[str, Any]] = []
    total = 0
    for record in _lines(prepared):
        total += 1
        for count, key in zip(
            counts, (record["reason"], record["column"] or "(whole row)", record["file"]), strict=True
        ):
            count[key] += 1
        if len(rows) < limit:
            rows.append(record)
    copies = _duplicates(prepared)
    duplicates = copies.num_rows
    files_by_index = prepared.manifest.files
    for own, first in zip(*(copies[name][:limit].to_pylist() for name in copies.column_names), strict=True):
        (file, line), (first_file, first_line) = _place(files_by_index, own), _place(files_by_index, first)
        listed.append({"file": file, "line": line, "first_file": first_file, "first_line": first_line})
    reasons, columns, files = (dict(count.most_common()) for count in counts)
    return Set(total, duplicates, reasons, columns, files, rows, listed)


def quarantine_text(found: Set, missing: int) -> str:
    """For people."""
    lines = [
        f"{found.quarantined:,} rows in quarantine; {found.duplicates:,} duplicates listed; "
        f"{missing:,} rows left out for a missing cell"
    ]
    for title, counts in (("reason", found.by_reason), ("column", found.by_column), ("file", found.by_file)):
        lines += [f"  by {title}:"] * bool(counts)
        lines += [f"    {count:>9,}  {name}" for name, count in list(counts.items())[:20]]
    for row in found.rows:
        column = f", column {row['column']!r}" if row["column"] else ""
        lines.append(f"{_words(row)}{column}: {row['reason']}: {row['cell']!r}")
    if len(found.rows) < found.quarantined:
        lines.append(f"... and {found.quarantined - len(found.rows):,} more (--limit)")
    for row in found.duplicate_rows:
        lines.append(f"{row['file']}:{row['line']} equals {row['first_file']}:{row['first_line']}")
    if len(found.duplicate_rows) < found.duplicates:
        lines.append(f"... and {found.duplicates - len(found.duplicate_rows):,} more duplicates (--limit)")
    return "\n".join(lines)


def _words(row: dict[str, Any]) -> str:
    """Where a quarantined row is."""
    if "row_group" in row:
        return f"{row['file']}, row {row['line']} (row group {row['row_group']}, row {row['row']} in it)"
    return f"{row['file']}:{row['line']}"


def _lines(prepared: Prepared) -> Iterator[dict[str, Any]]:
    with prepared.set_aside(QUARANTINE) as path, path.open("rb") as lines:
        yield from map(msgspec.json.decode, lines)


def _row_id(row: str, files: list[str]) -> int:
    if _is_number(row):
        row_id = int(row)
        if row_id >> LINE_BITS < len(files):
            return row_id
        raise UserError(
            "there is no such row id",
            where=row,
            expected=f"an id that begins in one of {len(files)} file(s)",
            found=f"one of file {(row_id >> LINE_BITS) + 1:,}",
            fix="take the id from the answers, or name the row as file:line",
        )
    name, _, line = row.rpartition(":")
    matches = [index for index, file in enumerate(files) if file == name or file.endswith("/" + name)]
    if not _is_number(line) or int(line) >> LINE_BITS or len(matches) != 1:
        raise UserError(
            "this does not name one row" if len(matches) < 2 else "more than one file is called so",
            where=row,
            expected="a row id, or file:line with a file of the source",
            found=f"files: {', '.join(files[:10])}",
            fix=f"such as {files[0]}:2" if files else "",
        )
    return (matches[0] << LINE_BITS) + int(line)


def _is_number(text: str) -> bool:
    """Whether it is a whole number in ASCII digits, of a length that Python reads."""
    return text.isascii() and text.isdecimal() and len(text) <= 40


def _location(loaded: LoadedJob, file: str, index: int) -> Location:
    every = locate(loaded)
    named = [location for location in every if location.name == file]
    if not named:
        raise UserError(
            "the source of this row is gone",
            where=file,
            expected=f"file {index + 1} of the prepared data",
            found=", ".join(location.name for location in every[:10]),
            fix="put the file back where it was",
        )
    return named[0]


def _record(loaded: LoadedJob, location: Location, line: int) -> dict[str, Any]:
    """The cells of one record, empty if none begins there."""
    source = open_source(loaded, [location])
    reading = items.Reading(source.columns, [], csv_read.RANGE_BYTES)
    for part in source.parts:
        for table, _ in items.tables(part, reading):
            ids = table[items.ROW_ID].to_numpy()
            at = np.flatnonzero(ids == line)
            if len(at):
                row = table.drop_columns(items.ROW_ID).slice(int(at[0]), 1)
                return (lines_read.unmarked(row) if source.format == "jsonl" else row).to_pylist()[0]
            if len(ids) and ids[0] > line:
                return {}
    return {}


def _add_fate(found: Traced, prepared: Prepared) -> None:
    transform = prepared.manifest.transform
    for split in SPLITS:
        for shard in prepared.shards(split):
            table = _rows(prepared, shard)
            ids = table["row_id"].combine_chunks().to_numpy()
            at = int(np.searchsorted(ids, np.uint64(found.row_id)))
            if at < len(ids) and ids[at] == found.row_id:
                _check(prepared, shard)
                row = table.slice(at, 1).to_pylist()[0]
                found.side = split
                found.fate = f"kept, a {'training' if split == 'train' else split} row"
                if len(transform.numeric) == len(row["numeric"]):
                    names = [each.name for each in transform.numeric]
                    found.numeric = dict(zip(names, row["numeric"], strict=True))
                if len(transform.categorical) == len(row["categorical"]):
                    names = [each.name for each in transform.categorical]
                    found.categorical = dict(zip(names, row["categorical"], strict=True))
                return
    _add_why_not_kept(found, prepared)


def _add_why_not_kept(found: Traced, prepared: Prepared) -> None:
    for record in _lines(prepared):
        if (record["file"], record["line"]) == (found.file, found.line):
            column = f"column {record['column']!r}: " if record["column"] else ""
            found.fate, found.raw = f"quarantined: {column}{record['reason']}", record["cell"] or ""
            return
    copies = _duplicates(prepared)
    ids = copies["row_id"].to_numpy()
    at = int(np.searchsorted(ids, np.uint64(found.row_id)))
    if at < len(ids) and int(ids[at]) == found.row_id:
        file, line = _place(prepared.manifest.files, copies["first_row_id"][at].as_py())
        found.fate = f"left out: a duplicate of {file}:{line}"
        return
    if not found.record:
        raise UserError(
            "no record begins there",
            where=f"{found.file}:{found.line}",
            expected="a line below the heading, within the file, where a record begins",
            found="none in what is prepared",
            fix="name such a line; a record of several lines begins on its first",
        )
    for split in SPLITS:
        for shard in prepared.shards(split):
            _check(prepared, shard)  # one of them may have held the row
    empty = [name for name, cell in found.record.items() if cell is None]
    if empty:
        found.fate = f"left out: a cell is missing ({', '.join(empty)})"
    else:
        found.fate = "left out: a duplicate of an earlier row, or a cell that counts as missing"


def _rows(prepared: Prepared, shard: Shard) -> pa.Table:
    """Memory-mapped."""
    place = prepared.folder / shard.file
    try:
        return pa.ipc.open_file(pa.memory_map(str(storage.local(place, shard.bytes, shard.checksum)))).read_all()
    except (OSError, pa.ArrowException, RunFailed) as error:
        raise damaged(place, str(error)) from None


def _check(prepared: Prepared, shard: Shard) -> None:
    place = prepared.folder / shard.file
    if storage.checksum(storage.local(place, shard.bytes, shard.checksum)) != shard.checksum:
        raise damaged(place, "other contents than those of its checksum")


def _prediction(predictions: Place, row_id: int) -> dict[str, Any]:
    """What the run answered for a row, without its id."""
    with storage.here(predictions) as path, reading(predictions):
        rows = pq.read_table(path, filters=[("row_id", "=", row_id)]).to_pylist()
    return {name: value for name, value in (rows[0] if rows else {}).items() if name != "row_id"}


def _duplicates(prepared: Prepared) -> pa.Table:
    """`row_id` and `first_row_id` (uint64) of rows that repeat another, in the order of the ids; memory-mapped."""
    with prepared.set_aside(DUPLICATES) as path:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _place(files: list[str], row_id: int) -> tuple[str, int]:
    return files[row_id >> LINE_BITS], row_id & ((1 << LINE_BITS) - 1)
