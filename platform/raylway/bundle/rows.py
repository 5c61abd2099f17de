"""JSON request bodies checked against a signature: all rows become columns, or every mistake is named.

Types made from the signature let msgspec decode and check a body in one pass; they alone decide what is accepted. Only
a body that they refuse is read a second time, at leisure, to say what is wrong with each row.

What is accepted, the same in both forms:
- `number`: a JSON number, not text, not a boolean, not infinite.
- `category`: text, a number or a boolean, compared by the name of the category as in files (`texts.category_names`).
  One that training did not see is accepted and gets the code of the unknown.
- `date`: the text of a date or time (`features.dates`), such as `2013-01-01T05:00:00Z`.
- `null`, a left-out feature, or a text that is a missing cell in files (`""`; `"NA"` unless the column held text): only
  where the signature says `required: false`; what stood in for missing cells in training stands in.
- a key that is no feature is refused: a misspelt optional feature would otherwise be filled in silently.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from operator import itemgetter
from typing import Annotated, Any, NamedTuple, NoReturn

import msgspec
import numpy as np
import pyarrow as pa

from raylway.bundle.mistakes import (
    INT64,
    Form,
    InvalidRows,
    Mistakes,
    Problem,
    as_names,
    holds_infinity,
    holds_no_date,
    is_missing,
)
from raylway.features.schema import canonical_text
from raylway.features.signature import Input, Signature
from raylway.features.texts import MissingCells

_Whole = Annotated[int, msgspec.Meta(ge=-INT64, le=INT64 - 1)]
_Category = str | _Whole | float | bool


class NotJson(Exception):
    """The body is not JSON; the message says why."""


@dataclass(frozen=True)
class Rows:
    """N checked rows as columns."""

    numbers: np.ndarray
    """float64 [N, inputs of type number], in the order of the signature; NaN is missing."""
    categories: list[list[Any]]
    """For each input of type category or date N JSON scalars, texts as the names of categories; None is missing."""

    def __len__(self) -> int:
        return len(self.numbers)

    def part(self, start: int, stop: int) -> Rows:
        """The rows from `start` up to `stop`."""
        return Rows(self.numbers[start:stop], [column[start:stop] for column in self.categories])

    def texts(self) -> list[pa.Array]:
        """The names of each category column; a date is its text as it came."""
        return [pa.array(list(map(_text, column)), pa.string()) for column in self.categories]

    def table(self, signature: Signature) -> pa.Table:
        """The rows as a typed table: float64 for numbers, text for all else; missing is null."""
        numbers = iter(self.numbers.T)
        texts = iter(self.texts())
        columns = {
            each.name: pa.array(next(numbers), pa.float64(), from_pandas=True) if each.type == "number" else next(texts)
            for each in signature.inputs
        }
        return pa.table(columns) if columns else pa.table({})


class Asked(NamedTuple):
    """A request's rows."""

    form: Form
    rows: Rows
    ids: list[str | int] | None
    """What the client calls its rows, one a row, if it sent that."""


