"""Profiles and drift against scipy and plain formulas; the command's exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import made
from preparing import prepared
from scipy import special, stats
from web_server import Web

from raylway.bundle.contents import BundleRecord, Provenance
from raylway.data import inputs
from raylway.data.drift import as_text, drift
from raylway.errors import UserError
from raylway.features import profile, shift
from raylway.features.prepared import Prepared
from raylway.features.shapes import shapes
from raylway.features.shift import Shift
from raylway.features.signature import Input, Signature
from raylway.models.registry import ModelSpec

counts = st.lists(st.integers(0, 500), min_size=2, max_size=30)
SIGNATURE = Signature(
    "regression",
    "y",
    [Input("size", "number", False), Input("rooms", "number", False), Input("place", "category", False)],
    [],
)


def rows(seed: int, count: int, shift: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "size": rng.normal(shift, 1, count),
            "rooms": rng.integers(1, 6, count),
            "place": rng.choice(["a", "b", "c"], count, p=[0.6, 0.3, 0.1]),
        }
    )


def record_of(found: Prepared) -> BundleRecord:
    """A bundle's record over prepared data."""
    manifest = found.manifest
    source = Provenance("r", "2026-01-01T00:00:00+00:00", "f", 1, None, {})
    spec = ModelSpec("mlp", {})
    return BundleRecord(
        1, "made", "0" * 12, spec, manifest.signature, manifest.transform, [], source, {}, manifest.profile
    )


def trained(folder: Path, frame: pd.DataFrame, **data: Any) -> BundleRecord:
    """Of `frame`, prepared from a Parquet file without held-out rows."""
    frame.to_parquet(folder / "rows.parquet")
    split = {"by": "random", "validation": "0%", "test": "0%"}
    return record_of(prepared(folder, {"source": "rows.parquet", "target": "y", "split": split, **data}))


def compared(folder: Path, known: BundleRecord, frame: pd.DataFrame) -> dict[str, Shift]:
    frame.to_parquet(folder / "new.parquet")
    return {each.name: each for each in drift(known, str(folder / "new.parquet")).shifts}


def record(with_profile: bool = True) -> BundleRecord:
    table = pa.Table.from_pandas(rows(0, 5_000))
    kinds = {"size": "number", "rooms": "number", "place": "category"}
    table = table.append_column("y", table["size"])
    transform = made(table, "y", kinds, steps=0).transform
    known = profile.profile(table.drop_columns("y"), SIGNATURE, ["place"], {}) if with_profile else None
    source = Provenance("r", "2026-01-01T00:00:00+00:00", "f", 1, None, {})
    return BundleRecord(1, "made", "0" * 12, ModelSpec("mlp", {}), SIGNATURE, transform, [], source, {}, known)


@given(counts, st.data())
def test_the_measures_are_those_of_scipy(before: list[int], data: st.DataObject) -> None:
    now = data.draw(st.lists(st.integers(0, 500), min_size=len(before), max_size=len(before)))
    old, new = np.array(before), np.array(now)
    if not old.sum() or not new.sum():
        return
    p, q = np.maximum(old / old.sum(), 1e-4), np.maximum(new / new.sum(), 1e-4)
    assert shift.psi(old, new) == pytest.approx((special.rel_entr(q, p) + special.rel_entr(p, q)).sum())
    expanded = [np.repeat(np.arange(len(part)), part) for part in (old, new)]
    assert shift.ks(old, new) == pytest.approx(stats.ks_2samp(*expanded, method="asymp").statistic)
    there = (old + new) > 0
    if there.sum() > 1:
        expected = stats.chi2_contingency(np.stack([old[there], new[there]]), correction=False).pvalue
        assert shift.chi_square(old, new) == pytest.approx(expected, rel=1e-7, abs=1e-12)


