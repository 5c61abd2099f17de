"""CSV text to columns of text, with the exact line of every record; irregular text goes through Python's csv module."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from raylway.data import csv_text, packed
from raylway.data.csv_text import Heading, Scan
from raylway.data.location import Location
from raylway.data.packed import exactly
from raylway.errors import UserError

RANGE_BYTES = 16 << 20
"""Size of a read range, of the pieces of a stream and of the groups of small files. Part of what decides the bytes of
prepared data: raise `prepare.VERSION` with it."""
_SERIAL_RECORDS = 1 << 16
_LONGEST_STEPS = 8
"""A record longer than so many steps is most likely a quote that never closes: the csv module takes over."""
_LONGEST_SHOWN = 10_000


class Span(Protocol):
    """Some bytes of a plain file."""

    @property
    def location(self) -> Location: ...
    @property
    def start(self) -> int:
        """First byte."""

    @property
    def end(self) -> int:
        """Byte after the last."""

    @property
    def in_quotes(self) -> bool:
        """Whether the first byte stands inside a quoted cell."""

    @property
    def line(self) -> int:
        """Line that the first byte stands on."""


class Reject(msgspec.Struct, frozen=True):
    """One row that can't be used, and why."""

    row_id: int
    column: str | None
    """None when it is the row as a whole."""
    reason: str
    cell: str
    """As it stands in the file; of a whole row, its text."""


@dataclass
class Parsed:
    """Some consecutive records."""

    columns: dict[str, pa.Array]
    """By column, in the order of the heading: text, null for an empty cell."""
    lines: np.ndarray
    """int64 [N]: the line that each record starts on."""
    rejects: list[Reject] = field(default_factory=list)
    """Records that are not among the N; `row_id` is the line."""


def heading(location: Location, dialect: csv_text.Dialect = csv_text.PLAIN) -> Heading | None:
    """The heading of a file; None if it holds nothing but blanks."""
    with packed.text_of(location) as file:
        data = exactly(file, csv_text.HEADING_BYTES)
        return csv_text.read_heading(data, len(data) < csv_text.HEADING_BYTES, location.name, dialect)


def read_stream(location: Location, head: Heading, step: int) -> Iterator[Parsed]:
    """All records of a file, about `step` bytes of text at a time.

    Raises:
        UserError: The file is damaged, or a quoted cell never closes.
    """
    with packed.text_of(location) as file:
        exactly(file, head.offset)
        line, carry = head.line, b""
        while True:
            chunk = exactly(file, step)
            at_end = len(chunk) < step
            body = carry + chunk if carry else chunk
            cut = len(body) if at_end else csv_text.last_record_end(body)
            if not cut and not at_end and len(body) < _LONGEST_STEPS * step:
                carry = body
                continue
            parsed = parse(body[:cut], head, line) if cut or at_end else None
            if parsed is None:
                rest = iter(lambda: file.read(step), b"")
                yield from _serial(itertools.chain([body], rest), head, line, location.name)
                return
            yield parsed
            if at_end:
                return
            line += csv_text.line_ends(body[:cut])
            carry = body[cut:]


def read_head(location: Location, head: Heading, limit: int) -> tuple[list[Parsed], float]:
    """The records within the first `limit` bytes of a file's text, and which share of the text they are.

    Raises:
        UserError: The file is damaged, or short enough to tell that a quoted cell never closes.
    """
    parsed: list[Parsed] = []
    with packed.text_of(location) as file:
        exactly(file, head.offset)
        body = exactly(file, limit)
        whole = len(body) < limit or not file.read(1)
        cut = len(body) if whole else csv_text.last_record_end(body) or body.rfind(b"\n") + 1
        regular = parse(body[:cut], head, head.line)
        if regular is not None:
            parsed.append(regular)
        else:
            try:
                parsed.extend(_serial(iter([body[:cut]]), head, head.line, location.name))
            except UserError:
                if whole:  # otherwise it is the sample that ends within a cell
                    raise
        if whole:
            return parsed, 1.0
        share = packed_share(file, location)
    return parsed, share or cut / max(1, packed.text_bytes(location) - head.offset)


def packed_share(file: packed.Unpacked, location: Location) -> float | None:
    """Which share of a packed or encoded file was read; None if the text's own size tells."""
    if location.is_plain or location.compression == "zip":
        return None
    return min(1.0, max(1, file.packed_position()) / max(1, location.size))


