"""Preparation through Ray Data: counts, splits, transform and shards against pandas and scikit-learn."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import job, prepared
from sklearn.preprocessing import StandardScaler

from raylway.data import csv_read, prepare, shards
from raylway.errors import UserError
from raylway.features.prepared import LINE_BITS, SPLITS, Prepared
from raylway.runs.progress import Reporter

pytestmark = pytest.mark.usefixtures("ray_session")


def everything(found: Prepared) -> pd.DataFrame:
    """All rows of all splits: side, row id, target and encoded features."""
    frames = []
    for side in SPLITS:
        rows = found.rows(side, verify=True)
        numeric, categorical, target, row_id = rows.take(np.arange(len(rows)))
        frame = pd.DataFrame({"side": side, "file": row_id >> LINE_BITS, "line": row_id & (2**LINE_BITS - 1)})
        frame["target"] = target
        for index, feature in enumerate(found.manifest.transform.numeric):
            frame[feature.name] = numeric[:, index]
        for index, feature in enumerate(found.manifest.transform.categorical):
            frame[feature.name] = categorical[:, index]
        assert row_id.tolist() == sorted(row_id.tolist())
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def dirty(rows: int, seed: int = 0) -> pd.DataFrame:
    """Numbers, texts with quotes and line ends, empty cells and repeated rows."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "whole": rng.integers(-50, 50, rows).astype(object),
            "real": rng.standard_normal(rows).round(2),
            "text": rng.choice(["plain", 'say "hi"', "a,b", "two\nlines", "ü"], rows),
            "label": rng.choice(["yes", "no", "may be"], rows, p=[0.3, 0.6, 0.1]),
        }
    )
    frame.loc[rng.choice(rows, rows // 10, replace=False), "whole"] = None
    frame.loc[rng.choice(rows, rows // 20, replace=False), "text"] = None
    again = rng.choice(rows, rows // 5, replace=False)
    frame.loc[again[: rows // 10]] = frame.loc[again[-(rows // 10) :]].to_numpy()
    return frame


def write_parts(frame: pd.DataFrame, folder: Path, parts: int) -> None:
    folder.mkdir()
    for index, rows in enumerate(np.array_split(np.arange(len(frame)), parts)):
        frame.iloc[rows].to_csv(folder / f"part-{index}.csv", index=False)


def test_rows_split_and_scaling_are_those_of_pandas_and_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_read, "RANGE_BYTES", 3_000)
    frame = dirty(1_500)
    write_parts(frame, tmp_path / "in", 3)
    found = prepared(tmp_path, {"source": "in", "target": "label"})
    full = frame.dropna()
    kept = full.drop_duplicates()
    account = found.manifest.account
    assert (account.read, account.kept) == (1_500, len(kept))
    assert (account.missing, account.duplicates) == (1_500 - len(full), len(full) - len(kept))
    assert account.quarantined == 0 and account.train + account.validation + account.test == len(kept)
    assert (account.test, account.validation) == (round(0.2 * len(kept)), round(0.1 * len(kept)))

    lines = lines_of(frame, 3).loc[kept.index]
    rows = everything(found).set_index(["file", "line"])
    rows = rows.loc[list(lines.itertuples(index=False, name=None))]
    classes = found.manifest.signature.classes
    assert classes == sorted(kept["label"].unique())
    assert [classes[code] for code in rows["target"]] == kept["label"].tolist()
    training = (rows["side"] == "train").to_numpy()
    scaler = StandardScaler().fit(kept[["whole", "real"]].astype(float)[training])
    expected = scaler.transform(kept[["whole", "real"]].astype(float))
    np.testing.assert_allclose(rows[["whole", "real"]], expected, rtol=1e-5, atol=1e-6)
    categories = found.manifest.transform.categorical[0].categories
    assert [categories[code - 1] for code in rows["text"]] == kept["text"].tolist()
    for side in SPLITS:
        by_class = kept["label"][(rows["side"] == side).to_numpy()].value_counts()
        assert found.manifest.classes[side] == [by_class[name] for name in classes]


def lines_of(frame: pd.DataFrame, parts: int) -> pd.DataFrame:
    """File and line of each row of `write_parts`, counted from the cells' own line ends."""
    places = []
    for file, rows in enumerate(np.array_split(np.arange(len(frame)), parts)):
        line = 2
        for row in rows:
            places.append((file, line))
            text = frame["text"].iloc[row]
            line += 1 + (text.count("\n") if isinstance(text, str) else 0)
    return pd.DataFrame(places, columns=["file", "line"], index=frame.index)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_bytes_are_the_same_on_one_cpu_and_on_four(tmp_path, monkeypatch):
    from ray.data import DataContext, ExecutionResources

    monkeypatch.setattr(csv_read, "RANGE_BYTES", 2_000)
    monkeypatch.setattr(shards, "SHARD_ROWS", 30)
    write_parts(dirty(1_000), tmp_path / "in", 3)
    data = {"source": "in", "target": "label", "derive": {"sum": "whole + real"}, "clean": {"missing": "impute"}}
    results = []
    options = DataContext.get_current().execution_options
    for cpus in (1, 4):
        monkeypatch.setattr(options, "resource_limits", ExecutionResources(cpu=cpus))
        folder = tmp_path / f"cpus{cpus}"
        folder.mkdir()
        (folder / "in").symlink_to(tmp_path / "in")
        results.append(contents(prepared(folder, data).folder))
    assert len(results[0]) > 20 and results[0].keys() == results[1].keys()
    assert all(results[0][name] == results[1][name] for name in results[0])


def test_whether_a_file_is_packed_or_cut_elsewhere_changes_no_row(tmp_path, monkeypatch):
    frame = dirty(600)
    results = []
    for ending, step in (("csv", 1 << 20), ("csv", 700), ("csv.gz", 900), ("csv.zip", 1_100)):
        monkeypatch.setattr(csv_read, "RANGE_BYTES", step)
        folder = tmp_path / f"{ending}{step}"
        folder.mkdir()
        frame.to_csv(folder / f"rows.{ending}", index=False)
        results.append(everything(prepared(folder, {"source": f"rows.{ending}", "target": "label"})))
    for other in results[1:]:
        assert other[["side", "line", "target"]].equals(results[0][["side", "line", "target"]])
        np.testing.assert_allclose(other["real"], results[0]["real"], rtol=1e-6)


def test_the_same_job_is_prepared_once_and_anew_for_other_data(tmp_path):
    frame = dirty(100)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    data = {"source": "rows.csv", "target": "label"}
    first = prepared(tmp_path, data)
    made_at = (first.folder / "manifest.json").stat().st_mtime_ns
    assert prepared(tmp_path, data).folder == first.folder
    assert (first.folder / "manifest.json").stat().st_mtime_ns == made_at
    others = [
        prepare.fingerprint(job(tmp_path, data, seed=1)),
        prepare.fingerprint(job(tmp_path, data, task="classification")),
        prepare.fingerprint(job(tmp_path, data | {"split": {"test": "30%"}})),
        prepare.fingerprint(job(tmp_path, data, name="other", train={"for": "1 epoch"})),
    ]
    frame.iloc[:99].to_csv(tmp_path / "rows.csv", index=False)
    others.append(prepare.fingerprint(job(tmp_path, data)))
    assert others[3] == first.manifest.fingerprint and len({*others}) == 5


def test_two_jobs_may_prepare_at_once(tmp_path):
    dirty(200).to_csv(tmp_path / "rows.csv", index=False)
    loaded = job(tmp_path, {"source": "rows.csv", "target": "label"})
    found: list[Prepared] = []
    work = [
        threading.Thread(
            target=lambda: found.append(prepare.prepare(loaded, tmp_path, Reporter("json", io.StringIO())))
        )
        for _ in range(2)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(found) == 2 and found[0].folder == found[1].folder
    assert {path.name for path in (tmp_path / "prepared").iterdir()} == {found[0].folder.name, "pieces"}
    assert len(everything(found[0])) == found[0].manifest.account.kept


def test_progress_and_decisions_are_shown(tmp_path):
    dirty(200).to_csv(tmp_path / "rows.csv", index=False)
    stream = io.StringIO()
    prepare.prepare(job(tmp_path, {"source": "rows.csv", "target": "label"}), tmp_path, Reporter("lines", stream))
    shown = stream.getvalue()
    assert "read 200 rows = kept" in shown and "kept = training" in shown and "the task is classification" in shown


def test_invalid_rows_go_to_quarantine_with_file_line_and_reason(tmp_path):
    rows = [f"{n},{n / 2},{'yes' if n % 3 else 'no'}" for n in range(1_000)]
    rows[3], rows[500], rows[700] = "3,1.5", "500,5,x,yes", "oops,1,yes"
    (tmp_path / "rows.csv").write_text("a,b,label\n" + "\n".join(rows) + "\n")
    found = prepared(tmp_path, {"source": "rows.csv", "target": "label"})
    records = [json.loads(line) for line in (found.folder / "quarantine" / "rows.jsonl").read_text().splitlines()]
    assert [(record["file"], record["line"], record["column"], record["cell"]) for record in records] == [
        ("rows.csv", 5, None, "3,1.5"),
        ("rows.csv", 502, None, "500,5,x,yes"),
        ("rows.csv", 702, "a", "oops"),
    ]
    assert (found.manifest.account.quarantined, found.manifest.account.kept) == (3, 997)
    assert set(everything(found)["line"]) == set(range(2, 1_002)) - {5, 502, 702}
    with pytest.raises(UserError, match=r"rows.csv:5: too few cells"):
        prepared(tmp_path, {"source": "rows.csv", "target": "label", "clean": {"invalid": "error"}})


@pytest.mark.parametrize("share", [1, 7, 14, 28, 29, 30])
def test_the_share_of_invalid_rows_is_exact(tmp_path, share):
    """0.29 * 100 is a bit less than 29."""
    for bad in (share, share + 1):
        lines = [f"{'bad' if row < bad else row},{row},{'ab'[row % 2]}" for row in range(100)]
        (tmp_path / "rows.csv").write_text("\n".join(["x,z,y", *lines, ""]))
        data = {"source": "rows.csv", "target": "y", "features": {"numeric": ["x"]}}
        data["clean"] = {"max_invalid": f"{share}%"}
        if bad == share:
            assert prepared(tmp_path, data).manifest.account.quarantined == share
        else:
            with pytest.raises(UserError, match=f"{bad} of 100"):
                prepared(tmp_path, data)


def test_a_word_late_in_a_column_makes_all_of_it_text(tmp_path, monkeypatch):
    """Earlier pieces have kept numbers only and must give their text back: 1.50 is not 1.5."""
    monkeypatch.setattr(csv_read, "RANGE_BYTES", 200)
    codes = ["1.50", "NA", "2"] * 60 + ["x1", "x2"] * 10
    (tmp_path / "rows.csv").write_text("code,n,label\n" + "".join(f"{c},{i},{i % 2}\n" for i, c in enumerate(codes)))
    found = prepared(tmp_path, {"source": "rows.csv", "target": "label"})
    assert found.manifest.transform.categorical[0].categories == ["1.50", "2", "NA", "x1", "x2"]
    assert found.manifest.account.kept == 200


def test_missing_words_and_empty_cells(tmp_path):
    """NA is a country; in a column of numbers it is a missing cell."""
    rows = ['"NA",1', '"NA",NA', ",3", '"ZA",', '"FR",5', '"NA",6', '"ZA",7', '"ZA",8']
    text = "country,weight,late\n" + "".join(f"{row},{'yes' if n % 2 else 'no'}\n" for n, row in enumerate(rows))
    (tmp_path / "rows.csv").write_text(text)
    found = prepared(tmp_path, {"source": "rows.csv", "target": "late"})
    assert (found.manifest.account.kept, found.manifest.account.missing) == (5, 3)
    assert "NA" in found.manifest.transform.categorical[0].categories
    imputed = prepared(tmp_path, {"source": "rows.csv", "target": "late", "clean": {"missing": "impute"}})
    assert (imputed.manifest.account.kept, imputed.manifest.account.missing) == (8, 0)
    assert [each.required for each in imputed.manifest.signature.inputs] == [False, False]
    assert [each.required for each in found.manifest.signature.inputs] == [True, True]


def test_large_whole_numbers_stay_apart(tmp_path):
    base = 2**62 + 1
    rows = [f"{base + n},5,{'y' if n % 2 else 'n'}" for n in range(20)]
    (tmp_path / "rows.csv").write_text("id,amount,ok\n" + "\n".join([*rows, rows[3], ",5,y"]) + "\n")
    account = prepared(tmp_path, {"source": "rows.csv", "target": "ok"}).manifest.account
    assert (account.read, account.missing, account.duplicates, account.kept) == (22, 1, 1, 20)


def test_duplicates_are_found_across_files_in_any_order(tmp_path):
    frame = pd.DataFrame({"item": [f"i{n % 21:02d}" for n in range(63)], "price": [n % 21 for n in range(63)]})
    frame["kept"] = np.where(frame["price"] % 2, "yes", "no")
    sides = []
    for name, order in (("a", range(63)), ("b", reversed(range(63)))):
        folder = tmp_path / name
        folder.mkdir()
        write_parts(frame.iloc[list(order)], folder / "in", 5)
        found = prepared(folder, {"source": "in", "target": "kept"})
        assert (found.manifest.account.kept, found.manifest.account.duplicates) == (21, 42)
        rows = everything(found)
        sides.append(dict(zip(rows["item"], rows["side"], strict=True)))
    assert sides[0] == sides[1]  # by item: the same rows are on the same side whatever the order


def test_kept_duplicates_stay_on_one_side(tmp_path):
    frame = pd.DataFrame({"x": [n % 40 for n in range(400)]})
    frame["y"] = np.where(frame["x"] % 2, "odd", "even")
    frame.to_csv(tmp_path / "rows.csv", index=False)
    found = prepared(tmp_path, {"source": "rows.csv", "target": "y", "clean": {"duplicates": "keep"}})
    rows = everything(found)
    assert len(rows) == 400 and (rows.groupby("x")["side"].nunique() == 1).all()
    assert any("approximate" in sentence for sentence in found.manifest.decisions)


def test_parquet_files_of_different_schemas_are_one_table(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_read, "RANGE_BYTES", 300)
    folder = tmp_path / "parts"
    folder.mkdir()
    cities = ["oslo", "rome"] * 10
    late = ["yes", "no", "no", "yes"] * 5
    amounts: list[Any] = [pa.array(range(20), pa.int32()), pa.array(np.arange(20) + 0.5), pa.nulls(20)]
    names = ["b", "c", "a"]  # the empty one is read first
    for name, amount, city in zip(
        names, amounts, [pa.array(cities), pa.array(cities).dictionary_encode(), cities], strict=True
    ):
        table = pa.table({"city": city, "amount": amount, "late": late})
        pq.write_table(
            table.select(["late", "amount", "city"]) if name == "c" else table,
            folder / f"{name}.parquet",
            row_group_size=7,
        )
    found = prepared(tmp_path, {"source": "parts", "target": "late", "clean": {"duplicates": "keep"}})
    assert (found.manifest.account.read, found.manifest.account.kept) == (60, 40)
    rows = everything(found)
    assert rows["file"].value_counts().to_dict() == {1: 20, 2: 20} and set(rows["line"]) == set(range(1, 21))
    amount = found.manifest.transform.numeric[0]
    assert (amount.minimum, amount.maximum) in ((0.0, 19.5), (0.5, 19.5), (0.0, 19.0), (0.5, 19.0))
    halves = rows[rows["file"] == 2].sort_values("line")["amount"] * amount.spread + amount.mean
    np.testing.assert_allclose(halves, np.arange(20) + 0.5, atol=1e-5)
    assert found.manifest.transform.categorical[0].categories == ["oslo", "rome"]


def test_infinite_numbers_stop_the_job_or_are_missing(tmp_path):
    rates = ["1", "3", "inf", "1", "3", "-inf", "1", "3", "Infinity", "1", "3", "1e999"]
    text = "rate,load,attack\n" + "".join(f"{rate},{n},{'yes' if n % 2 else 'no'}\n" for n, rate in enumerate(rates))
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(UserError, match=r"rows.csv:4: the column 'rate' holds an infinite number"):
        prepared(tmp_path, {"source": "rows.csv", "target": "attack"})
    data = {"source": "rows.csv", "target": "attack", "clean": {"infinite": "missing"}}
    found = prepared(tmp_path, data | {"split": {"validation": 0, "test": 0}})
    rate = found.manifest.transform.numeric[0]
    assert (found.manifest.account.kept, rate.mean, rate.spread) == (8, 2.0, 1.0)
    assert np.isfinite(everything(found)["rate"]).all()
    unused = prepared(tmp_path, {"source": "rows.csv", "target": "attack", "features": {"drop": ["rate"]}})
    assert unused.manifest.account.kept == 12


def test_a_constant_column_is_zero(tmp_path):
    rows = "".join(f"-11.512925464970229,{n - 10.5},{n > 10}\n" for n in range(22))
    (tmp_path / "rows.csv").write_text("base,signal,alarm\n" + rows)
    assert (everything(prepared(tmp_path, {"source": "rows.csv", "target": "alarm"}))["base"] == 0).all()


def test_whole_numbers_as_categories_have_one_name(tmp_path):
    stores = [str(n % 4 + 1) for n in range(24)]
    (tmp_path / "a.csv").write_text(
        "store,day,busy\n" + "".join(f"{s},{n},{s in '13'}\n" for n, s in enumerate(stores))
    )
    stores[2] = stores[5] = ""
    (tmp_path / "b.csv").write_text(
        "store,day,busy\n" + "".join(f"{s},{n + 50},{s in '13'}\n" for n, s in enumerate(stores))
    )
    data = {"source": ["a.csv", "b.csv"], "target": "busy", "features": {"categorical": ["store"]}}
    found = prepared(tmp_path, data)
    assert found.manifest.account.kept == 46 and found.manifest.account.missing == 2
    assert found.manifest.transform.categorical[0].categories == ["1", "2", "3", "4"]


def test_derived_columns_and_what_they_leave(tmp_path):
    frame = pd.DataFrame({"dep": range(100), "arr": [n + n % 30 for n in range(100)], "size": [3] * 100})
    frame["dist"] = frame["dep"] % 7
    frame.to_csv(tmp_path / "rows.csv", index=False)
    derive = {"late": "gap > 15", "gap": "arr - dep", "per": "dist / size", "speed": "dist / gap", "far": "dist > 3"}
    found = prepared(tmp_path, {"source": "rows.csv", "target": "late", "derive": derive})
    transform = found.manifest.transform
    assert transform.feature_names == ["size", "dist", "per", "far"]
    assert transform.derive == {"per": "dist / size", "far": "dist > 3"}
    assert [(each.name, each.type) for each in found.manifest.signature.inputs] == [
        ("size", "number"),
        ("dist", "number"),
    ]
    assert found.manifest.signature.classes == ["false", "true"]


def test_regression_keeps_raw_targets_and_learns_their_spread(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.standard_normal(300), "y": rng.standard_normal(300) * 40 + 7})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    found = prepared(tmp_path, {"source": "rows.csv", "target": "y"})
    rows = everything(found)
    np.testing.assert_array_equal(rows.sort_values("line")["target"], frame["y"])
    training = rows[rows["side"] == "train"]["target"]
    target = found.manifest.transform.target
    np.testing.assert_allclose([target.mean, target.spread], [training.mean(), training.std(ddof=0)], rtol=1e-9)
    assert found.manifest.classes == {"train": [], "validation": [], "test": []}
    assert found.manifest.signature.task == "regression"


def test_a_python_function_as_source(tmp_path):
    (tmp_path / "made_rows_source.py").write_text(
        "import pandas as pd\n"
        "def rows():\n"
        "    return pd.DataFrame({'x': [1.5, None] + [2.0] * 48, 'n': range(50), 'y': ['a', 'b'] * 25})\n"
    )
    found = prepared(tmp_path, {"source": "python://made_rows_source:rows", "target": "y"})
    assert (found.manifest.account.read, found.manifest.account.missing) == (50, 1)
    assert set(everything(found)["line"]) == set(range(1, 51)) - {2}


def test_mistakes_in_the_data_reach_the_driver_as_they_are(tmp_path):
    import gzip

    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 9_000)[:-30])
    with pytest.raises(UserError, match=r"rows.csv.gz: the compressed file is damaged"):
        prepared(tmp_path, {"source": "rows.csv.gz", "target": "b"})
    assert [path.name for path in (tmp_path / "runs").glob("prepared/*")] == ["pieces"]