@given(st.floats(0, 3000), st.integers(1, 400))
def test_the_tail_of_chi_square_is_that_of_scipy(value: float, freedom: int) -> None:
    assert shift.chi_square_tail(value, freedom) == pytest.approx(stats.chi2.sf(value, freedom), rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(("distance", "rows_", "others"), [(0.05, 500, 700), (0.1, 500, 700), (0.01, 9000, 9000)])
def test_the_chance_of_a_distance_is_that_of_scipy(distance: float, rows_: int, others: int) -> None:
    expected = stats.kstwobign.sf(distance * np.sqrt(rows_ * others / (rows_ + others)))
    assert shift.ks_chance(distance, rows_, others) == pytest.approx(expected, rel=0.1)


def test_a_profile_holds_quantiles_shares_and_ranges() -> None:
    frame = rows(1, 2_000)
    frame.loc[:99, "size"] = np.nan
    found = profile.profile(pa.Table.from_pandas(frame), SIGNATURE, ["place"], {"size": 0.05})
    size = found.numbers[0]
    assert (size.minimum, size.maximum) == (frame["size"].min(), frame["size"].max())
    assert size.mean == pytest.approx(frame["size"].mean())
    assert size.missing == pytest.approx(0.05)
    present = frame["size"].dropna().to_numpy()
    half = np.random.Generator(np.random.Philox(key=0x70726F66696C65)).random(len(present)) < 0.5
    assert size.edges == np.quantile(present[half], np.arange(1, 20) / 20, method="higher").tolist()
    assert size.counts == np.histogram(present[~half], [-np.inf, *size.edges, np.inf])[0].tolist()
    half = np.random.Generator(np.random.Philox(key=0x70726F66696C65)).random(len(frame)) < 0.5
    assert found.categories[0].counts == frame.place[~half].value_counts().to_dict()


@pytest.mark.parametrize("count", [60, 500, 20_000])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_rows_of_the_training_distribution_have_not_drifted(tmp_path: Path, count: int, ending: str) -> None:
    file = tmp_path / f"new.{ending}"
    frame = rows(7, count)
    frame.to_csv(file, index=False) if ending == "csv" else frame.to_parquet(file)
    found = drift(record(), str(file))
    assert found.rows == count
    assert not found.drifted, as_text(found)
    assert as_text(found).endswith("no input has drifted")


def test_a_file_of_a_web_server_drifts_as_one_on_disk(tmp_path: Path, web: Web) -> None:
    rows(7, 500, shift=0.5).to_csv(tmp_path / "new.csv", index=False)
    address = web.put("new.csv", (tmp_path / "new.csv").read_bytes())
    assert drift(record(), address).shifts == drift(record(), str(tmp_path / "new.csv")).shifts


def test_what_has_drifted_is_named_first(tmp_path: Path) -> None:
    frame = rows(7, 2_000, shift=1.0)
    frame["rooms"] = frame.rooms.where(np.arange(2_000) % 4 > 0)
    frame["place"] = np.where(np.arange(2_000) % 5 == 0, "new", frame.place)
    frame.to_csv(tmp_path / "new.csv", index=False)
    found = drift(record(), str(tmp_path / "new.csv"))
    reasons = {shift.name: " and ".join(shift.reasons) for shift in found.shifts}
    assert found.drifted
    assert "PSI" in reasons["size"] and "KS" in reasons["size"]
    assert reasons["rooms"] == "25.0% of the cells are missing; 0.0% were in training"
    assert "20.0% of the rows hold a category that training did not see" in reasons["place"]
    assert "3 of 3 inputs have drifted" in as_text(found)


def test_a_file_with_decimal_commas_is_compared_as_told(tmp_path: Path) -> None:
    frame = rows(3, 400, shift=0.5)
    frame.to_csv(tmp_path / "plain.csv", index=False)
    frame.to_csv(tmp_path / "comma.csv", index=False, sep=";", decimal=",")
    (tmp_path / "job.yaml").write_text("name: made\ndata: {source: rows.parquet, target: y}\n")
    told = inputs.job_of(tmp_path / "job.yaml", ["data.read.decimal=','"]).job
    plain, comma = drift(record(), str(tmp_path / "plain.csv")), drift(record(), str(tmp_path / "comma.csv"), told)
    assert comma.shifts == plain.shifts and plain.drifted


def test_files_and_bundles_that_can_not_be_compared(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("size,rooms,place\n")
    with pytest.raises(UserError, match="the file has no rows to compare"):
        drift(record(), str(tmp_path / "empty.csv"))
    (tmp_path / "other.csv").write_text("size,rooms\n1,2\n")
    with pytest.raises(UserError, match="lacks the column 'place'"):
        drift(record(), str(tmp_path / "other.csv"))
    with pytest.raises(UserError, match="the bundle has no profile of its training rows"):
        drift(record(with_profile=False), str(tmp_path / "other.csv"))


def population(rows: int, seed: int) -> pd.DataFrame:
    """Every shape that has told drift where there was none: heavy ties, long tails, many and rare categories, gaps."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "normal": rng.normal(size=rows),
            "ties": np.where(rng.random(rows) < 0.97, 0, rng.exponential(size=rows)),
            "whole": rng.geometric(0.1, rows),
            "long": rng.lognormal(0, 3, rows),
            "gaps": np.where(rng.random(rows) < 0.2, np.nan, rng.normal(size=rows)),
            "zipf": rng.zipf(1.3, rows).clip(max=10**6).astype(str),
            "many": rng.integers(0, 300, rows).astype(str),
            "rare": rng.choice(["a", "b", "c"], rows, p=[0.98, 0.015, 0.005]),
            "flag": rng.random(rows) < 0.1,
            "when": pd.Timestamp("2023-01-01") + pd.to_timedelta(rng.integers(0, 24 * 300, rows), "h"),
        }
    )
    frame["when"] = frame["when"].dt.strftime("%Y-%m-%dT%H:00:00Z").where(rng.random(rows) < 0.85, "NA")
    frame["zipf"], frame["many"] = "z" + frame["zipf"], "m" + frame["many"]
    return frame.assign(y=rng.normal(size=rows))


@pytest.mark.parametrize("missing", ["drop", "impute"])
def test_other_rows_of_one_population_have_not_drifted(tmp_path: Path, missing: str) -> None:
    """Any training set and any file of it, small or large: of 144 comparisons chance alone lets one in 1,000 pass."""
    alarms = []
    for training in (60, 400, 3_000):
        features = {"date": ["when"], "categorical": ["zipf", "many"]}
        known = trained(tmp_path, population(training, training), clean={"missing": missing}, features=features)
        for rows_ in (4, 15, 40, 150, 600, 2_500):
            for seed in range(4):
                found = compared(tmp_path, known, population(rows_, 10_000 + 10 * rows_ + seed))
                alarms += [(training, rows_, name, each.reasons) for name, each in found.items() if each.reasons]
    assert len(alarms) <= 1, alarms


def test_what_lies_beside_a_value_of_nearly_all_rows_is_seen(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": np.where(np.arange(2_000) % 50, 0.0, 1.0), "y": rng.normal(size=2_000)})
    known = trained(tmp_path, frame)
    assert not compared(tmp_path, known, frame)["x"].reasons
    assert compared(tmp_path, known, frame.assign(x=1.0))["x"].reasons
    assert compared(tmp_path, known, frame.assign(x=-1e-300))["x"].reasons


def test_dates_are_compared_by_what_comes_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def frame(first: str, days: int, hours: int = 24, rows: int = 2_000) -> pd.DataFrame:
        hour = pd.to_timedelta(24 * rng.integers(0, days, rows) + rng.integers(0, hours, rows), "h")
        return pd.DataFrame({"when": (pd.Timestamp(first) + hour).astype("datetime64[us]"), "y": rng.normal(size=rows)})

    known = trained(tmp_path, frame("2023-01-01", 364))
    assert known.profile is not None and [part.name for part in known.profile.dates[0].parts] == [
        "when.weekday",
        "when.hour",
    ]
    later = compared(tmp_path, known, frame("2024-01-01", 364))
    assert not any(each.reasons for each in later.values())
    assert (later["when"].ks or 0) > 0.9 and later["when"].psi > 0.2  # shown, no reason
    nights = compared(tmp_path, known, frame("2024-01-01", 364, hours=6))
    assert nights["when.hour"].reasons and not nights["when.weekday"].reasons and not nights["when"].reasons
    gaps = frame("2024-01-01", 364)
    gaps.loc[::2, "when"] = pd.NaT
    assert compared(tmp_path, known, gaps)["when"].reasons == ["50.0% of the cells are missing; 0.0% were in training"]
    spring = trained(tmp_path, frame("2023-03-01", 90))
    (reason,) = compared(tmp_path, spring, frame("2023-10-01", 30))["when"].reasons
    assert reason == "100.0% of the rows hold a month that training did not see"


def test_true_and_false_are_known_in_any_spelling(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"flag": rng.random(500) < 0.3, "y": rng.normal(size=500)})
    known = trained(tmp_path, frame)
    frame.to_csv(tmp_path / "new.csv", index=False)  # True and False
    found = drift(known, str(tmp_path / "new.csv"))
    assert not found.drifted and found.shifts[0].unknown == 0.0
    frame.assign(flag=~frame["flag"]).to_csv(tmp_path / "new.csv", index=False)
    assert drift(known, str(tmp_path / "new.csv")).drifted == 1


def test_text_that_is_no_category_is_known_by_its_shape_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    letters = np.array(list("BDGKLMRSTVÄØ"))
    names = ["".join(rng.choice(letters, 9)) for _ in range(600)]
    clock = [f"{hour:02}:{minute:02}" for hour, minute in rng.integers(0, [24, 60], (600, 2))]
    frame = pd.DataFrame(
        {"who": [f"{name} {time}" for name, time in zip(names, clock, strict=True)], "y": rng.normal(size=600)}
    )
    (tmp_path / "own_hour_of.py").write_text(
        "import pyarrow.compute as pc\n\n\ndef hour(table):\n"
        "    return pc.cast(pc.utf8_slice_codeunits(table['who'], 10, 12), 'float64')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    data = {"derive": {"hour": "own_hour_of:hour(who)"}, "features": {"drop": ["who"]}}
    known = trained(tmp_path, frame, **data)
    written = msgspec.json.encode(known).decode()
    assert not any(name in written for name in names) and "AAAAAAAAA 11:11" in written
    assert not compared(tmp_path, known, frame)["who"].reasons
    assert compared(tmp_path, known, frame.assign(who=frame["who"] + " h"))["who"].reasons


def test_shapes() -> None:
    texts = ["Jürgen Groß-77b", "2013-05-17", "20130517", "1.99 €", "", None, "ＡＢ٣", "12345"]
    expected = ["Aaaaaa Aaaa-11a", "2011-11-11", "20111111", "1.11 a", "", None, "AAa", "11111"]
    assert shapes(pa.array(texts)).to_pylist() == expected
