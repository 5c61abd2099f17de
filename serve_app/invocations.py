"""MLflow's scoring protocol: `POST /invocations` takes what its clients send (mlflow.org, "Deploy MLflow Model").

JSON has one of `dataframe_split`, `dataframe_records`, `instances` and `inputs`; CSV has a line of names first. MLflow
writes what a pandas DataFrame lacks as `NaN`, which is not JSON: here, and only here, it is read, as a missing cell.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.csv

from raylway.bundle.mistakes import Form as RowForm
from raylway.bundle.mistakes import InvalidRows, Problem
from raylway.bundle.rows import NotJson, Rows
from raylway.features import texts
from serve_app.forms import Asked, Headers, Model, Reply, decoded, unreadable

CSV = b"text/csv"
_KEYS = ("dataframe_split", "dataframe_records", "instances", "inputs")


class Invocations:
    """See `serve_app.forms.Form`."""

    name = "invocations"
    media_types: tuple[bytes, ...] = (CSV,)

    def __init__(self, model: Model) -> None:
        self._model = model
        self._kinds = {each.name: each.type for each in model.signature.inputs}
        self._missing = texts.MissingCells(model.signature.missing)

    def read(self, body: bytes, headers: Headers) -> Asked:
        """See there."""
        is_csv = headers.get(b"content-type", b"").partition(b";")[0].strip().lower() == CSV
        return Asked(self._of_csv(body) if is_csv else self._of_json(body), self._reply)

    def _reply(self, outputs: np.ndarray) -> Reply:
        return Reply(msgspec.json.encode(self._model.answer(outputs)))

    def _of_json(self, body: bytes) -> Rows:
        content = _with_nan(body) if b"NaN" in body else decoded(body)
        keys = set(content) - {"params"} if type(content) is dict else set()
        if len(keys) != 1 or not keys <= set(_KEYS):
            _refuse(f"expected an object with one of the keys {', '.join(_KEYS)}")
        if content.get("params"):
            _refuse("this model takes no params")
        (key,) = keys
        value = content[key]
        if key == "dataframe_split":
            return self._split(value)
        if key == "inputs" and type(value) is dict:
            return self._of_columns(value)
        form: RowForm = "rows" if type(value) is list and value and type(value[0]) is dict else "data"
        if key == "dataframe_records":
            form = "rows"
        if type(value) is not list:
            _refuse(f'expected a list under "{key}"')
        return self._model.reader.convert(form, value)

    def _split(self, value: Any) -> Rows:
        if type(value) is not dict or not {"columns", "data"} <= value.keys() <= {"columns", "data", "index"}:
            _refuse('expected "columns" and "data", and at most "index" beside them, under "dataframe_split"')
        columns, rows = value["columns"], value["data"]
        if not _are_names(columns) or type(rows) is not list:
            _refuse('expected different names under "columns" and a list of rows under "data"')
        wrong = [at for at, row in enumerate(rows) if type(row) is not list or len(row) != len(columns)]
        if wrong:
            _refuse(f"expected a list of {len(columns)} values, one for each column", row=wrong[0])
        return self._model.reader.convert("rows", [dict(zip(columns, row, strict=True)) for row in rows])

    def _of_columns(self, columns: dict[str, Any]) -> Rows:
        lengths = {len(column) if type(column) is list else -1 for column in columns.values()}
        if -1 in lengths or len(lengths) > 1:
            _refuse("expected a list of the same length for each feature")
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return self._model.reader.convert("rows", rows)

    def _of_csv(self, body: bytes) -> Rows:
        try:
            body.decode()
            table = pyarrow.csv.read_csv(
                pa.BufferReader(body),
                parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(
                    check_utf8=False, strings_can_be_null=False, default_column_type=pa.string()
                ),
            )
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise unreadable("CSV", error) from None
        if not _are_names(table.column_names):
            _refuse("expected different names in the first line")
        columns = {name: self._cells(name, table[name].combine_chunks()) for name in table.column_names}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return self._model.reader.convert("rows", rows)

    def _cells(self, name: str, column: pa.Array) -> list[Any]:
        """The cells of a column as JSON values: texts, and where the model takes numbers what they say."""
        values = column.to_pylist()
        if self._kinds.get(name) != "number":
            return values
        read = texts.numbers(column)
        nothing = texts.missing_words(column)
        if self._missing:
            nothing |= self._missing.in_texts(column)
        floats = read.floats.tolist()
        for at in np.flatnonzero(nothing | ~read.is_number).tolist():
            floats[at] = None if nothing[at] else values[at]
        return floats


def _with_nan(body: bytes) -> Any:
    """JSON in which `NaN` stands for a missing cell."""
    try:
        content = json.loads(body, parse_constant=_constant)
        json.dumps(content, ensure_ascii=False).encode()  # the standard library lets half of a surrogate pair through
        return content
    except RecursionError:
        raise NotJson("nested too deeply") from None
    except ValueError as error:
        raise NotJson(str(error)) from None


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is not JSON")


def _are_names(names: Any) -> bool:
    return type(names) is list and all(type(name) is str for name in names) and len(set(names)) == len(names)


def _refuse(reason: str, row: int | None = None) -> NoReturn:
    raise InvalidRows([Problem(row, None, reason)])
