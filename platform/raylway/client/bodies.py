"""Rows as request bodies that the service takes: tables cut into several, JSON without NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from raylway.client.answers import Problem, RequestFailed

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    Rows: TypeAlias = Iterable[Mapping[str, Any]] | pd.DataFrame | pa.Table | pa.RecordBatch
MOST_BYTES = 8 << 20
"""Of a body; the service takes 16 MiB."""
MOST_ROWS = 8192
"""Of a request: an answer in seconds, and room for others in the service's queue between two of them."""
_MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Body:
    """One request's."""

    content: bytes
    first_row: int
    """Of the call."""


def records(rows: Rows) -> list[dict[str, Any]]:
    """The rows of whatever holds some. Of a table NaN and NaT are missing cells."""
    if hasattr(rows, "__arrow_c_stream__") or hasattr(rows, "__arrow_c_array__"):
        import pyarrow as pa

        table: Any = rows
        if hasattr(rows, "iloc"):  # pandas, whose index is no column
            return pa.Table.from_pandas(table, preserve_index=False).to_pylist()
        return (pa.table(table) if hasattr(rows, "__arrow_c_stream__") else pa.record_batch(table)).to_pylist()
    return [dict(row) for row in rows]


def bodies(rows: Sequence[Mapping[str, Any]], ids: Sequence[str | int] | None) -> Iterator[Body]:
    """The bodies that ask all rows, in their order; one if there are none.

    Raises:
        RequestFailed: A number is infinite, or a value is of a type that JSON has not.
    """
    _refuse_infinite(rows)
    encoder = msgspec.json.Encoder(enc_hook=_plain, decimal_format="number")
    try:
        encoded = [encoder.encode(row) for row in rows]
    except TypeError as error:
        raise RequestFailed(None, f"the rows can't be sent: {error}", [], "") from None
    start = 0
    while True:
        stop, size = start, 0
        while stop < len(encoded) and stop - start < MOST_ROWS:
            size += len(encoded[stop]) + 1
            if size > MOST_BYTES and stop > start:
                break
            stop += 1
        content = b'{"rows":[' + b",".join(encoded[start:stop]) + b"]"
        if ids is not None:
            content += b',"ids":' + msgspec.json.encode(list(ids[start:stop]))
        yield Body(content + b"}", start)
        start = stop
        if start >= len(encoded):
            return


def _refuse_infinite(rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON has no infinity; the encoder would make it a missing cell."""
    problems = [
        Problem(place, name, "is not a finite number")
        for place, row in enumerate(rows)
        for name, value in row.items()
        if isinstance(value, float) and math.isinf(value)
    ]
    if problems:
        raise RequestFailed(None, "infinite numbers can't be sent", problems[:_MOST_PROBLEMS], "")


def _plain(value: Any) -> Any:
    """A scalar of NumPy or pandas as Python's own; NaT and pandas' NA are missing."""
    if type(value).__name__ in {"NaTType", "NAType"}:
        return None
    if hasattr(value, "to_pydatetime"):
        return value.to_pydatetime(warn=False)
    if type(value).__name__ == "datetime64":  # NaT gives None
        return value.astype("datetime64[us]").item()
    if hasattr(value, "item"):
        plain = value.item()
        if isinstance(plain, float) and math.isinf(plain):
            raise TypeError("a number is infinite")
        return plain
    raise TypeError(f"{type(value).__module__}.{type(value).__name__} is no number, text, boolean, date or time")
