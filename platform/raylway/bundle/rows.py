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

import difflib
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import Annotated, Any, Literal, NoReturn

import msgspec
import numpy as np
import pyarrow as pa

from raylway.features import dates
from raylway.features.schema import canonical_text
from raylway.features.signature import Input, Signature
from raylway.features.texts import MissingCells, category_names, missing_words

Form = Literal["rows", "data"]
MOST_PROBLEMS = 20
"""Named in one answer; a client with more mistakes than these has one mistake."""

_LONGEST = 200
"""Characters of a client's own text in an answer."""
_INT64 = 1 << 63
_Category = str | Annotated[int, msgspec.Meta(ge=-_INT64, le=_INT64 - 1)] | float | bool
_LARGEST_NUMBER = int(sys.float_info.max)
_JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}


class Problem(msgspec.Struct, frozen=True):
    """One mistake in a request."""

    row: int | None
    """Position in the request, from 0; None: the whole body."""
    feature: str | None
    reason: str


class NotJson(Exception):
    """The body is not JSON; the message says why."""


class InvalidRows(Exception):
    """The body is JSON but not rows that this model can answer."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems


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
        self._decoder = None if any(map(_is_escaped, self._inputs)) else _decoder(signature.inputs)
        kinds = [each.type for each in signature.inputs]
        self._numbers = [index for index, kind in enumerate(kinds) if kind == "number"]
        self._categories = [index for index, kind in enumerate(kinds) if kind != "number"]
        self._texts = [signature.inputs[index] for index in self._categories]
        self._required = [signature.inputs[index].required for index in self._numbers]
        self._missing = MissingCells(signature.missing)

    def read(self, body: bytes) -> tuple[Form, Rows]:
        """Check a body of either form, `{"rows": [{"feature": value}]}` or `{"data": [[value]]}`.

        The lists of `data` hold the features in the order of the signature.

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
        rows = self._columns(decoded.rows if form == "rows" else decoded.data)
        if any(map(_holds_misfits, self._texts, rows.categories)):
            self._explain(body, "")
        if self._missing and np.isnan(rows.numbers[:, self._required]).any():
            self._explain(body, "")
        return form, rows

    def _columns(self, decoded: list[Any]) -> Rows:
        return self._columns_of(list(map(msgspec.structs.astuple, decoded)))

    def _columns_of(self, tuples: list[Any]) -> Rows:
        numbers = tuples if not self._categories else [[row[index] for index in self._numbers] for row in tuples]
        matrix = np.array(numbers, np.float64).reshape(len(tuples), len(self._numbers))
        columns = [list(map(itemgetter(index), tuples)) for index in self._categories]
        if self._missing:
            matrix[self._missing.in_numbers(matrix)] = np.nan
            columns = [[None if self._is_missing(value) else value for value in column] for column in columns]
        return Rows(matrix, list(map(_as_names, self._texts, columns)))

    def _is_missing(self, value: Any) -> bool:
        """Whether a JSON scalar is one of the signature's missing cells."""
        if type(value) is str:
            return bool(self._missing.in_texts(pa.array([value]))[0])
        return type(value) in (int, float) and bool(self._missing.in_texts(pa.array([repr(value)]))[0])

    def _explain(self, body: bytes, found: str) -> NoReturn:
        """Raise what is wrong with a body that its types refused.

        The standard library reads it, since it turns `1e999` into an infinity that can be named with its row and
        feature, where msgspec stops.
        """
        problems = list(islice(self._problems(_loaded(body)), MOST_PROBLEMS))
        raise InvalidRows(problems or [Problem(None, None, found)])

    def _read_plainly(self, body: bytes) -> tuple[Form, Rows]:
        """As `read`, slower: for names that msgspec can't look for."""
        content = _loaded(body)
        if problems := list(islice(self._problems(content), MOST_PROBLEMS)):
            raise InvalidRows(problems)
        try:
            msgspec.json.decode(body)  # the standard library lets half of a surrogate pair through
        except ValueError as error:
            raise NotJson(_reason(error)) from None
        ((form, rows),) = content.items()
        return form, self._columns_of(rows if form == "data" else [[*map(row.get, self._inputs)] for row in rows])

    def _problems(self, content: Any) -> Iterable[Problem]:
        if type(content) is not dict or len(content) != 1 or not content.keys() <= {"rows", "data"}:
            keys = f"the keys {', '.join(map(_shown, content))}"[:_LONGEST] if content else "an empty object"
            found = keys if type(content) is dict else _named(content)
            yield Problem(None, None, f'expected an object with one key, "rows" or "data"; found {found}')
            return
        ((form, rows),) = content.items()
        if type(rows) is not list:
            yield Problem(None, None, f'expected a list under "{form}"; found {_named(rows)}')
            return
        check = self._problems_of_object if form == "rows" else self._problems_of_list
        for index, row in enumerate(rows):
            yield from check(index, row)

    def _problems_of_object(self, index: int, row: Any) -> Iterable[Problem]:
        if type(row) is not dict:
            yield Problem(index, None, f"expected an object with a value for each feature; found {_named(row)}")
            return
        for name in (name for name in row if name not in self._inputs):
            near = difflib.get_close_matches(name[:_LONGEST], self._inputs, n=1)
            hint = f"; did you mean {near[0]}?" if near else ", leave it out"
            yield Problem(index, name[:_LONGEST], f"is no feature of this model{hint}")
        for name, each in self._inputs.items():
            if name in row:
                yield from self._problems_of_value(index, each, row[name])
            elif each.required:
                yield Problem(index, name, f"is missing; expected {_expected(each)}")

    def _problems_of_list(self, index: int, row: Any) -> Iterable[Problem]:
        if type(row) is not list or len(row) != len(self._inputs):
            found = f"a list of {len(row)}" if type(row) is list else _named(row)
            yield Problem(
                index, None, f"expected a list of {len(self._inputs)} values in the order of /signature; found {found}"
            )
            return
        for each, value in zip(self._inputs.values(), row, strict=True):
            yield from self._problems_of_value(index, each, value)

    def _problems_of_value(self, index: int, each: Input, value: Any) -> Iterable[Problem]:
        kind = type(value)
        is_word = kind is str and each.type != "number" and _as_names(each, [value]) == [None]
        if value is None or is_word or (self._missing and kind in _kinds(each) and self._is_missing(value)):
            if each.required:
                found = "null" if value is None else f"{_shown(str(value))}, which is an empty cell here"
                yield Problem(index, each.name, f"is {found}; expected {_expected(each)}")
        elif _misfits(each, value):
            yield Problem(index, each.name, f"expected {_expected(each)}; found {_named(value)}")
        elif (kind is float and not math.isfinite(value)) or (
            kind is str and each.type == "category" and _holds_infinity(each, _as_names(each, [value]))
        ):
            yield Problem(index, each.name, "is not a finite number")
        elif kind is int and not abs(value) < (_LARGEST_NUMBER if each.type == "number" else _INT64):
            yield Problem(index, each.name, "is too large")


