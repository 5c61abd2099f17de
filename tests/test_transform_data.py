"""The transform as jobs write it: shards against scikit-learn and pandas on the training rows, and on nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from preparing import prepared
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.preprocessing import OneHotEncoder, QuantileTransformer, RobustScaler, StandardScaler

from raylway.features.prepared import LINE_BITS, SPLITS, Prepared
from raylway.job.load import load_job
from raylway.launch.check import check

ROWS = 400


def values(kind: str, seed: int = 0) -> np.ndarray:
    """400 numbers of a shape that breaks careless quantiles, means or spreads."""
    rng = np.random.default_rng(seed)
    drawn = {
        "normal": lambda: rng.normal(5, 3, ROWS),
        "ties": lambda: rng.choice([0.0, 1.0, 5.0, 5.5], ROWS, p=[0.7, 0.1, 0.1, 0.1]),
        "two": lambda: np.where(np.arange(ROWS) % 100 == 3, 7.25, -1.5),
        "zeros": lambda: rng.choice([-0.0, 0.0, 2.0], ROWS),
        "denormal": lambda: rng.integers(1, 50, ROWS) * 5e-324,
        "range": lambda: rng.choice([-1, 1], ROWS) * 10.0 ** rng.uniform(-12, 12, ROWS),
        "huge range": lambda: rng.choice([-1, 1], ROWS) * 10.0 ** rng.uniform(-140, 140, ROWS),
        "large": lambda: (2**53 + rng.integers(0, 1 << 12, ROWS)).astype(float),
        "outlier": lambda: np.where(np.arange(ROWS) == 9, 1e12, rng.normal(size=ROWS)),
        "shifted": lambda: 1e6 + rng.normal(0, 0.01, ROWS),
    }
    return drawn[kind]()


KINDS = ["normal", "ties", "two", "zeros", "denormal", "range", "huge range", "large", "outlier", "shifted"]


def sides(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).choice(SPLITS, ROWS, p=[0.7, 0.1, 0.2])


def job(folder: Path, frame: pd.DataFrame, section: dict[str, Any], **data: Any) -> Prepared:
    folder.mkdir(exist_ok=True)
    frame.to_parquet(folder / "rows.parquet")
    described = {"source": "rows.parquet", "target": "y", "split": {"by": "column", "column": "side"}}
    described |= {"transform": section, "clean": {"missing": "impute", "duplicates": "keep"}}
    return prepared(folder, described | data)


def inputs(found: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """All rows' numbers and codes in the order of the source."""
    numeric, categorical, ids = [], [], []
    for side in SPLITS:
        rows = found.rows(side)
        part = rows.take(np.arange(len(rows)))
        numeric.append(part[0])
        categorical.append(part[1])
        ids.append((part[3] & np.uint64((1 << LINE_BITS) - 1)).astype(int))
    order = np.argsort(np.concatenate(ids))
    return np.concatenate(numeric)[order], np.concatenate(categorical)[order]


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Shards hold float32."""
    np.testing.assert_allclose(found, expected.astype(np.float32), rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shards_are_those_of_scikit_learn_fitted_on_the_training_rows(tmp_path: Path, kind: str) -> None:
    x, side = values(kind), sides()
    y = np.random.default_rng(2).normal(size=ROWS)
    # scikit-learn takes spreads below 1e-15 for constants; what is beyond float32 can only be ranked
    ranked = kind in ("denormal", "huge range")
    names = ["quantile", "bins"] if ranked else ["standard", "robust", "quantile", "log", "bins", "none"]
    frame = pd.DataFrame(dict.fromkeys(names, x)).assign(side=side, y=y)
    columns = {name: {"bins": 7} if name == "bins" else {"scale": name} for name in names}
    found = job(tmp_path, frame, {"columns": columns})
    transform = found.manifest.transform
    wide, _ = inputs(found)
    train = x[side == "train"]
    column, fitted = x[:, None], train[:, None]
    logged = np.sign(column) * np.log1p(np.abs(column))
    edges = np.unique(np.quantile(train, np.linspace(0, 1, 8)))
    assert [feature.name for feature in transform.numeric] == names
    by_name = dict(
        zip(names, np.split(wide, np.cumsum([each.width for each in transform.numeric])[:-1], 1), strict=True)
    )
    learnt = {feature.name: feature for feature in transform.numeric}
    np.testing.assert_allclose(learnt["bins"].edges, edges, rtol=1e-9, atol=0)
    close(by_name["bins"], piecewise(x, edges))
    close(by_name["quantile"][:, 0], share(x, np.sort(train)))
    if ranked:
        return
    close(by_name["none"], column)
    for name, reference, cells in (
        ("standard", StandardScaler().fit(fitted), column),
        ("robust", RobustScaler().fit(fitted), column),
        ("log", StandardScaler().fit(logged[side == "train"]), logged),
    ):
        centre = reference.center_[0] if name == "robust" else reference.mean_[0]
        np.testing.assert_allclose(learnt[name].centre, centre, rtol=1e-9, atol=1e-9 * np.abs(cells).max())
        if kind != "large" or name == "robust":  # there scikit-learn takes spreads that rounding might explain for none
            np.testing.assert_allclose(learnt[name].unit, reference.scale_[0], rtol=1e-9)
            expected = reference.transform(cells)
            bound = max(1e6, np.abs(expected[side == "train"]).max())
            close(by_name[name], np.clip(expected, -bound, bound))


def piecewise(x: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Equation 1 of arXiv 2203.05556, word by word, within the bounds of float32 that the documents state."""
    bins = len(edges) - 1
    result = np.zeros((len(x), bins))
    for row, value in enumerate(x):
        for t in range(1, bins + 1):
            if value < edges[t - 1] and t > 1:
                result[row, t - 1] = 0
            elif value >= edges[t] and t < bins:
                result[row, t - 1] = 1
            else:
                result[row, t - 1] = (value - edges[t - 1]) / (edges[t] - edges[t - 1])
    return np.clip(result, -1e6, 1e6)


