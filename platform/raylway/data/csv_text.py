"""The structure of CSV text, found by numpy: where records begin, on which line, and whether quotes follow the rules.

Rules (RFC 4180): a quote opens a cell only at its start, and closes it only before a delimiter, a line end or the end;
two quotes inside a quoted cell are one. Text that breaks them is called irregular and is read by Python's csv module
instead, which is slower. A line ends with LF, CR LF or CR, inside a quoted cell too, as csv and editors count.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from raylway.errors import UserError

_LF, _CR, _QUOTE = 10, 13, 34
BOM = b"\xef\xbb\xbf"
DELIMITERS = ",;\t|"
"""Candidates, in the order that breaks a tie."""
HEADING_BYTES = 1 << 20
"""The heading must end within so many bytes of the file's start."""


class Dialect(msgspec.Struct, frozen=True):
    """How the job says that CSV files are written (`data.read`)."""

    delimiter: str | None = None
    """None: found out from the heading."""
    quote: str = '"'
    """Encloses a cell that holds a delimiter or line end; empty: nothing does."""
    columns: list[str] = []
    """Names of the columns of files without a heading."""


PLAIN = Dialect()


class Heading(msgspec.Struct, frozen=True):
    """What the first line of a file says."""

    delimiter: str
    columns: list[str]
    offset: int
    """Bytes before the first record."""
    line: int
    """Line that the first record starts on."""
    quote: str = '"'
    """Empty if nothing encloses cells."""


