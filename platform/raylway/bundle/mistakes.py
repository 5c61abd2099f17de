"""What keeps JSON values from being rows of a signature, each mistake with its row and feature."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable
from itertools import islice
from typing import Any, Literal

import msgspec
import pyarrow as pa

from raylway.features import dates
from raylway.features.signature import Input, Signature
from raylway.features.texts import MissingCells, category_names, missing_words

Form = Literal["rows", "data"]
MOST_PROBLEMS = 20
"""Named in one answer; a client with more mistakes than these has one mistake."""

INT64 = 1 << 63

_LONGEST = 200
"""Characters of a client's own text in an answer."""
_LARGEST_NUMBER = int(sys.float_info.max)
_JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}


class Problem(msgspec.Struct, frozen=True):
    """One mistake in a request."""

    row: int | None
    """Position in the request, from 0; None: the whole body."""
    feature: str | None
    reason: str


class InvalidRows(Exception):
    """The body is JSON but not rows that this model can answer."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems


class Mistakes:
    """Looks for mistakes at leisure: only what the types of `bundle.rows` have refused comes here."""

    def __init__(self, signature: Signature) -> None:
        self._inputs = {each.name: each for each in signature.inputs}
        self._missing = MissingCells(signature.missing)

    def of(self, content: Any) -> list[Problem]:
        """Those of a whole body, up to `MOST_PROBLEMS`."""
        return list(islice(self._problems(content), MOST_PROBLEMS))

    def _problems(self, content: Any) -> Iterable[Problem]:
        if type(content) is not dict or content.keys() - {"ids"} not in ({"rows"}, {"data"}):
            if type(content) is not dict:
                found = _named(content)
            else:
                found = f"the keys {', '.join(map(_shown, content))}"[:_LONGEST] if content else "an empty object"
            yield Problem(None, None, f'expected an object with one key, "rows" or "data"; found {found}')
            return
        form: Form = "rows" if "rows" in content else "data"
        rows = content[form]
        if type(rows) is not list:
            yield Problem(None, None, f'expected a list under "{form}"; found {_named(rows)}')
            return
        if "ids" in content:
            yield from _problems_of_ids(form, content["ids"], len(rows))
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
        is_word = kind is str and each.type != "number" and as_names(each, [value]) == [None]
        if value is None or is_word or (self._missing and kind in _kinds(each) and is_missing(self._missing, value)):
            if each.required:
                found = "null" if value is None else f"{_shown(str(value))}, which is an empty cell here"
                yield Problem(index, each.name, f"is {found}; expected {_expected(each)}")
        elif _misfits(each, value):
            yield Problem(index, each.name, f"expected {_expected(each)}; found {_named(value)}")
        elif (kind is float and not math.isfinite(value)) or (
            kind is str and each.type == "category" and holds_infinity(each, as_names(each, [value]))
        ):
            yield Problem(index, each.name, "is not a finite number")
        elif kind is int and not abs(value) < (_LARGEST_NUMBER if each.type == "number" else INT64):
            yield Problem(index, each.name, "is too large")


def _problems_of_ids(form: Form, ids: Any, count: int) -> Iterable[Problem]:
    if form == "data":
        yield Problem(None, None, '"ids" go with "rows"; the answer to "data" has no place for them')
    elif type(ids) is not list or len(ids) != count:
        found = f"a list of {len(ids)}" if type(ids) is list else _named(ids)
        yield Problem(None, None, f'expected a list of {count} under "ids", one for each row; found {found}')
    else:
        for index, each in enumerate(ids):
            if not (type(each) is str or (type(each) is int and -INT64 <= each < INT64)):
                yield Problem(index, None, f"expected text or a 64-bit whole number as its id; found {_named(each)}")


def is_missing(cells: MissingCells, value: Any) -> bool:
    """Whether a JSON scalar is one of the signature's missing cells."""
    if type(value) is str:
        return bool(cells.in_texts(pa.array([value]))[0])
    return type(value) in (int, float) and bool(cells.in_texts(pa.array([repr(value)]))[0])


def as_names(each: Input, column: list[Any]) -> list[Any]:
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


def holds_infinity(each: Input, named: list[Any]) -> bool:
    """Whether a text of a category that held numbers means an infinite one."""
    return each.values == "number" and ("inf" in named or "-inf" in named)


def holds_no_date(texts: list[str | None]) -> bool:
    """Whether one of them is neither missing nor a date."""
    column = pa.array(texts, pa.string())
    return not bool((dates.parse(column)[1] | column.is_null().to_numpy(zero_copy_only=False)).all())


def _kinds(each: Input) -> tuple[type, ...]:
    """Of the JSON scalars that an input takes, booleans apart."""
    return {"number": (int, float), "category": (int, float, str), "date": (str,)}[each.type]


def _misfits(each: Input, value: Any) -> bool:
    """Whether a JSON value other than null is of a type that the input does not take, or no date for a date."""
    kind = type(value)
    if each.type == "date":
        return kind is not str or holds_no_date([value])
    return kind in (dict, list) or (each.type == "number" and kind in (str, bool))


def _expected(each: Input) -> str:
    return {
        "number": "a number",
        "category": "text, a number or a boolean",
        "date": "a date or time as text, such as 2013-01-01 or 2013-01-01T05:00:00Z",
    }[each.type]


def _named(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {_shown(value)}"
    return _JSON_NAMES[type(value)]


def _shown(text: str) -> str:
    return repr(text[:40])
