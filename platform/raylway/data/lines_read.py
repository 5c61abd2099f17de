"""JSON Lines and plain text: one row a line.

A line ends with LF (a CR before it belongs to the line end); no other character ends one, so that a file can be cut at
any LF. The last line end begins no further row.

JSON Lines: a line holds one object. Objects inside it are flattened, `{"a": {"b": 1}}` to the column `a.b`; a key that
is absent, null, "" or NaN is a missing cell; lists are refused unless the job drops the column. Cells travel as text
with a mark before it that tells what they were, so that the types can be decided over the whole data (`split_cells`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.data import columns as typed
from raylway.data import packed
from raylway.data.columns import Seen
from raylway.data.csv_read import RANGE_BYTES, Parsed, Reject, Span
from raylway.data.csv_text import Heading
from raylway.data.location import Location

TEXT = "text"
"""The one column of a text file."""
JSON_KINDS = {"s": "JSON text", "n": "JSON number", "b": "JSON boolean"}
_BOM = b"\xef\xbb\xbf"
_LONGEST_SHOWN = 10_000


class _Number(str):
    """A number as it is written."""

    __slots__ = ()


class _Pairs(list):
    """The keys and values of an object, in order."""


class _BadLineError(Exception):
    pass


def bodies(location: Location, heading: Heading, step: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines of a file, about `step` bytes at a time, and the line that each text starts on."""
    with packed.text_of(location) as file:
        packed.exactly(file, heading.offset)
        line, carry = 1, b""
        while chunk := packed.exactly(file, step):
            body = carry + chunk
            cut = body.rfind(b"\n") + 1
            if cut:
                yield body[:cut], line
                line += body.count(b"\n", 0, cut)
            carry = body[cut:]
        if carry:
            yield carry, line


def body_of(part: Span, heading: Heading) -> tuple[bytes, int]:
    """The lines that begin inside a span of a plain file, and the line that they start on."""
    with packed.opened(part.location) as file:
        file.seek(part.start - 1 if part.start else 0)
        text = file.read(part.end - file.tell())
        first = 0
        if part.start > heading.offset:
            first = text.find(b"\n") + 1
            if not first or first > part.end - part.start:
                return b"", part.line
        else:
            text = text[1 if part.start else 0 :]
        body, line = text[first:], part.line + text.count(b"\n", 1, first)
        while not body.endswith(b"\n") and (more := file.read(RANGE_BYTES)):
            cut = more.find(b"\n") + 1
            body += more[:cut] if cut else more
            if cut:
                break
    return body, line


def offset(begin: bytes) -> int:
    """Bytes before the first line."""
    return len(_BOM) if begin.startswith(_BOM) else 0


def parse_text(body: bytes, line: int) -> Parsed:
    """Each line as one text; an empty line is a missing cell."""
    lines = _lines(body)
    texts: list[str | None] = []
    numbers: list[int] = []
    rejects = []
    for number, raw in enumerate(lines, line):
        try:
            texts.append(raw.decode() or None)
            numbers.append(number)
        except UnicodeDecodeError:
            rejects.append(Reject(number, TEXT, "the cell is not UTF-8", _shown(raw)))
    return Parsed({TEXT: pa.array(texts, pa.string())}, np.array(numbers, np.int64), rejects)


def parse_json(body: bytes, line: int, columns: list[str]) -> Parsed:
    """Each line as one object; lines that are none become rejects, blank lines nothing.

    Args:
        body: The lines.
        line: The first one's number.
        columns: The columns to read.
    """
    cells: dict[str, list[str | None]] = {name: [] for name in columns}
    numbers: list[int] = []
    rejects = []
    for number, raw in enumerate(_lines(body), line):
        if not raw.strip():
            continue
        try:
            row = _flat(raw)
            for name, column in cells.items():
                column.append(_cell(row.get(name)))
            numbers.append(number)
        except _BadLineError as error:
            rejects.append(Reject(number, None, str(error), _shown(raw)))
    arrays = {name: pa.array(column, pa.string()) for name, column in cells.items()}
    return Parsed(arrays, np.array(numbers, np.int64), rejects)