def read_heading(data: bytes, whole: bool, name: str, dialect: Dialect = PLAIN) -> Heading | None:
    """The heading of a file that begins with `data`.

    The delimiter, if it is not named, is the one of comma, semicolon, tab and bar that stands most often in the first
    record outside quotes. Where the columns are named, the file has no heading and its first record is data.

    Args:
        data: The file's first bytes, `HEADING_BYTES` or fewer.
        whole: Whether that is all of the file.
        name: For messages.
        dialect: What the job says.

    Returns:
        None for a file without anything but blanks.

    Raises:
        UserError: The text is not UTF-8, or the heading lacks a name, repeats one or does not end.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _not_utf8(name, "UTF-16")
    start = 0
    while data.startswith(BOM, start):  # some programs write a second one
        start += len(BOM)
    if not data[start:].strip():
        return None
    begin = len(data) - len(data[start:].lstrip(b"\r\n"))
    end = _record_end(data, begin, dialect.quote)
    if end is None:
        if not whole or (dialect.quote and data.count(dialect.quote.encode(), begin) % 2):
            raise UserError("the heading does not end", where=f"{name}:1", fix="close its quotes; it must be one line")
        end = len(data)
    after = end + (2 if data[end : end + 2] == b"\r\n" else 1 if end < len(data) else 0)
    if b"\0" in data[begin:end]:
        raise _not_utf8(name, "UTF-16 or no text at all")
    try:
        text = data[begin:end].decode("utf-8")
    except UnicodeDecodeError as error:
        if dialect.columns:  # a record like any other: it goes to quarantine
            text = data[begin:end].decode("utf-8", "replace")
        else:
            raise _not_utf8(name, f"the byte {data[begin + error.start]:#04x} in the heading") from None
    delimiter = dialect.delimiter or _delimiter(text, dialect)
    try:
        columns = next(records_of(io.StringIO(text, newline=""), delimiter, dialect.quote))
    except csv.Error:
        raise UserError(
            "text follows the closing quote of a column's name",
            where=f"{name}:1",
            expected='a name in quotes with each quote inside it written ""',
            found=text[:200],
            fix="correct the heading, or name the quote that the file uses with data.read.quote",
        ) from None
    if dialect.columns:
        if columns == dialect.columns:
            raise UserError(
                "the file has a heading, which would become a row",
                where=name,
                expected="a file without a heading, as data.read.columns names its columns",
                found=text[:200],
                fix="leave data.read.columns out",
            )
        return Heading(delimiter, dialect.columns, start, 1, dialect.quote)
    line = 1 + _line_ends(np.frombuffer(data[:after], np.uint8))
    _check_columns(columns, f"{name}:{line - 1 if after > end else line}")
    return Heading(delimiter, columns, after, line, dialect.quote)


def records_of(lines: Iterable[str], delimiter: str, quote: str) -> Any:
    """The records of Python's csv module; an object of its with `line_num`.

    It is strict, so that no character is lost: text after the closing quote of a cell is an error of its record, a cell
    that is open at the end an error of the last.
    """
    if quote:
        return csv.reader(lines, delimiter=delimiter, quotechar=quote, strict=True)
    return csv.reader(lines, delimiter=delimiter, quotechar=None, quoting=csv.QUOTE_NONE)


def check_columns(columns: list[str], where: str) -> None:
    """Every column needs a name of its own.

    Raises:
        UserError: A name is empty or stands twice.
    """
    _check_columns(columns, where)


def _check_columns(columns: list[str], where: str) -> None:
    unnamed = [str(index + 1) for index, column in enumerate(columns) if not column.strip()]
    if unnamed:
        raise UserError(
            f"column {', '.join(unnamed)} has no name",
            where=where,
            expected="a heading that names every column",
            fix="name it, or write the file without it (pandas: to_csv(..., index=False))",
        )
    twice = (
        sorted({column for column in columns if columns.count(column) > 1}) if len(set(columns)) < len(columns) else []
    )
    if twice:
        raise UserError(
            "two columns have the same name",
            where=where,
            expected="each column name once",
            found=", ".join(map(repr, twice)),
            fix="rename one of them in the file",
        )


class Scan(msgspec.Struct, frozen=True):
    """What one byte range says about itself without knowing what precedes it."""

    line_ends: int
    quotes: int
    regular: tuple[bool, bool]
    """Whether its quotes follow the rules if it begins outside, and if it begins inside a quoted cell."""


def scan(body: bytes | memoryview, before: int, after: int, delimiter: str) -> Scan:
    """Count line ends and quotes of a byte range, and check every quote's place.

    Args:
        body: The range.
        before: The byte before it; LF if it begins a record.
        after: The byte after it; LF at the end of the file.
        delimiter: One character.
    """
    plain = np.frombuffer(body, np.uint8)
    if not (plain == _QUOTE).any() and not (plain == _CR).any():  # most text, and a third of the time
        return Scan(int(np.count_nonzero(plain == _LF)), 0, (True, True))
    text = np.frombuffer(b"".join([bytes([before]), body, bytes([after])]), np.uint8)
    quotes = np.flatnonzero(text[1:-1] == _QUOTE) + 1
    lone = _lone_returns(text)
    lone = lone[(lone > 0) & (lone < len(text) - 1)]
    opens = _is_any(text[quotes - 1], (ord(delimiter), _LF, _QUOTE))
    closes = _is_any(text[quotes + 1], (ord(delimiter), _LF, _CR, _QUOTE))
    lone_inside = np.searchsorted(quotes, lone) % 2 == 1
    outside = bool(opens[0::2].all() and closes[1::2].all() and lone_inside.all())
    inside = bool(closes[0::2].all() and opens[1::2].all() and not lone_inside.any())
    line_ends = int(np.count_nonzero(text[1:-1] == _LF)) + len(lone)
    return Scan(line_ends, len(quotes), (outside, inside))


@dataclass(frozen=True)
class Records:
    """The records of some text, blank ones left out."""

    starts: np.ndarray
    """int64 [N]: byte offset of each record."""
    ends: np.ndarray
    """int64 [N]: offset of its line end, or of the text's end."""
    lines: np.ndarray
    """int64 [N]: line ends before it."""
    cells: np.ndarray
    """int64 [N]: number of its cells."""
    multiline: bool
    """Whether a line end stands inside a quoted cell."""


