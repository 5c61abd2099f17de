"""Profiles and drift against scipy and plain formulas; the command's exit codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import made
from scipy import special, stats
from web_server import Web

from raylway.bundle.contents import BundleRecord, Provenance
from raylway.data.drift import as_text, drift
from raylway.errors import UserError
from raylway.features import profile
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


def record(with_profile: bool = True) -> BundleRecord:
    table = pa.Table.from_pandas(rows(0, 5_000))
    kinds = {"size": "number", "rooms": "number", "place": "category"}
    table = table.append_column("y", table["size"])
    transform = made(table, "y", kinds, steps=0).transform
    known = profile.profile(table.drop_columns("y"), SIGNATURE) if with_profile else None
    source = Provenance("r", "2026-01-01T00:00:00+00:00", "f", 1, None, {})
    return BundleRecord(1, "made", "0" * 12, ModelSpec("mlp", {}), SIGNATURE, transform, [], source, {}, known)


@given(counts, st.data())
def test_the_measures_are_those_of_scipy(before: list[int], data: st.DataObject) -> None:
    now = data.draw(st.lists(st.integers(0, 500), min_size=len(before), max_size=len(before)))
    old, new = np.array(before), np.array(now)
    if not old.sum() or not new.sum():
        return
    p, q = np.maximum(old / old.sum(), 1e-4), np.maximum(new / new.sum(), 1e-4)
    assert profile.psi(old, new) == pytest.approx((special.rel_entr(q, p) + special.rel_entr(p, q)).sum())
    expanded = [np.repeat(np.arange(len(part)), part) for part in (old, new)]
    assert profile.ks(old, new) == pytest.approx(stats.ks_2samp(*expanded, method="asymp").statistic)
    there = (old + new) > 0
    if there.sum() > 1:
        expected = stats.chi2_contingency(np.stack([old[there], new[there]]), correction=False).pvalue
        assert profile.chi_square(old, new) == pytest.approx(expected, rel=1e-7, abs=1e-12)


@given(st.floats(0, 3000), st.integers(1, 400))
def test_the_tail_of_chi_square_is_that_of_scipy(value: float, freedom: int) -> None:
    assert profile.chi_square_tail(value, freedom) == pytest.approx(stats.chi2.sf(value, freedom), rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(("distance", "rows_", "others"), [(0.05, 500, 700), (0.1, 500, 700), (0.01, 9000, 9000)])
def test_the_chance_of_a_distance_is_that_of_scipy(distance: float, rows_: int, others: int) -> None:
    expected = stats.kstwobign.sf(distance * np.sqrt(rows_ * others / (rows_ + others)))
    assert profile.ks_chance(distance, rows_, others) == pytest.approx(expected, rel=0.1)


def test_a_profile_holds_quantiles_shares_and_ranges() -> None:
    frame = rows(1, 2_000)
    frame.loc[:99, "size"] = np.nan
    found = profile.profile(pa.Table.from_pandas(frame), SIGNATURE)
    size = found.numbers[0]
    assert (size.minimum, size.maximum) == (frame["size"].min(), frame["size"].max())
    assert size.mean == pytest.approx(frame["size"].mean())
    assert size.missing == pytest.approx(0.05)
    present = frame["size"].dropna()
    assert size.edges == np.quantile(present, np.arange(1, 20) / 20, method="higher").tolist()
    assert size.counts == np.histogram(present, [-np.inf, *size.edges, np.inf])[0].tolist()
    assert found.categories[0].counts == frame.place.value_counts().to_dict()


@pytest.mark.parametrize("count", [60, 500, 20_000])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_rows_of_the_training_distribution_have_not_drifted(tmp_path: Path, count: int, ending: str) -> None:
    file = tmp_path / f"new.{ending}"
    frame = rows(7, count)
    frame.to_csv(file, index=False) if ending == "csv" else frame.to_parquet(file)
    found = drift(record(), str(file))
    assert found.rows == count
    assert not found.is_past_limits, as_text(found)
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
    assert found.is_past_limits
    assert "PSI" in reasons["size"] and "KS" in reasons["size"]
    assert reasons["rooms"] == "25.0% of the cells are missing; 0.0% were in training"
    assert "20.0% of the rows hold a category that training did not see" in reasons["place"]
    assert "3 of 3 inputs have drifted" in as_text(found)


def test_files_and_bundles_that_can_not_be_compared(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("size,rooms,place\n")
    with pytest.raises(UserError, match="the file has no rows to compare"):
        drift(record(), str(tmp_path / "empty.csv"))
    (tmp_path / "other.csv").write_text("size,rooms\n1,2\n")
    with pytest.raises(UserError, match="lacks the column 'place'"):
        drift(record(), str(tmp_path / "other.csv"))
    with pytest.raises(UserError, match="the bundle has no profile of its training rows"):
        drift(record(with_profile=False), str(tmp_path / "other.csv"))
