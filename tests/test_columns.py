"""Types of columns: texts as numbers against Python's own, and one decision from any cutting into pieces."""

from __future__ import annotations

import datetime
import decimal
import math
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raylway.data import arrow_read, columns
from raylway.data.columns import Seen
from raylway.data.decide import Places, decide, lost
from raylway.errors import UserError
from raylway.features import texts as texts_
from raylway.job.schema import Clean

NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|inf|infinity)", re.ASCII | re.IGNORECASE)
ODD = st.sampled_from(
    "007|-0|0|+5|1e5|1e999|-inf|Infinity|NaN|NA|0x1F| 12|3\t|.5|1.|1_0|abc|1,5|٣|-|1d5|5 6|--1|nan|null|"
    "9223372036854775807|9223372036854775808|-9223372036854775808|9007199254740993|00000000000000000000005".split("|")
)
TEXTS = ODD | st.integers(-(2**64), 2**64).map(str) | st.floats(allow_nan=False).map(repr)


@given(st.lists(TEXTS, min_size=1, max_size=12))
@example(["4611686018427387905", "4611686018427387906"])
@settings(max_examples=300, deadline=None)
def test_texts_are_read_as_python_reads_them(texts):
    read = texts_.numbers(pa.array(texts))
    for index, text in enumerate(texts):
        bare = text.strip(" \t")
        is_number = NUMBER.fullmatch(bare) is not None
        assert read.is_number[index] == is_number
        assert math.isnan(read.floats[index]) if not is_number else read.floats[index] == float(bare)
        whole = re.fullmatch(r"[+-]?\d+", bare, re.ASCII) is not None
        fits = whole and -(2**63) <= int(bare) < 2**63
        assert read.is_integer[index] == fits and read.is_beyond[index] == (whole and not fits)
        assert read.integers[index] == (int(bare) if fits else 0)
        assert read.has_leading_zero[index] == (is_number and re.match(r"[+-]?0\d", bare) is not None)


def decided(
    pieces: list[list[str | None]], clean: Clean | None = None, numeric: tuple[str, ...] = ()
) -> tuple[str, list]:
    """Type and values of a column of text that comes in pieces, as preparation finds them."""
    clean = clean or Clean()
    seen, stored = look(pieces, keep_text=False)
    places = Places(["f.csv"], True)
    types = decide({"x": seen}, set(numeric), set(), clean, places)
    if lost({"x": seen}, types.of):
        _, stored = look(pieces, keep_text=True)
    values = []
    for piece in stored:
        column, invalid = columns.final(piece, types.of["x"], clean.infinite == "missing")
        bad = np.zeros(len(piece), bool) if invalid is None else invalid
        values += ["invalid" if wrong else value for value, wrong in zip(column.to_pylist(), bad, strict=True)]
    return types.of["x"], values


def look(pieces: list[list[str | None]], keep_text: bool) -> tuple[Seen, list[pa.Array]]:
    found = [columns.examine(pa.array(p, pa.string()), np.arange(len(p), dtype=np.uint64), keep_text) for p in pieces]
    seen = found[0][1]
    for _, more in found[1:]:
        seen = seen.merged(more)
    return seen, [array for array, _ in found]


@given(st.lists(TEXTS | st.none(), min_size=1, max_size=12), st.integers(0, 12), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=200, deadline=None)
def test_the_type_does_not_depend_on_the_pieces(texts, cut, share):
    clean = Clean(max_invalid=share, infinite="missing")
    assert repr(decided([texts], clean)) == repr(decided([texts[:cut], texts[cut:]], clean))


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        (["1", None, "3"], "int64", [1, None, 3]),
        (["4611686018427387905", None], "int64", [4611686018427387905, None]),
        (["1", "2.5"], "float64", [1.0, 2.5]),
        (["NA", "AF", "1"], "string", ["NA", "AF", "1"]),
        (["NA", "nan", "null", "1.5"], "float64", [None, None, None, 1.5]),
        (["NA", "2", "None"], "int64", [None, 2, None]),
        (["NA", "N/A"], "string", ["NA", "N/A"]),
        (["007", "012"], "string", ["007", "012"]),
        (["0.5", "0"], "float64", [0.5, 0.0]),
        (["9223372036854775808", "1"], "string", ["9223372036854775808", "1"]),
        (["9223372036854775808", "1.5"], "float64", [9223372036854775808.0, 1.5]),
        (["true", "false"], "bool", [True, False]),
        (["2013-01-01", "2014-01-01"], "string", ["2013-01-01", "2014-01-01"]),
        ([" 1", "2 "], "int64", [1, 2]),
        ([None, None], "string", [None, None]),
        (["1e999", "1"], "float64", [math.inf, 1.0]),
    ],
)
def test_types_of_text(cells, kind, values):
    for pieces in ([cells], [[cell] for cell in cells]):
        assert decided(pieces) == (kind, values)