def keys(body: bytes, line: int) -> tuple[dict[str, bool], dict[str, int]]:
    """The columns of some lines, each with whether it has a value; and the first line of each that holds a list."""
    found: dict[str, bool] = {}
    lists: dict[str, int] = {}
    for number, raw in enumerate(_lines(body), line):
        try:
            row = _flat(raw) if raw.strip() else {}
        except _BadLineError:
            continue
        for name, value in row.items():
            found[name] = found.get(name, False) or value is not None
            if type(value) is list:
                lists.setdefault(name, number)
    return found, lists


def split_cells(cells: pa.Array, row_ids: np.ndarray, as_text: bool, declared: bool) -> tuple[pa.Array, Seen]:
    """A column of marked cells in a stored form (`columns.examine`).

    Args:
        cells: As `parse_json` gives them.
        row_ids: uint64 [N].
        as_text: Whether the column is known to be text.
        declared: Whether the job declares numbers.
    """
    encoded = cells.dictionary_encode()
    marks = pc.utf8_slice_codeunits(encoded.dictionary, 0, 1)
    kinds = sorted(JSON_KINDS[mark] for mark in pc.unique(marks).to_pylist())
    texts = pc.utf8_slice_codeunits(encoded.dictionary, 1, None)
    if len(kinds) > 1:  # "1" and 1 are one text now
        texts = texts.take(encoded.indices)
        encoded = texts.dictionary_encode()
    else:
        encoded = pa.DictionaryArray.from_arrays(encoded.indices, texts)
    keep = as_text or (kinds != ["JSON number"] and not declared)
    stored, seen = typed.examine(encoded, row_ids, keep, source=kinds[0] if kinds else "null")
    seen.sources = kinds
    return stored, seen


def unmarked(table: pa.Table) -> pa.Table:
    """The table with its marked cells as plain text."""
    for index, kind in enumerate(table.schema.types):
        if pa.types.is_string(kind):
            cells = pc.utf8_slice_codeunits(table.column(index), 1, None)
            table = table.set_column(index, table.column_names[index], cells)
    return table


def _flat(raw: bytes) -> dict[str, Any]:
    """The cells of a line: text, `_Number`, bool, list or None."""
    try:
        value = _DECODER.decode(raw.decode())
    except UnicodeDecodeError:
        raise _BadLineError("the line is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _BadLineError(f"the line is not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise _BadLineError("the line is not JSON that can be read: it is nested too deeply") from None
    if type(value) is not _Pairs:
        raise _BadLineError("the line is no JSON object")
    row: dict[str, Any] = {}
    _flatten(value, "", row)
    return row


def _flatten(pairs: _Pairs, prefix: str, row: dict[str, Any]) -> None:
    for key, value in pairs:
        name = prefix + key
        if type(value) is _Pairs:
            _flatten(value, f"{name}.", row)
            continue
        if name in row:
            raise _BadLineError(f"the key {name!r} stands twice")
        row[name] = value


def _cell(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if type(value) is _Number:
        return f"n{value}"
    if type(value) is bool:
        return "btrue" if value else "bfalse"
    text = _text(value) if type(value) is list else value
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadLineError("the line holds half of a surrogate pair") from None
    return f"s{text}"


def _text(value: Any) -> str:
    """As JSON, numbers as they are written."""
    if type(value) is list:
        return f"[{', '.join(map(_text, value))}]"
    if type(value) is _Pairs:
        return f"{{{', '.join(f'{json.dumps(key)}: {_text(each)}' for key, each in value)}}}"
    return value if type(value) is _Number else json.dumps(value, ensure_ascii=False)


def _constant(name: str) -> _Number | None:
    return None if name == "NaN" else _Number(name)


def _pairs(pairs: list[tuple[str, Any]]) -> _Pairs:
    if len({key for key, _ in pairs}) < len(pairs):
        names = [key for key, _ in pairs]
        raise _BadLineError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return _Pairs(pairs)


def _lines(body: bytes) -> list[bytes]:
    lines = body.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [raw[:-1] if raw.endswith(b"\r") else raw for raw in lines]


def _shown(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")[:_LONGEST_SHOWN]


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_Number, parse_int=_Number, parse_constant=_constant)