def records(body: bytes, delimiter: str) -> Records | None:
    """The records of a text that begins with a record and ends with one; None if the text is irregular."""
    text = np.frombuffer(body, np.uint8)
    separators = np.flatnonzero((text == _LF) | (text == ord(delimiter)))
    lone = _lone_returns(text) if _CR in body else separators[:0]
    line_ends = None
    if _QUOTE in body or len(lone):
        if not scan(body, _LF, _LF, delimiter).regular[0]:
            return None
        inside = np.cumsum(text == _QUOTE, dtype=np.uint8) & 1
        if len(text) and inside[-1]:
            return None
        feeds = separators[text[separators] == _LF]
        line_ends = np.sort(np.concatenate([feeds, lone]))
        separators = separators[inside[separators] == 0]
    at = np.flatnonzero(text[separators] == _LF)
    breaks = separators[at]
    starts = np.concatenate([[0], breaks + 1])
    ends = np.concatenate([breaks, [len(text)]])
    cells = np.diff(at, prepend=-1, append=len(separators))
    blank = (
        (ends == starts) | ((ends == starts + 1) & (text[np.minimum(starts, len(text) - 1)] == _CR))
        if len(text)
        else [True]
    )
    full = np.flatnonzero(~np.asarray(blank))
    if line_ends is None or len(line_ends) == len(breaks):
        return Records(starts[full], ends[full], full, cells[full], False)
    return Records(starts[full], ends[full], np.searchsorted(line_ends, starts[full]), cells[full], True)


def last_record_end(body: bytes) -> int:
    """The offset after the last line end outside quotes of a text that begins with a record; 0 if there is none."""
    if _QUOTE not in body:
        return body.rfind(b"\n") + 1
    text = np.frombuffer(body, np.uint8)
    inside = np.cumsum(text == _QUOTE, dtype=np.uint8) & 1
    ends = np.flatnonzero((text == _LF) & (inside == 0))
    return int(ends[-1]) + 1 if len(ends) else 0


def record_start(body: bytes, in_quotes: bool) -> int | None:
    """The offset after the first line end outside quotes; None if there is none."""
    position = 0
    inside = in_quotes
    while True:
        end = body.find(b"\n", position)
        if end < 0:
            return None
        inside ^= body.count(b'"', position, end) % 2 == 1
        if not inside:
            return end + 1
        position = end + 1


def line_ends(body: bytes) -> int:
    """How many lines end in a text that does not end between CR and LF."""
    return _line_ends(np.frombuffer(body, np.uint8))


def _line_ends(text: np.ndarray) -> int:
    return int(np.count_nonzero(text == _LF)) + len(_lone_returns(text))


def _lone_returns(text: np.ndarray) -> np.ndarray:
    """Positions of CR that no LF follows."""
    returns = np.flatnonzero(text == _CR)
    if not len(returns):
        return returns
    following = np.append(text, 0)[returns + 1]
    return returns[following != _LF]


def _record_end(data: bytes, begin: int, quote: str) -> int | None:
    text = np.frombuffer(data, np.uint8)[begin:]
    at_end = (text == _LF) | (text == _CR)
    if quote:
        at_end &= (np.cumsum(text == ord(quote)) & 1) == 0
    ends = np.flatnonzero(at_end)
    return begin + int(ends[0]) if len(ends) else None


def _delimiter(heading: str, dialect: Dialect) -> str:
    bare = "".join(heading.split(dialect.quote)[0::2]) if dialect.quote else heading
    return max(DELIMITERS, key=bare.count)


def _is_any(values: np.ndarray, wanted: tuple[int, ...]) -> np.ndarray:
    table = np.zeros(256, bool)
    table[list(wanted)] = True
    return table[values]


def _not_utf8(name: str, found: str) -> UserError:
    return UserError(
        "the file is not UTF-8 text",
        where=name,
        expected="UTF-8, with or without a byte-order mark",
        found=found,
        fix="name its encoding, such as data.read.encoding: cp1252 (of Western European Windows) or utf-16",
    )