def scan_range(location: Location, start: int, end: int, head: Heading) -> Scan:
    """`csv_text.scan` of the bytes from `start` to `end` of a plain file."""
    with packed.opened(location) as file:
        file.seek(max(0, start - 1))
        text = file.read(end - max(0, start - 1) + 1)
        text = text if start else b"\n" + text  # a file without a heading
    before = text[0] if start > head.offset else ord("\n")
    after = text[end - start + 1] if len(text) > end - start + 1 else ord("\n")
    return csv_text.scan(memoryview(text)[1 : end - start + 1], before, after, head.delimiter)


def read_range(part: Span, head: Heading) -> Parsed:
    """The records of a regular plain file that begin inside a span.

    Args:
        part: The span.
        head: The file's heading.
    """
    start, end, in_quotes, line = part.start, part.end, part.in_quotes, part.line
    with packed.opened(part.location) as file:
        file.seek(max(0, start - 1))
        text = file.read(end - max(0, start - 1))
        text = text if start else b"\n" + text  # a file without a heading
        # the text begins one byte early: a line end there makes `start` the beginning of a record
        first = 1 if start == head.offset else csv_text.record_start(text, in_quotes ^ (text[:1] == b'"'))
        if first is None or first > end - start:
            return Parsed({name: pa.array([], pa.string()) for name in head.columns}, np.zeros(0, np.int64))
        line += csv_text.line_ends(text[1:first])
        body = text[first:]
        while not _ends_record(body) and (more := file.read(RANGE_BYTES)):
            cut = csv_text.record_start(more, body.count(b'"') % 2 == 1)
            body += more[:cut]
            if cut is not None:
                break
    parsed = parse(body, head, line)
    assert parsed is not None, "the first pass found this file regular"
    return parsed


def parse(body: bytes, head: Heading, line: int) -> Parsed | None:
    """The records of a text that begins and ends with a record; None if its quotes break the rules.

    Args:
        body: The text.
        head: The file's heading.
        line: Line that the text starts on.
    """
    found = csv_text.records(body, head.delimiter) if head.quote == '"' else None
    if found is None:
        return None
    good = found.cells == len(head.columns)
    rejects = []
    if not good.all():
        rejects = [
            _ragged(
                body[found.starts[i] : found.ends[i]].rstrip(b"\r"),
                int(found.cells[i]),
                line + int(found.lines[i]),
                head,
            )
            for i in np.flatnonzero(~good)
        ]
        body = _joined(body, found, good)
    lines = line + found.lines[good]
    if not len(lines):
        return Parsed({name: pa.array([], pa.string()) for name in head.columns}, lines, rejects)
    table = _columns(body, head, found.multiline)
    assert table.num_rows == len(lines), "pyarrow and the record scan disagree"
    columns = [table[name].combine_chunks() for name in head.columns]
    return _checked(Parsed(dict(zip(head.columns, columns, strict=True)), lines, rejects), head)


