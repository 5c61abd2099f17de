"""Schema, expressions and the transform, against scikit-learn, pandas and plain Python."""

from __future__ import annotations

import math
from itertools import pairwise

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import OrdinalEncoder, StandardScaler

from raylway.errors import UserError
from raylway.features.expression import Expression
from raylway.features.fit import fit
from raylway.features.moments import Moments
from raylway.features.plan import FitPlan, treatments
from raylway.features.schema import canonical_text, sorted_names
from raylway.features.transform import Transform
from raylway.job import schema


def fitted(tables: list[pa.Table], numeric: list[str], categorical: list[str]) -> Transform:
    how = treatments(schema.Transform(), numeric, categorical, [])
    return fit(
        tables,
        FitPlan({}, [], numeric, categorical, [], [], how, "y", "classification", ["a", "b"], drops_missing=False),
    )


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_numbers_are_scaled_as_scikit_learn_does_whatever_the_partition(parts):
    rng = np.random.default_rng(0)
    columns = {
        "small": rng.standard_normal(1_000) * 1e-9,
        "shifted": rng.standard_normal(1_000) + 1e6,
        "large": rng.standard_normal(1_000) * 1e12,
    }
    frame = pd.DataFrame(columns)
    cuts = np.linspace(0, 1_000, parts + 1).astype(int)
    tables = [pa.table({k: v[a:b] for k, v in columns.items()}) for a, b in pairwise(cuts)]
    transform = fitted(tables, list(columns), [])
    scaler = StandardScaler().fit(frame)
    np.testing.assert_allclose([f.mean for f in transform.numeric], scaler.mean_, rtol=1e-9, atol=1e-20)
    np.testing.assert_allclose([f.spread for f in transform.numeric], scaler.scale_, rtol=1e-9)
    encoded = transform.encode(pa.table(columns)).numeric
    assert encoded.dtype == np.float32
    np.testing.assert_allclose(encoded, scaler.transform(frame), rtol=2e-6, atol=1e-6)


def test_categories_are_coded_from_one_and_the_unknown_is_zero():
    texts = ["b", "a", None, "c", "a"]
    transform = fitted([pa.table({"x": texts[:2]}), pa.table({"x": texts[2:]})], [], ["x"])
    reference = OrdinalEncoder().fit([[text] for text in texts if text])
    codes = transform.encode(pa.table({"x": ["a", "b", "c", "new", None]})).categorical
    assert codes.dtype == np.int32
    assert codes[:3, 0].tolist() == (reference.transform([["a"], ["b"], ["c"]])[:, 0] + 1).tolist()
    assert codes[3:, 0].tolist() == [0, 1]  # unknown; missing stands for the most frequent, which is a


@pytest.mark.parametrize("trained", [["True", "False"], ["true", "false"], ["TRUE", "FALSE"]])
def test_true_and_false_are_the_same_in_every_spelling(trained: list[str]):
    transform = fitted([pa.table({"x": trained})], [], ["x"])
    codes = [transform.encode(pa.table({"x": pair})).categorical[:, 0].tolist() for pair in (trained, [True, False])]
    assert codes[0] == codes[1]
    assert sorted(codes[0]) == [1, 2]


def test_other_categories_are_not_folded():
    transform = fitted([pa.table({"x": ["True", "true", "no"]})], [], ["x"])
    assert len(set(transform.encode(pa.table({"x": ["True", "true", "no", "NO"]})).categorical[:, 0].tolist())) == 4


def test_a_missing_number_is_the_training_mean():
    transform = fitted([pa.table({"x": [1.0, 3.0, None]})], ["x"], [])
    assert transform.encode(pa.table({"x": pa.array([None, 2.0, 3.0], pa.float64())})).numeric[:, 0].tolist() == [
        0,
        0,
        1,
    ]


@pytest.mark.parametrize("length", [2, 3, 10, 22, 1_000])
def test_a_constant_column_is_zero_whatever_rounding_leaves(length):
    value = math.log(1e-5)
    transform = fitted([pa.table({"x": [value] * length}), pa.table({"x": [value]})], ["x"], [])
    assert transform.encode(pa.table({"x": [value, -10.0, 1e300]})).numeric[:, 0].tolist() == [0, 0, 0]


def test_wild_values_stay_finite():
    transform = fitted([pa.table({"x": [1.0, 2.0]})], ["x"], [])
    encoded = transform.encode(pa.table({"x": [1e308, -1e308, 1.7e308]})).numeric
    assert np.isfinite(encoded).all() and np.isfinite(encoded @ encoded.T).all()