def share(x: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """The share of training rows below x, the middle of the shares for ties; by numpy.interp from both sides."""
    shares = np.linspace(0, 1, len(ordered))
    middle = 0.5 * (np.interp(x, ordered, shares) - np.interp(-x, -ordered[::-1], -shares[::-1]))
    return np.where(x <= ordered[0], 0, np.where(x >= ordered[-1], 1, middle))


@pytest.mark.parametrize("rows", [400, 3_000])
def test_quantiles_of_different_numbers_are_those_of_scikit_learn(tmp_path: Path, rows: int) -> None:
    rng = np.random.default_rng(rows)
    frame = pd.DataFrame({"x": rng.lognormal(0, 4, rows), "side": "train", "y": rng.normal(size=rows)})
    wide, _ = inputs(job(tmp_path, frame, {"scale": "quantile"}))
    reference = QuantileTransformer(n_quantiles=min(1000, rows), subsample=None)
    close(wide, reference.fit_transform(frame[["x"]].to_numpy()))


@pytest.mark.parametrize("impute", ["mean", "median", "most_frequent", 2.5])
def test_missing_cells_are_filled_as_scikit_learn_does(tmp_path: Path, impute: Any) -> None:
    rng, side = np.random.default_rng(3), sides()
    x = np.where(rng.random(ROWS) < 0.3, np.nan, rng.integers(0, 9, ROWS))
    frame = pd.DataFrame({"x": x, "side": side, "y": rng.normal(size=ROWS)})
    wide, _ = inputs(job(tmp_path, frame, {"scale": "none", "impute": impute, "indicator": True}))
    fitted = x[side == "train"][:, None]
    how: dict[str, Any] = {"strategy": impute}
    if isinstance(impute, float):
        how = {"strategy": "constant", "fill_value": impute}
    filled = SimpleImputer(**how).fit(fitted).transform(x[:, None])
    close(wide, np.hstack([filled, MissingIndicator().fit(fitted).transform(x[:, None])]))


@pytest.mark.parametrize("categories", ["embedding", "one_hot"])
@pytest.mark.parametrize("constant", ["none", "c3"])
def test_a_constant_stands_in_for_categories_as_in_scikit_learn(tmp_path: Path, categories: str, constant: str) -> None:
    """Of text, of numbers, of booleans; a new category, or one that is there already."""
    rng, side = np.random.default_rng(5), sides()
    drawn = {
        "text": np.array([f"c{number}" for number in rng.integers(0, 6, ROWS)], object),
        "number": rng.integers(0, 4, ROWS).astype(object),
        "flag": (rng.random(ROWS) < 0.4).astype(object),
        "whole": np.array([f"w{number}" for number in rng.integers(0, 3, ROWS)], object),
    }
    for name, cells in drawn.items():
        cells[(rng.random(ROWS) < 0.3) & ((side != "train") | (name != "whole"))] = None
    frame = pd.DataFrame(drawn).assign(side=side, y=rng.normal(size=ROWS)).convert_dtypes()
    constants = {"text": constant, "number": 7, "flag": "none", "whole": constant}
    columns = {name: {"impute": each} for name, each in constants.items()}
    section = {"categories": categories, "columns": columns, "indicator": True}
    found = job(tmp_path, frame, section, features={"categorical": ["number"]})
    wide, codes = inputs(found)
    spelt = {name: [None if cell is None else str(cell).lower() for cell in cells] for name, cells in drawn.items()}
    for place, name in enumerate(feature.name for feature in found.manifest.transform.categorical):
        cells, train = np.array(spelt[name], object)[:, None], side == "train"
        fill = SimpleImputer(strategy="constant", fill_value=str(constants[name]), missing_values=None)
        filled = fill.fit_transform(cells)
        one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(filled[train])
        expected = one_hot.transform(filled)
        if name != "whole":  # in training it misses no cell
            expected = np.hstack([expected, (cells == None).astype(float)])  # noqa: E711
        if categories == "one_hot":
            assert (wide[:, : expected.shape[1]] == expected).all(), name
            wide = wide[:, expected.shape[1] :]
        else:
            hot = expected[:, : len(one_hot.categories_[0])]
            assert (codes[:, place] == (hot * np.arange(1, hot.shape[1] + 1)).sum(axis=1)).all(), name


@pytest.mark.parametrize("constant", ["2000-02-29", "1999-12-31T23:00:00Z"])
def test_a_constant_date_stands_in_as_if_it_stood_there(tmp_path: Path, constant: str) -> None:
    rng, side = np.random.default_rng(6), sides()
    days = pd.Timestamp("2013-01-01T05:00:00") + pd.to_timedelta(rng.integers(0, 9000, ROWS), "h")
    text = pd.Series(days).dt.strftime("%Y-%m-%dT%H:%M:%SZ").astype(object)
    gaps = text.mask(rng.random(ROWS) < 0.3, None)
    frame = pd.DataFrame({"d": gaps, "side": side, "y": rng.normal(size=ROWS)})
    section = {"scale": "none", "columns": {"d": {"impute": constant}}}
    data = {"features": {"date": ["d"]}}
    gapped = inputs(job(tmp_path / "gaps", frame, section, **data))
    filled = inputs(job(tmp_path / "filled", frame.assign(d=gaps.fillna(constant)), section, **data))
    assert len(gapped[0][0]) + len(gapped[1][0]) == 6
    assert (gapped[0] == filled[0]).all() and (gapped[1] == filled[1]).all()


@pytest.mark.parametrize("rare", [1, 6])
def test_categories_are_those_of_scikit_learn(tmp_path: Path, rare: int) -> None:
    """Some categories are only among the other rows: unknown."""
    rng, side = np.random.default_rng(4), sides()
    c = rng.zipf(1.7, ROWS).clip(max=60).astype(str).astype(object)
    c[(side != "train") & (rng.random(ROWS) < 0.2)] = "unheard of"
    frame = pd.DataFrame({"hot": c, "code": c, "side": side, "y": rng.normal(size=ROWS)})
    frame["hot"], frame["code"] = "h" + frame["hot"], "c" + frame["code"]
    section = {"rare": rare, "columns": {"hot": {"categories": "one_hot"}}}
    wide, codes = inputs(job(tmp_path, frame, section))
    train = frame[side == "train"]
    one_hot = OneHotEncoder(handle_unknown="ignore", min_frequency=rare, sparse_output=False).fit(train[["hot"]])
    assert wide.tolist() == one_hot.transform(frame[["hot"]]).tolist()
    counts = train["code"].value_counts()
    kept = sorted(counts[counts >= rare].index)
    last = len(kept) + 1 if rare > 1 else 0
    expected = [kept.index(text) + 1 if text in kept else last * (text in counts) for text in frame["code"]]
    assert codes[:, 0].tolist() == expected


def test_parts_of_dates_are_those_of_pandas(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    when = pd.Series(pd.to_datetime(rng.integers(-(10**9), 4 * 10**9, ROWS), unit="s", utc=True))
    frame = pd.DataFrame({"when": when.dt.strftime("%Y-%m-%dT%H:%M:%SZ"), "side": "train", "y": rng.normal(size=ROWS)})
    found = job(tmp_path, frame, {"scale": "none"})
    wide, codes = inputs(found)
    seconds = (when - pd.Timestamp("1970-01-01", tz="UTC")).dt.total_seconds()
    close(wide, np.stack([when.dt.year, seconds], axis=1))
    parts = [when.dt.month, when.dt.day, when.dt.day_of_week + 1, when.dt.hour]
    for place, (feature, part) in enumerate(zip(found.manifest.transform.embedded, parts, strict=True)):
        assert [feature.categories[code - 1] for code in codes[:, place]] == part.astype(str).tolist()


@pytest.mark.parametrize("way", ["column", "files"])
def test_other_rows_than_those_of_training_change_nothing(tmp_path: Path, way: str) -> None:
    """Every cell of the validation and test rows is another, wilder one: same transform, same training shards."""
    rng, side = np.random.default_rng(6), sides()
    frame = pd.DataFrame(
        {
            "x": values("normal"),
            "n": np.where(rng.random(ROWS) < 0.2, np.nan, rng.integers(0, 30, ROWS)),
            "c": rng.choice(list("abcde"), ROWS, p=[0.5, 0.3, 0.15, 0.04, 0.01]),
            "d": pd.Series(pd.date_range("2020-01-01", periods=ROWS, freq="7h")).dt.strftime("%Y-%m-%dT%H:00"),
            "y": rng.choice(["no", "yes"], ROWS),
        }
    )
    other = frame.copy()
    held = side != "train"
    other.loc[held, "x"] = 1e9 * rng.normal(size=held.sum())
    other.loc[held, "n"] = np.where(rng.random(held.sum()) < 0.9, np.nan, 10.0**6)
    other.loc[held, "c"] = rng.choice(["e", "f", "g"], held.sum())
    other.loc[held, "d"] = "1999-12-31T23:00"
    other.loc[held, "y"] = other["y"][held].map({"no": "yes", "yes": "no"})
    section = {
        "indicator": True,
        "impute": "median",
        "rare": 5,
        "columns": {"x": {"bins": 6}, "n": {"scale": "quantile"}, "d": {"scale": "robust"}},
    }
    made = []
    for name, table in (("one", frame), ("other", other)):
        if way == "column":
            made.append(job(tmp_path / name, table.assign(side=side), section, features={"date": ["d"]}))
            continue
        (tmp_path / name).mkdir()
        for each in SPLITS:
            table[side == each].to_csv(tmp_path / name / f"{each}.csv", index=False)
        data = {"source": {each: f"{each}.csv" for each in SPLITS}, "target": "y", "transform": section}
        data |= {"clean": {"missing": "impute", "duplicates": "keep"}, "features": {"date": ["d"]}}
        made.append(prepared(tmp_path / name, data))
    one, two = (each.manifest for each in made)
    assert one.transform == two.transform and one.fingerprint != two.fingerprint
    shards = [[shard.checksum for shard in each.shards("train")] for each in made]
    assert shards[0] == shards[1] != []
    assert [each.checksum for each in made[0].shards("test")] != [each.checksum for each in made[1].shards("test")]


def test_the_logarithm_of_large_numbers_close_together(tmp_path: Path) -> None:
    """The range is that of the logarithms: it is they that are scaled."""
    x = 2.0**60 + 256 * np.arange(ROWS)
    frame = pd.DataFrame(
        {"x": x, "z": 10.0 ** np.linspace(-100, 100, ROWS), "side": "train", "y": np.arange(ROWS) * 1.0}
    )
    wide, _ = inputs(job(tmp_path, frame, {"scale": "log"}))
    assert np.isfinite(wide).all()
    logged = np.log1p(frame[["z"]].to_numpy())
    close(wide[:, 1:], StandardScaler().fit_transform(logged))


@pytest.mark.parametrize("rows", [300, 15_000])
def test_check_says_how_wide_the_models_inputs_are(tmp_path: Path, rows: int) -> None:
    rng = np.random.default_rng(8)
    frame = pd.DataFrame(
        {
            "x": rng.normal(size=rows),
            "n": np.where(rng.random(rows) < 0.2, np.nan, rng.integers(0, 30, rows)),
            "c": rng.choice(list("abcde"), rows),
            "e": rng.choice(["p", "q"], rows),
            "d": pd.Series(pd.date_range("2020-01-01", periods=rows, freq="7h")).dt.strftime("%Y-%m-%dT%H:00"),
            "y": rng.choice(["no", "yes"], rows),
        }
    )
    frame.to_csv(tmp_path / "rows.csv", index=False)
    section = {"bins": 6, "indicator": True, "columns": {"c": {"categories": "one_hot"}, "d": {"scale": "standard"}}}
    data = {"source": "rows.csv", "target": "y", "transform": section, "clean": {"missing": "impute"}}
    transform = prepared(tmp_path, data).manifest.transform
    shown = check(load_job(tmp_path / "job.yaml"))
    assert (shown.sample.numbers, shown.sample.codes) == (transform.num_numeric, len(transform.category_counts))
    about = "about " if rows > 10_000 else ""
    words = f"over 2 numeric and 2 categorical and 1 date features: {about}{transform.num_numeric} numbers and 5 codes"
    assert words in shown.as_text()