def _columns(body: bytes, head: Heading, multiline: bool) -> pa.Table:
    """Every cell as bytes. One block, so that no cell straddles two and no type changes on the way."""
    return pa_csv.read_csv(
        pa.BufferReader(body),
        pa_csv.ReadOptions(column_names=head.columns, block_size=len(body) + 1, use_threads=False),
        pa_csv.ParseOptions(delimiter=head.delimiter, newlines_in_values=multiline),
        pa_csv.ConvertOptions(
            column_types=dict.fromkeys(head.columns, pa.binary()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
        ),
    )


def _checked(parsed: Parsed, head: Heading) -> Parsed:
    """The same with its cells proven to be UTF-8; a row with one that is not becomes a reject, a heading likewise."""
    texts: dict[str, pa.Array] = {}
    bad = {
        index: Reject(int(parsed.lines[index]), None, "the row repeats the heading", head.delimiter.join(head.columns))
        for index in _repeated(parsed, head).tolist()
    }
    for name, cells in parsed.columns.items():
        try:
            texts[name] = cells.cast(pa.string())
        except pa.ArrowInvalid:
            for index, cell in enumerate(cells.to_pylist()):
                if cell is not None and not _is_utf8(cell):
                    reject = Reject(int(parsed.lines[index]), name, "the cell is not UTF-8", _shown(cell))
                    bad.setdefault(index, reject)
    if not bad:
        return Parsed(texts, parsed.lines, parsed.rejects)
    keep = np.ones(len(parsed.lines), bool)
    keep[list(bad)] = False
    mask = pa.array(keep)
    columns = {name: cells.filter(mask).cast(pa.string()) for name, cells in parsed.columns.items()}
    rejects = sorted([*parsed.rejects, *bad.values()], key=lambda reject: reject.row_id)
    return Parsed(columns, parsed.lines[keep], rejects)


def _repeated(parsed: Parsed, head: Heading) -> np.ndarray:
    """Which rows are the heading once more, as in files that were joined: where each cell is its column's name.

    Of a single column that may be a value."""
    rows = np.arange(len(parsed.lines) if len(head.columns) > 1 else 0)
    for name, cells in reversed(parsed.columns.items()):
        if not len(rows):
            break
        there = cells if len(rows) == len(cells) else cells.take(pa.array(rows))
        same = pc.equal(there, name.encode())
        if name == head.columns[0]:  # a byte order mark before it makes its quotes part of the cell
            marked = [csv_text.BOM + text.encode() for text in (name, f"{head.quote}{name}{head.quote}")]
            same = pc.or_(same, pc.is_in(there, pa.array(marked)))
        rows = rows[pc.fill_null(same, False).to_numpy(zero_copy_only=False)]
    return rows


def _serial(chunks: Iterator[bytes], head: Heading, line: int, name: str) -> Iterator[Parsed]:
    """Records by Python's csv module: any text has a reading, and a line number for each record."""
    csv.field_size_limit(2**31 - 1)
    lines = _Lines(io.TextIOWrapper(io.BufferedReader(_Chunks(chunks)), "utf-8", "surrogateescape", newline=""))
    reader = csv_text.records_of(lines, head.delimiter, head.quote)
    rows: list[list[str]] = []
    starts: list[int] = []
    rejects: list[Reject] = []
    start = line
    while True:
        try:
            row = next(reader, None)
        except csv.Error:
            if lines.are_over:
                raise UserError(
                    "a quoted cell never closes",
                    where=f"{name}:{start}",
                    expected='a closing quote (a quote inside a quoted cell is written "")',
                    fix="close the quote that opens in the row that starts on this line",
                ) from None
            rejects.append(Reject(start, None, "text follows the closing quote of a cell", _shown(lines.taken())))
            row = []
        if row is None:
            break
        if len(row) == len(head.columns):
            rows.append(row)
            starts.append(start)
        elif row:
            rejects.append(_ragged(lines.taken(), len(row), start, head))
        lines.forget()
        start = line + reader.line_num
        if len(rows) == _SERIAL_RECORDS:
            yield _from_rows(rows, starts, rejects, head)
            rows, starts, rejects = [], [], []
    yield _from_rows(rows, starts, rejects, head)


def _from_rows(rows: list[list[str]], starts: list[int], rejects: list[Reject], head: Heading) -> Parsed:
    columns = {
        name: pa.array([row[index].encode("utf-8", "surrogateescape") or None for row in rows], pa.binary())
        for index, name in enumerate(head.columns)
    }
    return _checked(Parsed(columns, np.array(starts, np.int64), rejects), head)


class _Lines:
    """Lines of text, of which those of the record at hand are remembered."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._record: list[str] = []
        self.are_over = False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines, "")
        if not line:
            self.are_over = True
            raise StopIteration
        self._record.append(line)
        return line

    def taken(self) -> bytes:
        """The record as it stands, without its line end."""
        return "".join(self._record).encode("utf-8", "surrogateescape").rstrip(b"\r\n")

    def forget(self) -> None:
        self._record.clear()


class _Chunks(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._left:
            self._left = next(self._chunks, b"")
            if not self._left:
                return 0
        taken, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _ragged(raw: bytes, cells: int, line: int, head: Heading) -> Reject:
    few = "too few" if cells < len(head.columns) else "too many"
    return Reject(line, None, f"{few} cells: {cells} where the heading has {len(head.columns)}", _shown(raw))


def _shown(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")[:_LONGEST_SHOWN]


def _joined(body: bytes, found: csv_text.Records, good: np.ndarray) -> bytes:
    """The text of the good records only."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], good.astype(np.int8), [0]])))
    runs = zip(edges[0::2], edges[1::2], strict=True)
    return b"\n".join(body[found.starts[first] : found.ends[last - 1]] for first, last in runs)


def _ends_record(body: bytes) -> bool:
    return body.endswith(b"\n") and body.count(b'"') % 2 == 0


def _is_utf8(cell: bytes) -> bool:
    try:
        cell.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
