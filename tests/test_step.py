"""Derived columns by functions of the user's own: called alike everywhere, checked, and shown with the user's line."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raylway.errors import UserError
from raylway.features.derive import derivation, derived, modules, parsed
from raylway.features.expression import Expression
from raylway.features.step import Step

TABLE = pa.table(
    {"a": [1, 2, None, 7], "b": [2.0, 0.0, 1.0, 2.0], "t": ["x", None, "y", "z"], "my column": [1, 2, 3, 4]}
)
NAMES = (f"own_step_{number}" for number in itertools.count())


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """From a function's body and its columns to the step."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(body: str, columns: str = "a, b") -> Step:
        name = next(NAMES)
        lines = ["import numpy as np, pyarrow as pa, pyarrow.compute as pc", "", "def f(table):"]
        (tmp_path / f"{name}.py").write_text("\n".join([*lines, *(f"    {line}" for line in body.splitlines())]))
        return Step(f"{name}:f({columns})", "job.yaml:4 (data.derive.new)")

    return make


@pytest.mark.parametrize(
    ("body", "columns", "expected"),
    [
        ("return pc.divide(table['a'], table['b'])", "a, b", [0.5, None, None, 3.5]),
        ("return pc.divide(table['a'], 2)", "a", [0.5, 1.0, None, 3.5]),
        ("return table['b'].to_numpy().astype(np.int8)", "b", [2.0, 0.0, 1.0, 2.0]),
        ("with np.errstate(divide='ignore'):\n    return 1 / table['b'].to_numpy()", "b", [0.5, None, 1.0, 0.5]),
        ("return pc.utf8_upper(table['t'])", "t", ["X", None, "Y", "Z"]),
        ("return table['t'].combine_chunks().dictionary_encode()", "t", ["x", None, "y", "z"]),
        ("return pc.equal(table['t'], 'x')", "t", [True, None, False, False]),
        ("return pa.nulls(len(table))", "t", [None] * 4),
        ("assert table.column_names == ['my column', 't']\nreturn table[0]", 'col("my column"), t, t', [1.0, 2, 3, 4]),
    ],
)
def test_what_a_function_gets_and_gives(step: Any, body: str, columns: str, expected: list[Any]) -> None:
    found = step(body, columns)
    values = found.evaluate(TABLE)
    assert isinstance(values, pa.Array) and values.to_pylist() == expected
    found.check(TABLE, values)
    assert found.evaluate(TABLE.slice(0, 0)).to_pylist() == []


def test_numbers_are_real_in_training_as_in_serving(step: Any) -> None:
    found = step("return pc.divide(table['a'], table['b'])")
    served = pa.table({"a": [7.0], "b": [2.0]})
    trained = pa.table({"a": [7], "b": [2]})
    assert found.evaluate(trained).to_pylist() == found.evaluate(served).to_pylist() == [3.5]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("return 3", "builtins.int"),
        ("return table", "pyarrow.lib.Table"),
        ("return table['a'][:2]", "2 values for 4 rows"),
        ("return pa.array([[1]] * 4)", "values of the type list<item: int64>"),
        ("return np.zeros((4, 2))", "numpy.ndarray"),
        ("return np.array([{}, 1, 'a', None], object)", "an array of object"),
    ],
)
def test_what_is_no_column(step: Any, body: str, found: str) -> None:
    with pytest.raises(UserError, match="returns what is no column") as caught:
        step(body).evaluate(TABLE)
    assert found in caught.value.found and caught.value.where == "job.yaml:4 (data.derive.new)"


@pytest.mark.parametrize(
    "body", ["return pc.subtract(table['b'], pc.mean(table['b']))", "return np.arange(float(len(table)))"]
)
def test_a_row_that_depends_on_others(step: Any, body: str) -> None:
    found = step(body)
    with pytest.raises(UserError, match="does not compute each row by itself") as caught:
        found.check(TABLE, found.evaluate(TABLE))
    assert "alone" in caught.value.found


def test_an_error_shows_the_users_own_line(step: Any) -> None:
    with pytest.raises(UserError, match=r"your function raised KeyError") as caught:
        step("if len(table):\n    return table['nothing']").evaluate(TABLE)
    assert caught.value.where.endswith("py:5 (f)") and caught.value.found == "return table['nothing']"
    assert "data.derive.new" in caught.value.fix


def test_modules_that_are_not_there_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_broken.py").write_text("def f(table:\n")
    (tmp_path / "own_lacking.py").write_text("import no_such_module_at_all\n")
    (tmp_path / "own_empty.py").write_text("")
    for text, words in (
        ("own_nowhere:f(a)", "there is no module 'own_nowhere'"),
        ("own_empty:f(a)", "has no function 'f'"),
        ("own_lacking:f(a)", "raised ModuleNotFoundError"),
        ("own_broken:f(a)", "raised SyntaxError"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            Step(text).evaluate(TABLE)
        assert "own_" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["m:f", "m:f()", "m:f(1)", "m:f(a=b)", "m:f(a b)", "m:f(a.b)", "m:f(*a)", "m:f(col(a))"]
)
def test_what_is_no_call(text: str) -> None:
    with pytest.raises(UserError, match="names no columns|can't be read"):
        derivation(text, "job.yaml:3")


def test_calls_and_expressions_are_told_apart() -> None:
    assert isinstance(derivation('t == "m:f(a)"'), Expression)
    assert isinstance(derivation(" pkg.m : f".replace(" ", "") + "(a)"), Step)
    assert modules({"one": "m:f(a)", "two": "a + 1", "three": "m:g(b)", "four": "pkg.n:f(a)"}) == ["m", "pkg.n"]


def test_a_function_and_an_expression_in_one_chain(step: Any) -> None:
    first = step("return pc.multiply(table['c'], 2)", "c")
    table = derived(TABLE, parsed({"c": "a + b"}) | {"d": first})
    assert table["d"].to_pylist() == [6.0, 4.0, None, 18.0]