def joined(parts: list[Rows]) -> Rows:
    """The rows of all parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(part.categories for part in parts), strict=True)
    return Rows(
        np.concatenate([part.numbers for part in parts]),
        [[value for piece in pieces for value in piece] for pieces in columns],
    )


class RowReader:
    """Reads request bodies for one signature; safe to share between threads."""

    def __init__(self, signature: Signature) -> None:
        self._inputs = {each.name: each for each in signature.inputs}
        self._type: Any = None if any(map(_is_escaped, self._inputs)) else _body_type(signature.inputs)
        self._decoder: Any = None if self._type is None else msgspec.json.Decoder(self._type)
        kinds = [each.type for each in signature.inputs]
        self._numbers = [index for index, kind in enumerate(kinds) if kind == "number"]
        self._categories = [index for index, kind in enumerate(kinds) if kind != "number"]
        self._texts = [signature.inputs[index] for index in self._categories]
        self._required = [signature.inputs[index].required for index in self._numbers]
        self._missing = MissingCells(signature.missing)
        self._mistakes = Mistakes(signature)

    def read(self, body: bytes) -> Asked:
        """Check a body of either form, `{"rows": [{"feature": value}]}` or `{"data": [[value]]}`.

        The lists of `data` hold the features in the order of the signature. Beside `rows` may stand `ids`, a text or
        whole number for each row.

        Raises:
            NotJson: It is not JSON (which also knows no NaN and no Infinity), or nested too deeply.
            InvalidRows: A row can't be answered; names each mistake, up to `MOST_PROBLEMS`.
        """
        if self._decoder is None:
            return self._read_plainly(body)
        try:
            decoded = self._decoder.decode(body)
        except msgspec.ValidationError as error:
            self._explain(body, str(error))
        except (ValueError, RecursionError) as error:  # msgspec's DecodeError and UnicodeDecodeError are ValueErrors
            raise NotJson(_reason(error)) from None
        if (decoded.rows is msgspec.UNSET) == (decoded.data is msgspec.UNSET):
            self._explain(body, "")
        form: Form = "rows" if decoded.data is msgspec.UNSET else "data"
        ids = None if decoded.ids is msgspec.UNSET else decoded.ids
        if ids is not None and (form == "data" or len(ids) != len(decoded.rows)):
            self._explain(body, "")
        rows = self._columns(decoded.rows if form == "rows" else decoded.data)
        if self._misses(rows):
            self._explain(body, "")
        return Asked(form, rows, ids)

    def convert(self, form: Form, rows: list[Any]) -> Rows:
        """Check rows that were read from another format, by the same rules.

        Args:
            form: As in `read`.
            rows: JSON values; a float that is NaN is a missing cell, an infinite one a mistake.

        Raises:
            InvalidRows: As in `read`.
        """
        if (found := self._converted(form, rows)) is not None:
            return found
        rows = [_without_nan(row) for row in rows]
        if problems := self._mistakes.of({form: rows}):
            raise InvalidRows(problems)
        return self._columns_of(self._listed(form, rows))

    def _converted(self, form: Form, rows: list[Any]) -> Rows | None:
        """Rows that are plainly good."""
        if self._type is None:
            return None
        try:
            decoded: Any = msgspec.convert({form: rows}, self._type)
        except msgspec.ValidationError:
            return None
        found = self._columns(decoded.rows if form == "rows" else decoded.data)
        odd = np.isinf(found.numbers).any() or np.isnan(found.numbers[:, self._required]).any()
        return None if odd or any(map(_holds_odd_float, found.categories)) or self._misses(found) else found

    def _misses(self, rows: Rows) -> bool:
        """Whether a value is missing where it must not be, or none of its type's."""
        return any(map(_holds_misfits, self._texts, rows.categories)) or bool(
            self._missing and np.isnan(rows.numbers[:, self._required]).any()
        )

    def _columns(self, decoded: list[Any]) -> Rows:
        return self._columns_of(list(map(msgspec.structs.astuple, decoded)))

    def _listed(self, form: Form, rows: list[Any]) -> list[Any]:
        """The values of each row in the order of the signature."""
        return rows if form == "data" else [[*map(row.get, self._inputs)] for row in rows]

    def _columns_of(self, tuples: list[Any]) -> Rows:
        numbers = tuples if not self._categories else [[row[index] for index in self._numbers] for row in tuples]
        matrix = np.array(numbers, np.float64).reshape(len(tuples), len(self._numbers))
        columns = [list(map(itemgetter(index), tuples)) for index in self._categories]
        if self._missing:
            matrix[self._missing.in_numbers(matrix)] = np.nan
            columns = [[None if is_missing(self._missing, value) else value for value in column] for column in columns]
        return Rows(matrix, list(map(as_names, self._texts, columns)))

    def _explain(self, body: bytes, found: str) -> NoReturn:
        """Raise what is wrong with a body that its types refused.

        The standard library reads it, since it turns `1e999` into an infinity that can be named with its row and
        feature, where msgspec stops.
        """
        raise InvalidRows(self._mistakes.of(_loaded(body)) or [Problem(None, None, found)])

    def _read_plainly(self, body: bytes) -> Asked:
        """As `read`, slower: for names that msgspec can't look for."""
        content = _loaded(body)
        if problems := self._mistakes.of(content):
            raise InvalidRows(problems)
        try:
            msgspec.json.decode(body)  # the standard library lets half of a surrogate pair through
        except ValueError as error:
            raise NotJson(_reason(error)) from None
        form: Form = "rows" if "rows" in content else "data"
        return Asked(form, self._columns_of(self._listed(form, content[form])), content.get("ids"))


def _is_escaped(name: str) -> bool:
    """Whether JSON writes the name with a backslash; msgspec takes no such names."""
    return json.dumps(name, ensure_ascii=False) != f'"{name}"'


def _loaded(body: bytes) -> Any:
    """The body as the standard library reads it."""
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as problem:
        raise NotJson(_reason(problem)) from None


def _body_type(inputs: list[Input]) -> type:
    """The type of a request body: msgspec checks it in one pass, features in the signature's order fastest."""
    values = [(f"f{index}", _value_type(each)) for index, each in enumerate(inputs)]
    optional = [field if each.required else (*field, None) for field, each in zip(values, inputs, strict=True)]
    names = {f"f{index}": each.name for index, each in enumerate(inputs)}
    row: Any = msgspec.defstruct("Row", optional, rename=names, kw_only=True, forbid_unknown_fields=True)
    listed: Any = msgspec.defstruct("Listed", values, array_like=True, forbid_unknown_fields=True)
    unset = msgspec.UNSET
    keys = {"rows": list[row], "data": list[listed], "ids": list[str | _Whole]}
    fields = [(name, kind | msgspec.UnsetType, unset) for name, kind in keys.items()]
    return msgspec.defstruct("Body", fields, forbid_unknown_fields=True)


def _value_type(each: Input) -> Any:
    kind: Any = {"number": float, "category": _Category, "date": str}[each.type]
    return kind if each.required else kind | None


def _holds_misfits(each: Input, column: list[Any]) -> bool:
    """Whether a value of a named column is missing where it must not be, an infinite number, or no date."""
    if each.required and None in column:
        return True
    return holds_no_date(column) if each.type == "date" else holds_infinity(each, column)


def _holds_odd_float(column: list[Any]) -> bool:
    return any(type(value) is float and not math.isfinite(value) for value in column)


def _without_nan(row: Any) -> Any:
    def filled(value: Any) -> Any:
        return None if type(value) is float and math.isnan(value) else value

    if type(row) is dict:
        return {name: filled(value) for name, value in row.items()}
    return [filled(value) for value in row] if type(row) is list else row


def _text(value: Any) -> str | None:
    """The canonical text of one JSON scalar, as `features.schema.canonical_text` has it for a column."""
    if value is None or type(value) is str:
        return value
    return canonical_text(pa.array([value]))[0].as_py()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
