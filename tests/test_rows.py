"""JSON rows against a signature: what is accepted, as which values, and how a mistake is named."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylway.bundle.mistakes import MOST_PROBLEMS, InvalidRows
from raylway.bundle.rows import NotJson, RowReader, joined
from raylway.features.schema import canonical_text
from raylway.features.signature import Input, Signature

SIGNATURE = Signature(
    "classification",
    "ripe",
    [
        Input("length", "number", True),
        Input("my colour", "category", True),
        Input("width", "number", False),
        Input("store", "category", False, "number"),
    ],
    ["no", "yes"],
)
READER = RowReader(SIGNATURE)
GOOD = {"length": 12.5, "my colour": "red", "width": 2, "store": 1}


def read(rows: Any, form: str = "rows") -> Any:
    return READER.read(json.dumps({form: rows}).encode())[1]


def problems(body: bytes) -> list[tuple[int | None, str | None, str]]:
    with pytest.raises(InvalidRows) as caught:
        READER.read(body)
    return [(each.row, each.feature, each.reason) for each in caught.value.problems]


def test_both_forms_give_the_same_columns() -> None:
    as_rows = read([GOOD, {"length": -1, "my colour": True}])
    as_data = read([[12.5, "red", 2, 1], [-1, True, None, None]], "data")
    for rows in (as_rows, as_data):
        np.testing.assert_array_equal(rows.numbers, [[12.5, 2.0], [-1.0, np.nan]])
        assert [texts.to_pylist() for texts in rows.texts()] == [["red", "true"], ["1", None]]
    assert as_rows.table(SIGNATURE).to_pylist()[1] == {
        "length": -1.0,
        "my colour": "true",
        "width": None,
        "store": None,
    }


@pytest.mark.parametrize("name", ['length "in"', "income\n(USD)", "tab\t", "back\\slash"])
def test_a_name_that_json_escapes_is_a_name_like_another(name: str) -> None:
    inputs = [Input(name, "number", True), Input("place", "category", False), Input("rooms", "number", False)]
    reader = RowReader(Signature("regression", "price", inputs, []))
    bodies = ({"rows": [{"place": 1, name: 2.5}, {name: 3}]}, {"data": [[2.5, 1, None], [3, None, None]]})
    for body in bodies:
        form, rows, _ = reader.read(json.dumps(body).encode())
        assert form in body
        np.testing.assert_array_equal(rows.numbers, [[2.5, np.nan], [3.0, np.nan]])
        assert rows.texts()[0].to_pylist() == ["1", None]
    for wrong in ({"rows": [{}]}, {"rows": [{name: "2"}]}, {"data": [[None, 1, 2]]}):
        with pytest.raises(InvalidRows) as caught:
            reader.read(json.dumps(wrong).encode())
        assert [(each.row, each.feature) for each in caught.value.problems] == [(0, name)]
    for body in (b'{"rows": [NaN]}', json.dumps({"rows": [{name: 1, "place": "\ud800"}]}).encode()):
        with pytest.raises(NotJson):
            reader.read(body)
    assert len(reader.read(b'{"rows": []}')[1]) == 0


def test_no_rows_are_no_mistake() -> None:
    assert len(read([])) == len(read([], "data")) == 0


@pytest.mark.parametrize("value", [1, 1.0, "1", "1.0", " 1", "+1"])
def test_one_store_however_it_is_written(value: Any) -> None:
    assert read([GOOD | {"store": value}]).texts()[1].to_pylist() == ["1"]


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_category_texts_are_those_of_preparation(values: list[Any]) -> None:
    found = read([GOOD | {"store": value} for value in values]).texts()[1].to_pylist()
    as_texts = read([GOOD | {"store": str(value)} for value in values]).texts()[1].to_pylist()
    assert as_texts == found == [canonical_text(pa.array([value]))[0].as_py() for value in values]


@pytest.mark.parametrize(
    ("values", "cells", "names"),
    [
        ("text", ["NA", " 1", "1.0", 1.0, "True", True], ["NA", " 1", "1.0", "1", "True", "true"]),
        ("number", ["NA", "null", " ", "x", "2.50", True], [None, None, None, "x", "2.5", "true"]),
        ("boolean", ["NA", "True", " FALSE", True, 1, "yes"], [None, "true", "false", "true", "1", "yes"]),
    ],
)
def test_texts_mean_what_they_mean_in_files(values: Any, cells: list[Any], names: list[str | None]) -> None:
    reader = RowReader(Signature("regression", "y", [Input("c", "category", False, values)], []))
    for form, rows in (
        ("rows", [{"c": cell} for cell in [*cells, "", None]]),
        ("data", [[c] for c in [*cells, "", None]]),
    ):
        found = reader.read(json.dumps({form: rows}).encode())[1]
        assert found.texts()[0].to_pylist() == [*names, None, None]
    strict = RowReader(Signature("regression", "y", [Input("c", "category", True, values)], []))
    empty = [place for place, name in enumerate([*names, None]) if name is None]
    with pytest.raises(InvalidRows) as caught:
        strict.read(json.dumps({"rows": [{"c": cell} for cell in [*cells, ""]]}).encode())
    assert [(each.row, "empty cell" in each.reason) for each in caught.value.problems] == [(at, True) for at in empty]


@pytest.mark.parametrize("cell", ["inf", "-Infinity", "1e999"])
def test_an_infinite_number_is_refused_as_a_category_too(cell: str) -> None:
    reader = RowReader(Signature("regression", "y", [Input("c", "category", False, "number")], []))
    for content in (json.dumps({"rows": [{"c": cell}]}), '{"rows": [{"c": 1e999}]}'):
        with pytest.raises(InvalidRows) as caught:
            reader.read(content.encode())
        assert caught.value.problems[0].reason == "is not a finite number"


def test_a_date_that_is_not_there() -> None:
    reader = RowReader(Signature("regression", "y", [Input("d", "date", False)], []))
    cells = ["2013-01-01", "", "NA", None]
    found = reader.read(json.dumps({"rows": [{"d": cell} for cell in cells]}).encode())[1]
    assert found.texts()[0].to_pylist() == ["2013-01-01", None, None, None]


@given(st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_read_to_the_last_bit(value: float) -> None:
    assert read([GOOD | {"length": value}]).numbers[0, 0] == float(json.loads(json.dumps(value)))


CELLS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)
ROWS = st.one_of(
    CELLS,
    st.dictionaries(st.sampled_from([*GOOD, "note"]), CELLS),
    st.fixed_dictionaries(dict.fromkeys(GOOD, CELLS)),
    st.fixed_dictionaries({"length": st.integers(0, 9), "my colour": st.text(max_size=2)}),
)


def fits(each: Input, value: Any) -> bool:
    """The rule in the words of the documents."""
    if value is None or (value == "" and each.type == "category"):
        return not each.required
    if each.type == "number":
        return type(value) in (int, float)
    return type(value) in (str, bool, float) or (type(value) is int and -(2**63) <= value < 2**63)


@given(st.lists(ROWS, max_size=4))
def test_exactly_the_bad_cells_are_named(rows: list[Any]) -> None:
    expected = set()
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            expected.add((index, None))
            continue
        expected |= {(index, name) for name in row.keys() - GOOD.keys()}
        expected |= {(index, each.name) for each in SIGNATURE.inputs if not fits(each, row.get(each.name))}
    if not expected:
        assert len(read(rows)) == len(rows)
        return
    found = {(row, feature) for row, feature, _ in problems(json.dumps({"rows": rows}).encode())}
    assert found == expected or len(found) == MOST_PROBLEMS


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"my colour": "red"}, "is missing; expected a number"),
        (GOOD | {"length": None}, "is null; expected a number"),
        (GOOD | {"length": "12.5"}, "expected a number; found the text '12.5'"),
        (GOOD | {"length": ""}, "expected a number; found the text ''"),
        (GOOD | {"length": True}, "expected a number; found a boolean"),
        (GOOD | {"length": [12.5]}, "expected a number; found a list"),
        (GOOD | {"length": {"v": 1}}, "expected a number; found an object"),
    ],
)
def test_a_mistake_in_a_number(row: dict[str, Any], reason: str) -> None:
    assert problems(json.dumps({"rows": [GOOD, row]}).encode()) == [(1, "length", reason)]


def test_a_key_that_is_no_feature_is_refused_with_the_nearest_one() -> None:
    ((row, feature, reason),) = problems(json.dumps({"rows": [GOOD | {"widht": 1}]}).encode())
    assert (row, feature) == (0, "widht")
    assert reason == "is no feature of this model; did you mean width?"
    assert problems(json.dumps({"rows": [GOOD | {"ripe": "no"}]}).encode()) == [
        (0, "ripe", "is no feature of this model, leave it out")
    ]


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 400])
def test_numbers_beyond_all_range_are_named(number: str) -> None:
    ((row, feature, _),) = problems(b'{"rows":[{"length":%s,"my colour":"x"}]}' % number.encode())
    assert (row, feature) == (0, "length")


def test_the_largest_finite_number_is_accepted() -> None:
    assert read([GOOD | {"length": sys.float_info.max}]).numbers[0, 0] == sys.float_info.max


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"rows",
        b'{"rows":[{"length":NaN,"my colour":"x"}]}',
        b'{"rows":[{"length":Infinity,"my colour":"x"}]}',
        b'{"rows":[{"length":-Infinity,"my colour":"x"}]}',
        b'{"rows":[]}trailing',
        b'{"rows":' + b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe{}",
        b'{"rows":[{"length":1,"my colour":"\xff"}]}',
        b'{"rows":[{"length":1,"my colour":"\\ud800"}]}',
        b'{"rows":[{"length":1' + b"0" * 5000 + b',"my colour":"x"}]}',
        b'\xef\xbb\xbf{"rows":[]}',
    ],
)
def test_what_is_not_json(body: bytes) -> None:
    with pytest.raises(NotJson):
        READER.read(body)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[]", "found a list"),
        (b"null", "found null"),
        (b"{}", "found an empty object"),
        (b'{"rows":[],"data":[]}', "found the keys 'rows', 'data'"),
        (b'{"instances":[]}', "found the keys 'instances'"),
        (b'{"rows":{}}', 'expected a list under "rows"; found an object'),
        (b'{"data":[[1,"a"]]}', "expected a list of 4 values in the order of /signature; found a list of 2"),
        (b'{"data":[{}]}', "found an object"),
        (b'{"rows":[[12.5,"red",2,1]]}', "expected an object with a value for each feature; found a list"),
    ],
)
def test_what_is_json_but_no_rows(body: bytes, words: str) -> None:
    assert words in problems(body)[0][2]


def test_a_body_full_of_mistakes_names_the_first_twenty() -> None:
    found = problems(json.dumps({"rows": [{}] * 5000}).encode())
    assert len(found) == MOST_PROBLEMS
    assert [row for row, _, _ in found] == [index // 2 for index in range(MOST_PROBLEMS)]


def test_joined_rows_are_the_rows_one_after_the_other() -> None:
    parts = [read([GOOD | {"length": index}] * index) for index in range(4)]
    whole = joined(parts)
    assert whole.numbers[:, 0].tolist() == [1, 2, 2, 3, 3, 3]
    assert joined([whole.part(0, 2), whole.part(2, 6)]).numbers.tolist() == whole.numbers.tolist()
    assert [len(texts) for texts in whole.texts()] == [6, 6]


def test_ids_of_rows() -> None:
    def asked(**beside: Any) -> Any:
        return READER.read(json.dumps({"rows": [GOOD, GOOD]} | beside).encode())

    assert asked().ids is None
    assert asked(ids=["a", 2**63 - 1]).ids == ["a", 2**63 - 1]
    wrong = [(["a"], None), ("ab", None), (None, None), (["a", 1.5], 1), ([True, "b"], 0), ([2**63, None], 0)]
    for ids, row in wrong:
        assert problems(json.dumps({"rows": [GOOD, GOOD], "ids": ids}).encode())[0][0] == row
    assert "go with" in problems(b'{"data": [], "ids": []}')[0][2]
    assert "one key" in problems(b'{"ids": []}')[0][2]


@pytest.mark.parametrize("name", ["length", 'length "in"'])
def test_rows_of_another_format_follow_the_same_rules(name: str) -> None:
    inputs = [Input(name, "number", True), Input("place", "category", False), Input("rooms", "number", False)]
    reader = RowReader(Signature("regression", "price", inputs, [], missing=["?", "-1"]))
    nan, inf = float("nan"), float("inf")
    good = [[2.5, 7, nan], [3, nan, None], [4, "", -1]]
    for form, rows in (
        ("data", good),
        ("rows", [dict(zip((name, "place", "rooms"), row, strict=True)) for row in good]),
    ):
        found = reader.convert(form, rows)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found.numbers, [[2.5, nan], [3, nan], [4, nan]])
        assert found.texts()[0].to_pylist() == ["7", None, None]
    for row, feature in (([nan, 1, 1], name), ([-1, 1, 1], name), ([inf, 1, 1], name), ([1, inf, 1], "place")):
        with pytest.raises(InvalidRows) as caught:
            reader.convert("data", [[1, 1, 1], row])
        assert [(each.row, each.feature) for each in caught.value.problems] == [(1, feature)]
    for row in ([1, 1], 5, [1, 1, 10**400], [1, 1, "2"]):
        with pytest.raises(InvalidRows):
            reader.convert("data", [row])
