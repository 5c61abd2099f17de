"""What a column is said to hold, against pandas and plain Python, whatever the cut into pieces."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylway.data import describe
from raylway.data.items import ROW_ID

CELLS = {
    "int64": st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3),
    "float64": st.none() | st.floats(-1e12, 1e12) | st.sampled_from([math.inf, -math.inf, 0.0, -0.0]),
    "bool": st.none() | st.booleans(),
    "string": st.none() | st.text(max_size=3),
}
TYPES = {"int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_(), "string": pa.string()}


@st.composite
def pieces(draw: st.DrawFn) -> list[pa.Table]:
    rows = draw(st.lists(st.tuples(*CELLS.values()), min_size=1, max_size=40))
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    edges = [0, *cuts, len(rows)]
    schema = pa.schema(TYPES)
    columns = list(zip(*rows, strict=True))
    table = pa.table(
        [pa.array(cells, kind) for cells, kind in zip(columns, TYPES.values(), strict=True)], schema=schema
    )
    return [table.slice(start, end - start) for start, end in itertools.pairwise(edges)]


@given(pieces())
def test_parts_merge_into_what_the_whole_holds(parts: list[pa.Table]) -> None:
    found = describe.merged([describe.describe(part) for part in parts]).columns
    table = pa.concat_tables(parts)
    for name, column in found.items():
        cells = table[name].drop_null().to_pylist()
        assert (column.type, column.rows, column.missing) == (name, table.num_rows, table[name].null_count)
        assert column.is_exact
        assert column.distinct == len(set(cells))
        if name in ("int64", "float64"):
            finite = [cell for cell in cells if math.isfinite(cell)]
            assert column.infinite == len(cells) - len(finite)
            assert (column.minimum, column.maximum) == ((min(finite), max(finite)) if finite else (None, None))
            assert column.whole == all(cell == int(cell) for cell in finite)
            if finite:
                size = max(map(abs, finite))
                assert column.mean == pytest.approx(math.fsum(finite) / len(finite), rel=1e-9, abs=1e-9 * size)
        elif name == "string":
            assert column.frequent == dict(Counter(cells))
            assert column.examples == list(dict.fromkeys(cells))[:5] or len(parts) > 1
        else:
            assert column.frequent == dict(Counter(str(cell).lower() for cell in cells))
            assert column.mean == (pytest.approx(np.mean(cells)) if cells else 0)


def test_many_values_are_counted_within_some_percent_and_the_same_by_any_cut() -> None:
    rng = np.random.default_rng(3)
    values = rng.integers(0, 50_000, 200_000)
    table = pa.table({"n": values, "x": values * 0.5, "t": pa.array(values).cast(pa.string())})
    whole = describe.describe(table).columns
    cut = describe.merged([describe.describe(table.slice(at, 30_000)) for at in range(0, 200_000, 30_000)]).columns
    exact = pd.Series(values).nunique()
    for name in table.column_names:
        assert whole[name].sketch == cut[name].sketch
        assert not whole[name].is_exact
        assert whole[name].distinct == pytest.approx(exact, rel=0.08)


def test_a_dictionary_is_described_as_its_texts() -> None:
    texts = pa.array(["b", None, "a", "b", "c"])
    plain = describe.describe(pa.table({"t": texts})).columns["t"]
    assert describe.describe(pa.table({"t": texts.dictionary_encode()})).columns["t"] == plain


def test_of_too_many_texts_the_most_frequent_are_named_and_the_rest_counted() -> None:
    texts = ["often"] * 5 + [f"t{index:04d}" for index in range(2000)] + ["twice"] * 2
    found = describe.describe(pa.table({"t": texts})).columns["t"]
    assert list(found.frequent)[:3] == ["often", "twice", "t0000"]
    assert sum(found.frequent.values()) + found.lost == len(texts)


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_the_sample_is_the_same_by_any_cut_and_holds_kept_rows_only(rate: float) -> None:
    ids = np.arange(5_000, dtype=np.uint64) + 2
    table = pa.table({"x": np.arange(5_000.0), ROW_ID: ids})
    sides = np.tile(np.array([0, 1, 1, 2, 3], np.int8), 1_000)
    whole = describe.sampled([describe.sample(table, sides, rate)])
    cut = [describe.sample(table.slice(at, 700), sides[at : at + 700], rate) for at in range(0, 5_000, 700)]
    assert describe.sampled(cut).equals(whole)
    taken = whole[ROW_ID].to_numpy().astype(int) - 2
    assert whole[describe.SIDE].to_pylist() == sides[taken].tolist()
    assert not pc.any(pc.equal(whole[describe.SIDE], 0)).as_py()
    assert whole.num_rows == pytest.approx(4_000 * rate, rel=0.2 if rate < 1 else 0)
    assert describe.rate(4_000) == 1.0
    assert describe.rate(1_000_000) == 0.01
