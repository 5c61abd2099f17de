"""Fitting in rounds and every kind of the transform, against scikit-learn and numpy on the same rows in float64."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.preprocessing import OneHotEncoder, QuantileTransformer, RobustScaler, StandardScaler

from raylway.errors import UserError
from raylway.features import fit as fitting
from raylway.features import moments, quantiles
from raylway.features.encode import Categories, Columns, piecewise_linear
from raylway.features.fit import Part, Question, advance, first_question, fit, measure
from raylway.features.plan import FitPlan, treatments
from raylway.features.transform import Encoder, Transform
from raylway.job.schema import ColumnTransform
from raylway.job.schema import Transform as Section

NUMBERS = st.lists(st.floats(-1e6, 1e6).map(lambda x: round(x, 3)), min_size=2, max_size=60)
GAPPY = st.lists(st.none() | st.integers(-50, 50).map(float), min_size=1, max_size=60)
CUTS = st.integers(1, 5)


def plan(section: Section, numeric: list[str], categorical: list[str] = [], date: list[str] = []) -> FitPlan:  # noqa: B006
    how = treatments(section, numeric, categorical, date)
    return FitPlan({}, [], numeric, categorical, date, [], how, "y", "classification", ["a", "b"], drops_missing=False)


def cut(table: pa.Table, parts: int) -> list[pa.Table]:
    edges = np.linspace(0, table.num_rows, parts + 1).astype(int)
    return [table.slice(start, end - start) for start, end in pairwise(edges)]


def wide(transform: Transform, table: pa.Table) -> np.ndarray:
    """The numeric inputs before they are cast to float32."""
    columns = Columns(table)
    numbers = np.array([columns.number(each.column, each.part) for each in transform.numeric])
    texts = [columns.text(each.column, each.part) for each in transform.categorical]
    codes = [Categories(each).codes(text) for each, text in zip(transform.categorical, texts, strict=True)]
    return Encoder(transform).wide(numbers.T.reshape(table.num_rows, len(transform.numeric)), texts, codes)


def numbers(values: list[float | None] | np.ndarray) -> pa.Table:
    return pa.table({"x": pa.array(values, pa.float64())})


def column(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])[:, None]


def close(found: np.ndarray, expected: np.ndarray, scale: float = 1.0) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * scale)


@given(NUMBERS, CUTS)
def test_standard(values: list[float], parts: int) -> None:
    transform = fit(cut(numbers(values), parts), plan(Section(), ["x"]))
    if np.std(values) > 1e-6 or len(set(values)) == 1:
        close(wide(transform, numbers(values)), StandardScaler().fit_transform(column(values)))


@given(NUMBERS, CUTS)
def test_robust(values: list[float], parts: int) -> None:
    transform = fit(cut(numbers(values), parts), plan(Section(scale="robust"), ["x"]))
    expected = RobustScaler().fit_transform(column(values))
    close(wide(transform, numbers(values)), expected, max(1.0, np.abs(expected).max()))


@given(NUMBERS, CUTS, NUMBERS)
def test_quantile(values: list[float], parts: int, others: list[float]) -> None:
    """Up to 1,000 rows each is a quantile: the exact empirical share, in the middle of ties.

    scikit-learn computes the same from percentiles, whose last bits may part two equal quantiles; so it is the
    reference where no two values are equal, and its formula over the sorted values is where some are.
    """
    transform = fit(cut(numbers(values), parts), plan(Section(scale="quantile"), ["x"]))
    if len(set(values)) == 1:
        return
    points, shares = np.sort(values), np.linspace(0, 1, len(values))
    for some in (np.array(values), np.array(others)):
        expected = 0.5 * (np.interp(some, points, shares) - np.interp(-some, -points[::-1], -shares[::-1]))
        expected = np.where(some <= points[0], 0, np.where(some >= points[-1], 1, expected))
        close(wide(transform, numbers(some))[:, 0], expected)
        if len(set(values)) == len(values):
            reference = QuantileTransformer(n_quantiles=len(values), subsample=None).fit(column(values))
            close(wide(transform, numbers(some)), reference.transform(some[:, None]))


def test_quantile_of_many_rows() -> None:
    values = np.random.default_rng(1).lognormal(size=20_000)
    transform = fit(cut(numbers(values), 3), plan(Section(scale="quantile"), ["x"]))
    reference = QuantileTransformer(n_quantiles=1000, subsample=None).fit_transform(values[:, None])
    close(wide(transform, numbers(values)), reference)


@given(NUMBERS, CUTS)
def test_log(values: list[float], parts: int) -> None:
    transform = fit(cut(numbers(values), parts), plan(Section(scale="log"), ["x"]))
    logged = np.sign(column(values)) * np.log1p(np.abs(column(values)))
    if np.std(logged) > 1e-6 or len(set(values)) == 1:
        close(wide(transform, numbers(values)), StandardScaler().fit_transform(logged))


@given(NUMBERS)
def test_none(values: list[float]) -> None:
    transform = fit([numbers(values)], plan(Section(scale="none"), ["x"]))
    expected = column(values) if len(set(values)) > 1 else 0 * column(values)
    assert wide(transform, numbers(values)).tolist() == expected.tolist()


@pytest.mark.parametrize("scale", ["standard", "robust", "quantile", "log", "none"])
@pytest.mark.parametrize("bins", [None, 4])
def test_a_constant_column_is_zero_in_every_scale(scale: Any, bins: int | None) -> None:
    section = Section(scale=scale, bins=bins)
    transform = fit([numbers([7.5] * 5)], plan(section, ["x"]))
    assert transform.encode(numbers([7.5, -1e300, None])).numeric.tolist() == [[0.0]] * 3
    nothing = fit([numbers([None, None])], plan(section, ["x"]))
    assert nothing.encode(numbers([7.5, None])).numeric.tolist() == [[0.0]] * 2


@given(GAPPY, CUTS, st.sampled_from(["mean", "median", "most_frequent", 3.0]), st.booleans())
def test_missing_cells(values: list[float | None], parts: int, impute: Any, indicator: bool) -> None:
    section = Section(scale="none", impute=impute, indicator=indicator)
    transform = fit(cut(numbers(values), parts), plan(section, ["x"]))
    frame = column(values)
    present = frame[~np.isnan(frame)]
    if len(set(present)) < 2:
        return
    how = {"strategy": "constant", "fill_value": impute} if isinstance(impute, float) else {"strategy": impute}
    expected = SimpleImputer(**how).fit_transform(frame)
    if indicator and np.isnan(frame).any():
        expected = np.hstack([expected, MissingIndicator().fit_transform(frame)])
    close(wide(transform, numbers(values)), expected)
    assert transform.num_numeric == expected.shape[1] == len(transform.numeric_names)


@given(GAPPY, st.sampled_from(["standard", "robust"]))
def test_scales_are_fitted_on_the_present_cells(values: list[float | None], scale: Any) -> None:
    frame = column(values)
    if len(set(frame[~np.isnan(frame)])) < 2:
        return
    transform = fit([numbers(values)], plan(Section(scale=scale, impute="median"), ["x"]))
    scaler = (StandardScaler() if scale == "standard" else RobustScaler()).fit(frame)
    close(wide(transform, numbers(values)), scaler.transform(SimpleImputer(strategy="median").fit_transform(frame)))


TEXTS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60)


@given(TEXTS, CUTS, st.integers(1, 5))
def test_one_hot_with_a_rare_bucket(texts: list[str], parts: int, rare: int) -> None:
    table = pa.table({"c": texts})
    transform = fit(cut(table, parts), plan(Section(categories="one_hot", rare=rare), [], ["c"]))
    reference = OneHotEncoder(handle_unknown="ignore", min_frequency=rare, sparse_output=False)
    reference.fit(np.array(texts)[:, None])
    rows = [*texts, *"abcdefgh", "unknown"]
    assert wide(transform, pa.table({"c": rows})).tolist() == reference.transform(np.array(rows)[:, None]).tolist()
    assert transform.category_counts == [] and transform.num_numeric == len(transform.numeric_names)


@given(TEXTS, st.integers(1, 5))
def test_codes_with_a_rare_bucket(texts: list[str], rare: int) -> None:
    transform = fit([pa.table({"c": texts})], plan(Section(rare=rare), [], ["c"]))
    counts = pd.Series(texts).value_counts()
    kept = sorted(counts[counts >= rare].index)
    rows = [*"abcdefgh", "unknown"]
    codes = transform.encode(pa.table({"c": rows})).categorical[:, 0]
    for text, code in zip(rows, codes, strict=True):
        seen = len(kept) + 1 if text in counts else 0
        assert code == (kept.index(text) + 1 if text in kept else seen)
    assert transform.category_counts == [len(kept) + (len(kept) < len(counts))]


@given(NUMBERS, CUTS, st.integers(2, 12))
def test_bins(values: list[float], parts: int, bins: int) -> None:
    transform = fit(cut(numbers(values), parts), plan(Section(bins=bins), ["x"]))
    # numpy.quantile's rule with exact shares: its own may part equal edges by a last bit
    places = [Fraction(t * (len(values) - 1), bins) for t in range(bins + 1)]
    low = [sorted(values)[math.floor(place)] for place in places]
    high = [sorted(values)[math.ceil(place)] for place in places]
    edges = np.unique([a + (b - a) * float(place % 1) for a, b, place in zip(low, high, places, strict=True)])
    close(edges[[0, -1]], np.quantile(values, [0, 1]))
    if len(edges) < 2:
        return
    close(np.array(transform.numeric[0].edges), edges, np.abs(edges).max())
    edges = np.array(transform.numeric[0].edges)
    rows = np.array([*values, edges[0] - 10, edges[-1] + 10])
    expected = np.zeros((len(rows), len(edges) - 1))
    for row, x in enumerate(rows):  # equation 1 of the paper, word by word
        for t in range(1, len(edges)):
            if x < edges[t - 1] and t > 1:
                expected[row, t - 1] = 0
            elif x >= edges[t] and t < len(edges) - 1:
                expected[row, t - 1] = 1
            else:
                expected[row, t - 1] = (x - edges[t - 1]) / (edges[t] - edges[t - 1])
    close(wide(transform, numbers(rows)), np.clip(expected, -1e6, 1e6))
    assert len(transform.numeric_names) == transform.num_numeric == len(edges) - 1


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=200),
    CUTS,
    st.sampled_from([0, 3, 1 << 20]),
    st.lists(st.floats(0, 1), min_size=1, max_size=20),
)
@settings(max_examples=200)
def test_order_statistics_are_exact(values: list[float], parts: int, most: int, shares: list[float]) -> None:
    pieces = np.array_split(np.array(values), parts)
    wanted = quantiles.ranks(np.array(shares), len(values))
    found, asked = quantiles.looking_for(wanted), None
    counted = quantiles.merged(map(quantiles.first, pieces))
    for _ in range(8):
        found, asked = quantiles.advance(found, counted, asked, most)
        if asked is None:
            break
        answers = [quantiles.below(piece, asked) for piece in pieces]
        if asked.values:
            found = quantiles.finish(found, [each for each in answers if isinstance(each, bytes)], asked)
            break
        counted = quantiles.merged(each for each in answers if isinstance(each, quantiles.Histogram))
    assert np.array_equal(np.frombuffer(found.values), np.sort(values)[wanted])
    if np.abs(values).max() < 1e300:
        close(found.at(np.array(shares), len(values)), np.quantile(values, shares), np.abs(values).max())


def test_many_ties_and_many_numbers_end_in_few_rounds() -> None:
    rng = np.random.default_rng(0)
    some = np.where(rng.random(200_000) < 0.9, 0.0, rng.standard_normal(200_000))
    table = pa.table({"ties": some, "whole": rng.integers(0, 60, 200_000), "real": rng.random(200_000)})
    what = plan(Section(bins=48), ["ties", "whole", "real"])
    question: Question | Transform = first_question(what)
    rounds = 0
    while isinstance(question, Question):
        rounds += 1
        question = advance(what, question, [measure(part, what, question) for part in cut(table, 4)])
    assert rounds == 2
    for feature in question.numeric:
        edges = np.unique(np.quantile(table[feature.name].to_numpy(), np.linspace(0, 1, 49)))
        assert feature.edges == edges.tolist()


def test_a_plan_without_quantiles_takes_one_round() -> None:
    table = pa.table({"x": [1.0, 2.0, None], "c": ["a", None, "b"]})
    what = plan(Section(indicator=True, impute="most_frequent"), ["x"], ["c"])
    assert isinstance(advance(what, first_question(what), [measure(table, what, first_question(what))]), Transform)


@given(st.lists(st.integers(-3, 3) | st.none(), min_size=1, max_size=30), st.integers(0, 30))
def test_questions_and_parts_travel_and_their_cut_decides_nothing_but_last_bits(
    values: list[int | None], at: int
) -> None:
    table = pa.table({"x": pa.array(values, pa.int64()), "c": pa.array(values).cast(pa.string())})
    what = plan(Section(scale="robust", impute="median", indicator=True, rare=2), ["x"], ["c"])
    question: Question | Transform = first_question(what)
    while isinstance(question, Question):
        question = msgspec.msgpack.decode(msgspec.msgpack.encode(question), type=Question)
        parts = [measure(part, what, question) for part in (table.slice(0, at), table.slice(at))]
        parts = msgspec.msgpack.decode(msgspec.msgpack.encode(parts), type=list[Part])
        question = advance(what, question, iter(parts))
    whole = fit([table], what)
    assert (question.numeric[0].centre, question.numeric[0].unit) == (whole.numeric[0].centre, whole.numeric[0].unit)
    assert question.categorical == whole.categorical
    again = msgspec.json.decode(msgspec.json.encode(question), type=Transform)
    assert again.encode(table).numeric.tobytes() == question.encode(table).numeric.tobytes()


def test_a_column_differs_from_the_section() -> None:
    own = {"b": ColumnTransform(scale="log"), "c": ColumnTransform(bins=None), "d": ColumnTransform(bins=3)}
    how = treatments(Section(scale="robust", bins=8, columns=own), ["a", "b", "c", "d"], [], [])
    assert [(how[name].scale, how[name].bins) for name in "abcd"] == [
        ("robust", 8),
        ("log", None),
        ("robust", None),
        ("robust", 3),
    ]


@pytest.mark.parametrize(
    ("own", "role", "words"),
    [
        (ColumnTransform(scale="log"), 1, "scale means nothing for the column 'x', which is a category"),
        (ColumnTransform(rare=2), 0, "rare means nothing for the column 'x', which is numeric"),
        (ColumnTransform(rare=2), 2, "rare means nothing for the column 'x', which is a date"),
        (ColumnTransform(impute=3.0), 2, "this can't stand in for a missing cell of the column 'x', which is a date"),
    ],
)
def test_keys_that_mean_nothing_for_a_column(own: ColumnTransform, role: int, words: str) -> None:
    lists: list[list[str]] = [[], [], []]
    lists[role] = ["x"]
    with pytest.raises(UserError, match=words) as caught:
        treatments(Section(columns={"x": own}), *lists)
    assert caught.value.where.startswith("data.transform.columns.x.")


def test_numbers_of_which_none_is_typical(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments.Frequent, "MOST", 10)
    what = plan(Section(impute="most_frequent"), ["x"])
    with pytest.raises(UserError, match="no number of the column 'x' stands out") as caught:
        fit([numbers(np.arange(100.0))], what)
    assert "impute: median" in caught.value.fix
    inflated = np.concatenate([np.arange(100.0), np.zeros(5)])
    assert fit(cut(numbers(inflated), 3), what).numeric[0].fill == 0.0


def test_too_many_categories_for_one_hot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MOST_ONE_HOT", 3)
    table = pa.table({"c": list("abcd")})
    with pytest.raises(UserError, match="too many categories for one-hot"):
        fit([table], plan(Section(categories="one_hot"), [], ["c"]))
    fit([table], plan(Section(categories="one_hot", rare=2), [], ["c"]))


@pytest.mark.parametrize("values", [[1e308, -1e308], [1e200, 0.0], [1e40, 1.0, 2.0]])
def test_numbers_too_large_for_the_model(values: list[float]) -> None:
    with pytest.raises(UserError, match="too large"):
        fit([numbers(values)], plan(Section(scale="none"), ["x"]))


def test_date_parts() -> None:
    moments_ = pd.date_range("2012-12-30 21:30", periods=60, freq="7h", tz="UTC")
    table = pa.table({"d": [*moments_.strftime("%Y-%m-%dT%H:%M:%SZ"), None, "2013-01-01"]})
    transform = fit(cut(table, 3), plan(Section(), [], [], ["d"]))
    assert transform.feature_names == ["d.year", "d.seconds", "d.month", "d.day", "d.weekday", "d.hour"]
    assert transform.category_counts == [len(feature.categories) for feature in transform.categorical]
    series = pd.Series([*moments_, pd.Timestamp("2013-01-01", tz="UTC")])
    rows = table.filter(table["d"].is_valid())
    parts = {
        "month": series.dt.month,
        "day": series.dt.day,
        "weekday": series.dt.day_of_week + 1,
        "hour": series.dt.hour,
    }
    codes = transform.encode(rows).categorical
    for index, (name, expected) in enumerate(parts.items()):
        names = transform.categorical[index].categories
        assert [names[code - 1] for code in codes[:, index]] == expected.astype(str).tolist(), name
    seconds = np.column_stack([series.dt.year, (series - pd.Timestamp(0, tz="UTC")).dt.total_seconds()])
    close(wide(transform, rows), StandardScaler().fit_transform(seconds), 100)
    assert transform.encode(pa.table({"d": [None, "no date"]})).numeric.tolist() == [[0.0, 0.0]] * 2


def test_of_a_date_only_what_varies_is_taken() -> None:
    days = pa.table({"d": ["2013-05-06", "2013-05-20", "2013-05-13"]})
    transform = fit([days], plan(Section(categories="one_hot", indicator=True), [], [], ["d"]))
    assert transform.numeric_names == ["d.seconds", "d.day is 6", "d.day is 13", "d.day is 20"]
    one = fit([pa.table({"d": ["2013-05-06", None]})], plan(Section(indicator=True), [], [], ["d"]))
    assert one.numeric_names == ["d.seconds", "d.seconds is missing"]
    assert one.encode(pa.table({"d": [None, "2014-01-01"]})).numeric.tolist() == [[0, 1], [0, 0]]


def test_bins_and_scales_of_dates() -> None:
    table = pa.table({"d": [f"2013-01-{day:02}" for day in range(1, 29)]})
    transform = fit([table], plan(Section(bins=4), [], [], ["d"]))
    assert transform.numeric[0].width == 4 and transform.num_numeric == 4


@pytest.mark.parametrize(
    "section",
    [
        Section(),
        Section(scale="quantile", impute="median", indicator=True, categories="one_hot"),
        Section(scale="log", rare=3),
        Section(bins=7, indicator=True),
    ],
)
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(section: Section) -> None:
    rng = np.random.default_rng(3)
    table = pa.table(
        {
            "x": pa.array(rng.lognormal(2, 3, 300), mask=rng.random(300) < 0.1),
            "z": rng.integers(0, 9, 300),
            "c": rng.choice(list("abcdefg"), 300),
            "d": [f"20{year:02}-03-0{day}" for year, day in rng.integers(1, 9, (300, 2))],
        }
    )
    transform = fit([table], plan(section, ["x", "z"], ["c"], ["d"]))
    whole = transform.encode(table)
    assert whole.numeric.shape == (300, transform.num_numeric) and np.isfinite(whole.numeric).all()
    for size in (1, 7, 64):
        parts = [transform.encode(table.slice(start, size)) for start in range(0, 300, size)]
        assert np.concatenate([part.numeric for part in parts]).tobytes() == whole.numeric.tobytes()
        assert np.concatenate([part.categorical for part in parts]).tobytes() == whole.categorical.tobytes()


def test_the_bins_of_a_number_ascend_with_it_as_one() -> None:
    rng = np.random.default_rng(5)
    table = pa.table({"x": rng.standard_normal(500), "z": rng.integers(0, 30, 500), "c": rng.choice(list("abc"), 500)})
    section = Section(bins=9, categories="one_hot", columns={"z": ColumnTransform(scale="standard")})
    transform = fit([table], plan(section, ["x", "z"], ["c"]))
    assert transform.number_starts == [0, 9, 10, 11, 12]
    folded = np.add.reduceat(transform.encode(table).numeric, transform.number_starts, axis=1)
    order = np.argsort(table["x"].to_numpy())
    assert (np.diff(folded[order, 0]) >= 0).all()


def test_piecewise_linear_bins_of_large_numbers() -> None:
    assert np.isfinite(piecewise_linear(np.array([1e308, -1e308, 0.0]), np.array([0.0, 1e-3, 1.0]))).all()


def test_whole_numbers_beyond_two_to_the_53_are_rounded() -> None:
    table = pa.table({"x": [2**60, 2**60 + 1, 2**61]})
    transform = fit([table], plan(Section(), ["x"]))
    assert len(set(transform.encode(table).numeric[:, 0].tolist())) == 2