@given(st.lists(st.floats(-1e100, 1e100) | st.none(), max_size=40), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_moments_merge_to_those_of_all_values(values, cut):
    array = np.array([math.nan if value is None else value for value in values], np.float64)
    merged = Moments.of(array[:cut]).merged(Moments.of(array[cut:]))
    present = array[~np.isnan(array)]
    assert merged.count == len(present)
    if len(present):
        np.testing.assert_allclose(merged.mean, present.mean(), rtol=1e-9, atol=1e-9 * np.abs(present).max())
        np.testing.assert_allclose(merged.spread, present.std(), rtol=1e-7, atol=1e-9 * np.abs(present).max())


def test_a_category_without_any_present_training_cell_is_the_unknown():
    transform = fitted([pa.table({"x": pa.array([None, None], pa.string())})], [], ["x"])
    assert transform.encode(pa.table({"x": ["a", None]})).categorical.tolist() == [[0], [0]]
    assert transform.categorical[0].categories == []


def test_the_transform_survives_json():
    table = pa.table({"x": [1.5, 2.5, 9.25], "c": ["ä", "b", "b"]})
    transform = fitted([table], ["x"], ["c"])
    again = msgspec.json.decode(msgspec.json.encode(transform), type=Transform)
    assert again == transform
    assert again.encode(table).numeric.tobytes() == transform.encode(table).numeric.tobytes()


def test_a_number_without_any_present_training_cell_survives_json_and_is_the_mean():
    transform = fitted([pa.table({"x": pa.array([None, None], pa.float64())})], ["x"], [])
    again = msgspec.json.decode(msgspec.json.encode(transform), type=Transform)
    assert again == transform
    assert again.encode(pa.table({"x": [5.0, None]})).numeric.tolist() == [[0.0], [0.0]]


def test_one_store_has_one_name():
    spellings = [pa.array([1]), pa.array([1.0]), pa.array(["1"]), pa.array([1], pa.int64())]
    assert {canonical_text(column).to_pylist()[0] for column in spellings} == {"1"}
    floats = pa.array([-0.0, 2.5, 1e300, None, 2.0**53, math.nan])
    assert canonical_text(floats).to_pylist() == ["0", "2.5", "1e+300", None, str(2**53), None]
    assert canonical_text(pa.array([True, None, False])).to_pylist() == ["true", None, "false"]
    assert canonical_text(pa.array([2**63 - 1, None])).to_pylist() == [str(2**63 - 1), None]
    assert canonical_text(pa.nulls(2)).to_pylist() == [None, None]


def test_names_are_sorted_by_value_or_by_letter():
    assert sorted_names({"10", "9", "-1", "2.5"}) == ["-1", "2.5", "9", "10"]
    assert sorted_names({"10", "9", "x"}) == ["10", "9", "x"]
    assert sorted_names({"1", "inf"}) == ["1", "inf"]


TABLE = pa.table(
    {
        "a": [1, 2, None, 4],
        "b": [0.5, None, 0.0, -1.0],
        "t": ["x", "y", None, "x"],
        "my column": [True, False, None, True],
    }
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a > 1", [False, True, None, True]),
        ("1 < a <= 2", [False, True, None, False]),
        ("a + b * 2", [2.0, None, None, 2.0]),
        ("a / b", [2.0, None, None, -4.0]),
        ("a / 0", [None, None, None, None]),
        ("-a - -1", [0.0, -1.0, None, -3.0]),
        ('t == "x"', [True, False, None, True]),
        ("t != 'x' or a >= 4", [False, True, None, True]),
        ("not (a > 1)", [True, False, None, False]),
        ('col("my column") and true', [True, False, None, True]),
        ("a", [1, 2, None, 4]),
        ("1.5", [1.5] * 4),
        ("true", [True] * 4),
        ("a > 1 and false", [False, False, False, False]),
    ],
)
def test_expressions(text, expected):
    assert Expression(text).evaluate(TABLE).to_pylist() == expected


def test_an_expression_names_its_columns():
    assert Expression('a + col("my column") > 2 and t == "q"').columns == {"a", "my column", "t"}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "a.b",
        "a[0]",
        "[a]",
        "lambda: 1",
        "a if a else b",
        "a ** 2",
        "f(a)",
        "a :=",
        "",
        "a in b",
        "1j + a",
        "a > " + "9" * 400,
        "a > 1e999",
        "+".join(["a"] * 5_000),
        "-" * 5_000 + "a",
        "(" * 500 + "a" + ")" * 500,
    ],
)
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(UserError) as caught:
        Expression(text, "job.yaml:7")
    assert "job.yaml:7" in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize("terms", range(100, 1_000, 50))
def test_a_long_expression_is_computed_or_refused(terms):
    try:
        found = Expression("+".join(["a"] * terms)).evaluate(TABLE)
    except UserError as error:
        assert "nested too deeply" in str(error)
    else:
        assert found[0].as_py() == terms * TABLE["a"][0].as_py()


@pytest.mark.parametrize("text", ["t + 1", "t > 1", "a == 'x'", "not a", "a and b", "-t"])
def test_an_expression_that_does_not_fit_the_types_names_them(text):
    numbers_as_text = TABLE.set_column(2, "t", pa.array(["1", "2", None, "3"]))
    for table in (TABLE, numbers_as_text, numbers_as_text.slice(0, 0)):
        with pytest.raises(UserError, match="does not fit"):
            Expression(text).evaluate(table)
