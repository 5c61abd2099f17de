"""JSON Lines and plain text as columns of text, one record a line; and the bytes behind compressions and encodings.

A line ends with LF or CR LF and with nothing else: U+2028, U+0085, a vertical tab or a lone CR are characters of it.

JSON Lines: every line is an object. Nested objects are flattened (`{"a": {"b": 1}}` is the column `a.b`), an absent key
and null are missing cells, and a value is read as its text, as a CSV cell is: the type of a column is decided over the
whole data by the same rules, and `5` and `"5"` are the same cell. The columns are the keys of the first `HEAD_BYTES` of
a file; a line that is no object, holds a list, repeats a key or has another key is invalid.

Plain text: one column, `text`.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from raylway.data.csv_text import Heading, check_columns
from raylway.data.files import Location
from raylway.errors import UserError

HEAD_BYTES = 4 << 20
TEXT_COLUMN = "text"
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_STEP = 1 << 20


class Line(Exception):
    """Why a line is no record."""


def open_bytes(location: Location) -> BinaryIO:
    """The file's text as UTF-8 bytes, unpacked.

    Raises:
        UserError: It is not in the encoding that the job names.
    """
    file = _unpacked(location)
    encoding = location.encoding
    if encoding == "auto":
        encoding = next((name for mark, name in _BOMS if _begins_with(location, mark)), "")
    if not encoding or codecs.lookup(encoding).name == "utf-8":
        return file
    return io.BufferedReader(_Recoded(file, encoding, location.name))


def is_recoded(location: Location) -> bool:
    """Whether the text that is read has other bytes than the file, so that it can't be cut by them."""
    if location.encoding == "auto":
        return any(_begins_with(location, mark) for mark, _ in _BOMS)
    return codecs.lookup(location.encoding).name != "utf-8"


def heading(location: Location, data: bytes) -> Heading | None:
    """The columns of a file that begins with `data`; None if there is no line.

    Raises:
        UserError: No line is a record, or a column has no name.
    """
    if location.format == "text":
        return Heading("", [TEXT_COLUMN], 0, 1) if data else None
    columns: dict[str, None] = {}
    lines = [line for line in data.split(b"\n") if line.strip()]
    why = ""
    for line in lines if len(data) < HEAD_BYTES or len(lines) < 2 else lines[:-1]:
        try:
            columns |= dict.fromkeys(_flat(line))
        except Line as error:
            why = why or str(error)
    if not lines:
        return None
    if not columns:
        raise UserError(
            "no line is a JSON object", where=location.name, expected='one object a line, {"column": value}', found=why
        )
    check_columns(list(columns), location.name)
    return Heading("", list(columns), 0, 1)


def read(location: Location, columns: list[str], step: int) -> Iterator[tuple[dict[str, pa.Array], np.ndarray, list]]:
    """The records of a file, about `step` bytes at a time.

    Returns:
        Text by column, the line of each record (int64), and of each line that is none its number, reason and text.
    """
    known = set(columns)
    with open_bytes(location) as file:
        first = 1
        while lines := file.readlines(step):
            rows: list[dict[str, str | None]] = []
            numbers: list[int] = []
            refused: list[tuple[int, str, str]] = []
            for number, raw in enumerate(lines, first):
                line = raw.removesuffix(b"\n").removesuffix(b"\r")
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    row = _record(location, line, known)
                except Line as error:
                    refused.append((number, str(error), line.decode("utf-8", "backslashreplace")[:10_000]))
                    continue
                if row is not None:
                    rows.append(row)
                    numbers.append(number)
            arrays = {name: pa.array([row.get(name) for row in rows], pa.string()) for name in columns}
            yield arrays, np.array(numbers, np.int64), refused
            first += len(lines)


def _record(location: Location, line: bytes, known: set[str]) -> dict[str, str | None] | None:
    """A line's cells; None for a blank line of JSON."""
    if location.format == "text":
        try:
            return {TEXT_COLUMN: line.decode("utf-8") or None}
        except UnicodeDecodeError:
            raise Line("the line is not UTF-8") from None
    if not line.strip():
        return None
    row = _flat(line)
    if further := [name for name in row if name not in known]:
        raise Line(f"the key {further[0]!r} is none of the columns")
    return row


def _flat(line: bytes) -> dict[str, str | None]:
    try:
        value = json.loads(line, object_pairs_hook=_pairs, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise Line(f"the line is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise Line("the line is no JSON object")
    row: dict[str, str | None] = {}
    _flatten(value, "", row)
    return row


def _flatten(value: dict[str, Any], prefix: str, row: dict[str, str | None]) -> None:
    for key, cell in value.items():
        name = prefix + key
        if isinstance(cell, dict):
            _flatten(cell, f"{name}.", row)
        elif isinstance(cell, list):
            raise Line(f"the key {name!r} holds a list")
        elif name in row:
            raise Line(f"the key {name!r} stands twice")
        elif isinstance(cell, bool):
            row[name] = "true" if cell else "false"
        else:
            row[name] = cell or None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _unpacked(location: Location) -> BinaryIO:
    match location.compression:
        case "zip":
            archive = zipfile.ZipFile(location.path)
            return archive.open(location.member or archive.namelist()[0])  # type: ignore[return-value]
        case "gz":
            return gzip.open(location.path)  # type: ignore[return-value]
        case "bz2":
            return bz2.open(location.path)  # type: ignore[return-value]
        case "zst":
            return io.BufferedReader(_Zstandard(location.path))
    return Path(location.path).open("rb")


def _begins_with(location: Location, mark: bytes) -> bool:
    with _unpacked(location) as file:
        return file.read(len(mark)) == mark


class _Zstandard(io.RawIOBase):
    """The frames of a .zst file one after the other."""

    def __init__(self, path: str) -> None:
        self._source = pa.CompressedInputStream(pa.OSFile(path), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            content = self._source.read(len(buffer))
        except OSError as error:
            raise EOFError(str(error)) from None
        buffer[: len(content)] = content
        return len(content)


class _Recoded(io.RawIOBase):
    """Text of another encoding as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str, name: str) -> None:
        self._file, self._name, self._encoding = file, name, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._left, self._read = b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._left:
            chunk = self._file.read(_STEP)
            try:
                self._left = self._decoder.decode(chunk, final=not chunk).encode()
            except UnicodeError as error:
                at = f" at about byte {self._read + error.start:,}" if isinstance(error, UnicodeDecodeError) else ""
                raise UserError(
                    f"the file is not {self._encoding} text",
                    where=self._name,
                    found=f"{getattr(error, 'reason', error)}{at}",
                    fix="name its encoding with data.read.encoding",
                ) from None
            self._read += len(chunk)
            if not chunk:
                break
        taken, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)