def test_few_wrong_cells_make_rows_invalid_and_many_make_text():
    cells = ["1"] * 99 + ["oops"]
    assert decided([cells]) == ("int64", [1] * 99 + ["invalid"])
    assert decided([cells], Clean(max_invalid=0.005))[0] == "string"
    assert decided([cells[:50], cells[50:]]) == ("int64", [1] * 99 + ["invalid"])


def test_declared_numbers_are_numbers_whatever_they_look_like():
    assert decided([["007", "x", "NA"]], numeric=("x",)) == ("int64", [7, "invalid", None])
    assert decided([["0.5", "y"]], numeric=("x",)) == ("float64", [0.5, "invalid"])
    assert decided([["9223372036854775808"]], numeric=("x",)) == ("float64", [9223372036854775808.0])


@pytest.mark.parametrize(
    ("column", "form", "values"),
    [
        (pa.array([1, 2], pa.int8()), "int64", [1, 2]),
        (pa.array([2**63, 1], pa.uint64()), "string", ["9223372036854775808", "1"]),
        (pa.array([2**62, None], pa.uint64()), "int64", [2**62, None]),
        (pa.array([0.1, None, math.nan], pa.float32()), "float64", [float(np.float32(0.1)), None, None]),
        (pa.array([True, None]), "bool", [True, None]),
        (pa.array(["a", "", None]), "string", ["a", None, None]),
        (pa.array(["b", "b"]).dictionary_encode(), "string", ["b", "b"]),
        (pa.array(["c"], pa.large_string()), "string", ["c"]),
        (pa.array([decimal.Decimal("1.25")]), "float64", [1.25]),
        (pa.array([decimal.Decimal(2**62 + 1), None], pa.decimal128(38)), "int64", [2**62 + 1, None]),
        (pa.array([decimal.Decimal(10**30 + 1)], pa.decimal256(50)), "string", [str(10**30 + 1)]),
        (pa.array([datetime.date(2013, 1, 31)]), "string", ["2013-01-31"]),
        (
            pa.array([datetime.datetime(2013, 1, 1, 5, 0, 0, 500_000)], pa.timestamp("us")),
            "string",
            ["2013-01-01T05:00:00.5"],
        ),
        (pa.array([datetime.datetime(2013, 1, 1, 5)], pa.timestamp("ns")), "string", ["2013-01-01T05:00:00"]),
        (pa.array([datetime.datetime(2013, 1, 1, 5)], pa.timestamp("s")), "string", ["2013-01-01T05:00:00"]),
        (
            pa.array([datetime.datetime(2013, 1, 1, 5)], pa.timestamp("us", "Asia/Kathmandu")),
            "string",
            ["2013-01-01T05:00:00Z"],
        ),
        (pa.nulls(2), "null", [None, None]),
        (pa.array([], pa.int64()), "null", []),
    ],
)
def test_typed_columns(column, form, values):
    ids = np.arange(len(column), dtype=np.uint64)
    stored, seen = arrow_read.stored(pa.chunked_array([column]), "x", ids, False, "f")
    plain = stored.cast(pa.string()) if pa.types.is_dictionary(stored.type) else stored
    assert plain.to_pylist() == values and seen.stored == [form]
    assert seen.missing == values.count(None)


@pytest.mark.parametrize("column", [pa.array([[1]]), pa.array([{"a": 1}]), pa.array([b"\xff"])])
def test_nested_columns_are_refused_by_name(column):
    with pytest.raises(UserError, match=r"column 'x' has a type"):
        arrow_read.stored(pa.chunked_array([column]), "x", np.zeros(1, np.uint64), False, "f.parquet")


def test_files_that_disagree_on_text_or_number_are_refused_with_both_types():
    seen = Seen(["int64"], ["int64"], present=1).merged(Seen(["string"], ["string"], present=1))
    with pytest.raises(UserError, match="'x'") as caught:
        decide({"x": seen}, set(), set(), Clean(), Places(["f"], False))
    assert "int64 and string" in str(caught.value)
    mixed = Seen(["int32"], ["int64"], present=1).merged(Seen(["double"], ["float64"], present=1))
    assert decide({"x": mixed}, set(), set(), Clean(), Places(["f"], False)).of == {"x": "float64"}