def _is_escaped(name: str) -> bool:
    """Whether JSON writes the name with a backslash; msgspec takes no such names."""
    return json.dumps(name, ensure_ascii=False) != f'"{name}"'


def _loaded(body: bytes) -> Any:
    """The body as the standard library reads it."""
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as problem:
        raise NotJson(_reason(problem)) from None


def _decoder(inputs: list[Input]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(_body_type(inputs))


def _body_type(inputs: list[Input]) -> type:
    """The type of a request body: msgspec checks it in one pass, features in the signature's order fastest."""
    fields = [(f"f{index}", _value_type(each)) for index, each in enumerate(inputs)]
    optional = [field if each.required else (*field, None) for field, each in zip(fields, inputs, strict=True)]
    names = {f"f{index}": each.name for index, each in enumerate(inputs)}
    row: Any = msgspec.defstruct("Row", optional, rename=names, kw_only=True, forbid_unknown_fields=True)
    listed: Any = msgspec.defstruct("Listed", fields, array_like=True, forbid_unknown_fields=True)
    unset = msgspec.UNSET
    forms = [("rows", list[row] | msgspec.UnsetType, unset), ("data", list[listed] | msgspec.UnsetType, unset)]
    return msgspec.defstruct("Body", forms, forbid_unknown_fields=True)


def _value_type(each: Input) -> Any:
    kind: Any = {"number": float, "category": _Category, "date": str}[each.type]
    return kind if each.required else kind | None


def _as_names(each: Input, column: list[Any]) -> list[Any]:
    """A column's values with its texts as the names of categories (a date's as they came), missing ones None."""
    if each.type == "category" and each.values == "text":
        return [None if value == "" else value for value in column] if "" in column else column
    texts = [value for value in set(column) if type(value) is str]
    if not texts:
        return column
    array = pa.array(texts, pa.string())
    named = array if each.type == "date" else category_names(array, each.values)
    nothing = missing_words(array)
    names = {text: None if nothing[at] else named[at].as_py() for at, text in enumerate(texts)}
    return [names[value] if type(value) is str else value for value in column]


def _holds_misfits(each: Input, column: list[Any]) -> bool:
    """Whether a value of a named column is missing where it must not be, an infinite number, or no date."""
    if each.required and None in column:
        return True
    return _holds_no_date(column) if each.type == "date" else _holds_infinity(each, column)


def _holds_infinity(each: Input, named: list[Any]) -> bool:
    return each.values == "number" and ("inf" in named or "-inf" in named)


def _text(value: Any) -> str | None:
    """The canonical text of one JSON scalar, as `features.schema.canonical_text` has it for a column."""
    if value is None or type(value) is str:
        return value
    return canonical_text(pa.array([value]))[0].as_py()


def _kinds(each: Input) -> tuple[type, ...]:
    """Of the JSON scalars that an input takes, booleans apart."""
    return {"number": (int, float), "category": (int, float, str), "date": (str,)}[each.type]


def _misfits(each: Input, value: Any) -> bool:
    """Whether a JSON value other than null is of a type that the input does not take, or no date for a date."""
    kind = type(value)
    if each.type == "date":
        return kind is not str or _holds_no_date([value])
    return kind in (dict, list) or (each.type == "number" and kind in (str, bool))


def _expected(each: Input) -> str:
    return {
        "number": "a number",
        "category": "text, a number or a boolean",
        "date": "a date or time as text, such as 2013-01-01 or 2013-01-01T05:00:00Z",
    }[each.type]


def _holds_no_date(texts: list[str | None]) -> bool:
    """Whether one of them is neither missing nor a date."""
    column = pa.array(texts, pa.string())
    return not bool((dates.parse(column)[1] | column.is_null().to_numpy(zero_copy_only=False)).all())


def _named(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {_shown(value)}"
    return _JSON_NAMES[type(value)]


def _shown(text: str) -> str:
    return repr(text[:40])


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
