"""One rule for each kind of cell, whatever the format and whoever reads it: training, prediction, drift or serving.

A table with every kind of cell is prepared from each format. The same rows, read back from each format as `raylway
predict` reads them, and sent as a request, must come to the numbers and codes that stand in the shards.
"""

from __future__ import annotations

import csv
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import raylway
from hypothesis import given
from hypothesis import strategies as st
from preparing import job, prepared

from raylway.bundle.contents import load
from raylway.bundle.mistakes import InvalidRows
from raylway.bundle.rows import RowReader
from raylway.data import inputs, sources
from raylway.data.drift import drift
from raylway.errors import UserError
from raylway.features.prepared import LINE_BITS, SPLITS, Prepared
from raylway.features.transform import Encoded

ROWS = 60
FORMATS = ("csv", "jsonl", "parquet", "arrow")
BIG = 2**53 + 1


def every(kinds: list[Any]) -> list[Any]:
    return [kinds[row % len(kinds)] for row in range(ROWS)]


CELLS: dict[str, list[Any]] = {
    "whole": every([1, None, -3, 40, 5, 6, 7]),
    "real": every([0.1, 1e-300, -2.5, None, 3.0]),
    "rate": every([1.5, float("inf"), 2.5, float("-inf"), 3.5, None, 2.0, 4.0]),
    "big": every([BIG, BIG + 2, 2**62 + 1, None]),
    "store": every([1, 2, None, 30]),
    "flag": every([True, False, True, None, False]),
    "zip": every(["01234", "00099", None, "99999"]),
    "country": every(["NA", "DE", None, "null", "FR"]),
    "day": every(["2013-01-01", None, "2013-03-31T01:30:00Z", "2014-06-15T12:00:00+02:00"]),
    "y": every(["a", "b", "b"]),
}
DATA: dict[str, Any] = {
    "target": "y",
    "features": {"categorical": ["big", "store"]},
    "clean": {"missing": "impute", "infinite": "missing", "duplicates": "keep"},
    "split": {"by": "random", "validation": "10%", "test": "20%"},
}


def table(columns: dict[str, list[Any]]) -> pa.Table:
    """Typed as well as Arrow can: whole numbers, booleans, texts."""
    return pa.table({name: pa.array(cells) for name, cells in columns.items()})


def write(folder: Path, kind: str, columns: dict[str, list[Any]], decimal: str = ".") -> str:
    """The columns as a file of this format by its usual writer; returns the file's name."""
    name = f"rows.{kind}"
    typed = table(columns)
    if kind == "csv":
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file, delimiter=";" if decimal == "," else ",")
            writer.writerow(typed.column_names)
            for row in typed.to_pylist():
                writer.writerow(
                    repr(cell).replace(".", decimal) if isinstance(cell, float) else cell for cell in row.values()
                )
    elif kind == "jsonl":
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in typed.to_pylist()))
    elif kind == "parquet":
        pq.write_table(typed, folder / name, row_group_size=17)
    else:
        with pa.ipc.new_file(str(folder / name), typed.schema) as writer:
            writer.write_table(typed, max_chunksize=17)
    return name


def shards(found: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and codes of all rows in the order of the source."""
    parts = [found.rows(side) for side in SPLITS]
    taken = [part.take(np.arange(len(part))) for part in parts]
    order = np.argsort(np.concatenate([row_ids for *_, row_ids in taken]))
    return np.concatenate([each[0] for each in taken])[order], np.concatenate([each[1] for each in taken])[order]


def answered(found: Prepared, loaded: Any, path: Path) -> tuple[Encoded, list[tuple[int, str | None, str]]]:
    """What the model would be given for a file, as `raylway predict` reads it, and the rows that it refuses."""
    opened = inputs.opened(str(path), found.manifest.signature, loaded.job)
    blocks = [
        block for item in opened.items(is_cut=True) for block in inputs.read(item, found.manifest.signature, opened.how)
    ]
    rejects = [reject for block in blocks for reject in block.rejects]
    shown = [(reject.row_id & ((1 << LINE_BITS) - 1), reject.column, reject.reason) for reject in rejects]
    return found.manifest.transform.encode(pa.concat_tables([block.table for block in blocks])), shown


@pytest.mark.parametrize("kind", FORMATS)
def test_training_prediction_and_serving_read_alike(tmp_path: Path, kind: str) -> None:
    data = {"source": write(tmp_path, kind, CELLS), **DATA}
    found = prepared(tmp_path, data)
    manifest = found.manifest
    assert manifest.account.kept == manifest.account.read == ROWS
    roles = {each.name: (each.type, each.values) for each in manifest.signature.inputs}
    assert roles == {
        "whole": ("number", "number"),
        "real": ("number", "number"),
        "rate": ("number", "number"),
        "big": ("category", "number"),
        "store": ("category", "number"),
        "flag": ("category", "boolean"),
        "zip": ("category", "text"),
        "country": ("category", "text"),
        "day": ("date", "text"),
    }
    known = {each.column: each.categories for each in manifest.transform.categorical if not each.part}
    assert known["big"] == [str(BIG), str(BIG + 2), str(2**62 + 1)] and known["store"] == ["1", "2", "30"]
    assert known["flag"] == ["false", "true"] and known["zip"] == ["00099", "01234", "99999"]
    assert known["country"] == ["DE", "FR", "NA", "null"]
    numeric, codes = shards(found)
    for other in FORMATS:
        encoded, rejects = answered(found, job(tmp_path, data), tmp_path / write(tmp_path, other, CELLS))
        assert rejects == []
        np.testing.assert_array_equal(encoded.numeric, numeric, err_msg=other)
        np.testing.assert_array_equal(encoded.categorical, codes, err_msg=other)
    rows = [{name: cell for name, cell in row.items() if name != "y"} for row in table(CELLS).to_pylist()]
    asked = [row | {"rate": None if row["rate"] in (float("inf"), float("-inf")) else row["rate"]} for row in rows]
    _, read, _ = RowReader(manifest.signature).read(json.dumps({"rows": asked}).encode())
    served = manifest.transform.encode(read.table(manifest.signature))
    np.testing.assert_array_equal(served.numeric, numeric)
    np.testing.assert_array_equal(served.categorical, codes)


def test_a_strict_job_refuses_the_same_rows_of_every_format(tmp_path: Path) -> None:
    """Missing cells are left out of training and refused later; so are infinite numbers, wherever they stand."""
    whole = {name: [cell for cell in cells if cell is not None][:20] for name, cells in CELLS.items()}
    whole["rate"] = [float(row) for row in range(20)]
    data = DATA | {"clean": {"duplicates": "keep"}}
    found = prepared(tmp_path, {"source": write(tmp_path, "csv", whole), **data})
    strange: dict[str, list[Any]] = {name: [cells[0]] * 7 for name, cells in whole.items()}
    for row, (name, cell) in enumerate([("rate", float("inf")), ("rate", float("-inf")), ("store", float("inf"))]):
        strange[name][row] = cell
    for row, name in enumerate(["whole", "flag", "zip", "day"], 3):
        strange[name][row] = None
    for kind in FORMATS:
        _, rejects = answered(
            found, job(tmp_path, {"source": "rows.csv", **data}), tmp_path / write(tmp_path, kind, strange)
        )
        first = 2 if kind == "csv" else 1
        assert [(row - first, column) for row, column, _ in rejects] == [
            (0, "rate"), (1, "rate"), (2, "store"), (3, "whole"), (4, "flag"), (5, "zip"), (6, "day"),
        ]  # fmt: skip
        assert all("is no finite number" in reason for _, _, reason in rejects[:3])
        assert all(reason == "the cell is empty" for _, _, reason in rejects[3:])
    reader = RowReader(found.manifest.signature)
    good = {name: cells[0] for name, cells in whole.items() if name != "y"}
    assert len(reader.read(json.dumps({"rows": [good]}).encode())[1]) == 1
    for wrong in ({"rate": None}, {"big": "NA"}, {"flag": "null"}, {"zip": ""}, {"day": " "}, {"big": "inf"}):
        with pytest.raises(InvalidRows) as caught:
            reader.read(json.dumps({"rows": [good | wrong]}).encode())
        assert [problem.feature for problem in caught.value.problems] == [*wrong]


@pytest.mark.parametrize("kind", FORMATS)
def test_an_infinite_number_stops_the_job_by_name(tmp_path: Path, kind: str) -> None:
    columns = {"x": [1.0, 2.0, float("-inf"), 4.0], "y": ["a", "b", "a", "b"]}
    data = {"source": write(tmp_path, kind, columns), "target": "y"}
    with pytest.raises(UserError, match="the column 'x' holds an infinite number") as caught:
        prepared(tmp_path, data)
    assert caught.value.where == {"csv": "rows.csv:4", "jsonl": "rows.jsonl:3"}.get(kind, f"rows.{kind}, row 3")
    assert "data.clean.infinite: missing" in caught.value.fix
    columns["x"] += [5.0, 6.0, 7.0, 8.0]
    columns["y"] += ["a", "b", "a", "b"]
    write(tmp_path, kind, columns)
    account = prepared(tmp_path, data | {"clean": {"infinite": "missing"}}).manifest.account
    assert (account.read, account.kept, account.missing) == (8, 7, 1)


NUMBERS = st.floats(-1e25, 1e25) | st.integers(-(2**53), 2**53) | st.none()
"""Larger ones are refused as features."""


@given(st.lists(NUMBERS, min_size=3, max_size=30).filter(lambda cells: any(cell is not None for cell in cells)))
def test_decimal_commas_are_read_as_pandas_reads_them(
    tmp_path_factory: pytest.TempPathFactory, cells: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("comma")
    texts = ["" if cell is None else repr(cell).replace(".", ",") for cell in cells]
    (folder / "rows.csv").write_text("x;y\n" + "".join(f"{text};{row}\n" for row, text in enumerate(texts)))
    data = {"source": "rows.csv", "target": "y", "read": {"decimal": ","}, "clean": {"missing": "impute"}}
    loaded = job(folder, data, task="regression")
    expected = pd.read_csv(folder / "rows.csv", sep=";", decimal=",")["x"]
    column = sources.sample(loaded).columns[0]
    assert column.type in ("int64", "float64") and column.missing == expected.isna().sum()
    assert (column.minimum, column.maximum) == (expected.min(), expected.max())


def test_a_decimal_comma_reaches_every_reader_of_csv_files(tmp_path: Path) -> None:
    cells = {name: CELLS[name] for name in ("whole", "real", "rate", "store", "y")}
    data = DATA | {"features": {"categorical": ["store"]}}
    plain = prepared(tmp_path, {"source": write(tmp_path, "csv", cells), **data})
    numeric, codes = shards(plain)
    comma = data | {"read": {"decimal": ","}, "source": write(tmp_path, "csv", cells, decimal=",")}
    found = prepared(tmp_path, comma)
    for mine, other in zip(shards(found), (numeric, codes), strict=True):
        np.testing.assert_array_equal(mine, other)
    for kind in FORMATS:
        encoded, rejects = answered(found, job(tmp_path, comma), tmp_path / write(tmp_path, kind, cells, decimal=","))
        assert rejects == []
        np.testing.assert_array_equal(encoded.numeric, numeric, err_msg=kind)
        np.testing.assert_array_equal(encoded.categorical, codes, err_msg=kind)
    _, rejects = answered(found, job(tmp_path, comma), tmp_path / write(tmp_path, "csv", cells, decimal="."))
    assert {column for _, column, _ in rejects} == {"real", "rate"}  # a point is no decimal sign there
    assert any("is no finite number" in reason for _, _, reason in rejects)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_the_job_calls_missing_is_missing_for_every_reader(tmp_path: Path, kind: str) -> None:
    """As if the cells were empty: numbers, texts, dates, and the target, of which such rows are left out."""
    words: dict[str, list[Any]] = {
        "whole": every([1, -999, -3, 40, 5]),
        "real": every([0.5, -999.0, 2.5]),
        "store": every([1, 2, -999]),
        "zip": every(["01234", "-0999", "?", "99999"]),
        "day": every(["2013-01-01", "?", "2014-06-15", "2014-06-16"]),
        "country": every(["DE", "NA", "-999", "FR", "?", "AT"]),
        "y": every([*"abaababbaabab", "?"]),
    }
    empty = {
        name: [None if cell in ("?", "NA", -999, "-999") else cell for cell in cells] for name, cells in words.items()
    }
    common = DATA | {"features": {"categorical": ["store"]}}
    plain = prepared(tmp_path, {"source": write(tmp_path, kind, empty), **common})
    data = common | {"source": write(tmp_path, kind, words), "read": {"missing": ["?", "NA", -999]}}
    found = prepared(tmp_path, data)
    assert found.manifest.account == plain.manifest.account and found.manifest.account.missing == words["y"].count("?")
    assert found.manifest.transform == plain.manifest.transform
    for mine, other in zip(shards(found), shards(plain), strict=True):
        np.testing.assert_array_equal(mine, other)
    kept = {
        name: [cell for cell, y in zip(cells, words["y"], strict=True) if y != "?"] for name, cells in words.items()
    }
    for other_kind in FORMATS:
        path = tmp_path / write(tmp_path, other_kind, kept)
        encoded, rejects = answered(found, job(tmp_path, data), path)
        assert rejects == []
        np.testing.assert_array_equal(encoded.numeric, shards(plain)[0])
        np.testing.assert_array_equal(encoded.categorical, shards(plain)[1])
    signature = found.manifest.signature
    rows = [{name: cell for name, cell in row.items() if name != "y"} for row in table(kept).to_pylist()]
    for form in ({"rows": rows}, {"data": [[row[each.name] for each in signature.inputs] for row in rows]}):
        served = found.manifest.transform.encode(
            RowReader(signature).read(json.dumps(form).encode())[1].table(signature)
        )
        np.testing.assert_array_equal(served.numeric, shards(plain)[0])
        np.testing.assert_array_equal(served.categorical, shards(plain)[1])
    strict = prepared(tmp_path, data | {"clean": {"missing": "drop", "duplicates": "keep"}}).manifest.signature
    good = {"whole": 1, "real": 0.5, "store": 1, "zip": "1", "day": "2013-01-01", "country": "DE"}
    for wrong in (
        {"whole": -999},
        {"real": -999.0},
        {"store": "-999.0"},
        {"zip": "?"},
        {"day": "?"},
        {"country": "NA"},
    ):
        with pytest.raises(InvalidRows) as caught:
            RowReader(strict).read(json.dumps({"rows": [good | wrong]}).encode())
        assert [(each.feature, "empty cell" in each.reason) for each in caught.value.problems] == [(*wrong, True)]


def test_a_word_among_numbers_of_a_csv_file_can_be_called_missing(tmp_path: Path) -> None:
    cells = [["7", "?", "8", " ?", "-999", "-999.0", "-9.99e2"][row % 7] for row in range(70)]
    (tmp_path / "rows.csv").write_text("x,y\n" + "".join(f"{cell},{'ab'[row % 2]}\n" for row, cell in enumerate(cells)))
    data = {"source": "rows.csv", "target": "y", "clean": {"missing": "impute"}, "read": {"missing": ["?", -999]}}
    (column, _) = sources.sample(job(tmp_path, data)).columns
    expected = pd.read_csv(tmp_path / "rows.csv", na_values=["?", " ?", -999])["x"]
    assert (column.type, column.missing, column.minimum) == ("int64", expected.isna().sum(), expected.min())
    (column, _) = sources.sample(job(tmp_path, data | {"read": {}})).columns
    assert column.type == "string" and column.missing == 0


def test_what_a_decimal_comma_without_the_key_gets(tmp_path: Path) -> None:
    cells = {"x": [f"{row},5" for row in range(20)], "y": ["a", "b"] * 10}
    write(tmp_path, "csv", cells)
    for extra, top in (({"features": {"numeric": ["x"]}}, {}), ({"target": "x"}, {"task": "regression"})):
        with pytest.raises(UserError) as caught:
            prepared(tmp_path, {"source": "rows.csv", "target": "y", **extra}, **top)
        assert 'data.read.decimal: ","' in caught.value.fix and "0,5" in caught.value.found


def test_true_and_false_are_no_numbers_in_any_format(tmp_path: Path) -> None:
    cells = {"x": list(range(20)), "flag": [True, False] * 10, "y": ["a", "b"] * 10}
    for kind in FORMATS:
        data = {"source": write(tmp_path, kind, cells)}
        with pytest.raises(UserError, match="the column 'flag' holds true and false, no numbers"):
            prepared(tmp_path, data | {"target": "y", "features": {"numeric": ["flag"]}})
        with pytest.raises(UserError, match="the target 'flag' is true or false, which regression can't predict"):
            prepared(tmp_path, data | {"target": "flag"}, task="regression")
        found = prepared(tmp_path, data | {"target": "flag"}).manifest
        assert found.signature.classes == ["false", "true"]


def test_booleans_of_a_csv_file_in_all_spellings(tmp_path: Path) -> None:
    cells = ["True", "true", "FALSE", " false", "NA", ""]
    rows = "".join(f"{row},{cells[row % 6]},{'ab'[row % 2]}\n" for row in range(60))
    (tmp_path / "rows.csv").write_text("x,flag,y\n" + rows)
    sample = sources.sample(job(tmp_path, {"source": "rows.csv", "target": "y", "clean": {"missing": "impute"}}))
    flag = sample.columns[1]
    assert (flag.type, flag.role, flag.missing) == ("bool", "categorical", 20)
    assert flag.frequent == {"false": 20, "true": 20}
    assert "column 'flag' holds true and false: 10 cells like NA or null count as missing" in sample.decisions
    (tmp_path / "rows.csv").write_text("x,flag,y\n" + rows + "60,perhaps,a\n")
    sample = sources.sample(job(tmp_path, {"source": "rows.csv", "target": "y"}))
    assert sample.columns[1].type == "string" and sample.columns[1].frequent["True"] == 10
    assert any("column 'flag' is text: 1 of 51 cells are neither true nor false" in each for each in sample.decisions)


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_numbers_beyond_doubles_stay_apart(tmp_path: Path, kind: str) -> None:
    """Rows that differ in the last digit only are two rows, and two groups on two sides if it so happens."""
    ids = [BIG + row // 2 for row in range(60)]
    cells = {"id": [*ids[:-2], None, None], "x": [1.5] * 60, "y": ["a"] * 60}
    cells["y"] = ["ab"[value % 2] if value else "a" for value in cells["id"]]
    data = {"source": write(tmp_path, kind, cells), "target": "y"}
    account = prepared(tmp_path, data).manifest.account
    assert (account.kept, account.duplicates, account.missing) == (29, 29, 2)
    groups = {"split": {"by": "group", "column": "id"}, "clean": {"duplicates": "keep"}}
    found = prepared(tmp_path, data | groups)
    assert found.manifest.leak_test is not None and found.manifest.leak_test.passed
    side_of: dict[int, set[str]] = {}
    for side in SPLITS:
        part = found.rows(side)
        for row_id in part.take(np.arange(len(part)))[3].tolist():
            row = (row_id & ((1 << LINE_BITS) - 1)) - (2 if kind == "csv" else 1)
            side_of.setdefault(ids[row], set()).add(side)
    assert len(side_of) == 29 and all(len(sides) == 1 for sides in side_of.values())
    assert {side for sides in side_of.values() for side in sides} == set(SPLITS)


def test_the_types_of_parquet(tmp_path: Path) -> None:
    rows = range(40)
    moments = pd.date_range("2024-03-31T00:30:00", periods=40, freq="30min", tz="UTC")  # summer time begins
    table = pa.table(
        {
            "y": ["a", "b"] * 20,
            "money": pa.array([Decimal(row) / 4 for row in rows], pa.decimal128(10, 2)),
            "account": pa.array([Decimal(10**17 + row // 2) for row in rows], pa.decimal128(20, 0)),
            "huge": pa.array([Decimal(10**30 + row // 2) for row in rows], pa.decimal256(40, 0)),
            "unsigned": pa.array([2**63 + row // 2 for row in rows], pa.uint64()),
            "half": pa.array(np.arange(40, dtype=np.float16) / 3),
            "word": pa.array(["p", "q", None, "p"] * 10).dictionary_encode(),
            "large": pa.array(["l", "m"] * 20, pa.large_string()),
            "view": pa.array(["l", "m"] * 20, pa.string_view()),
            "local": pa.array(moments, pa.timestamp("us", "Europe/Berlin")),
            "naive": pa.array(moments.tz_localize(None), pa.timestamp("ns")),
            "day": pa.array((moments + pd.to_timedelta(rows, "D")).date, pa.date64()),
            "clock": pa.array([moment.time() for moment in moments], pa.time64("us")),
            "outer": pa.array([{"inner": {"n": row}, "word": "w"} for row in rows]),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    data = {"source": "rows.parquet", "target": "y", "clean": {"missing": "impute"}}
    sample = sources.sample(job(tmp_path, data))
    shown = {each.name: (each.type, each.role, each.minimum, each.maximum) for each in sample.columns}
    assert shown["money"] == ("float64", "numeric", 0.0, 9.75)
    assert shown["account"] == ("int64", "numeric", 10**17, 10**17 + 19)
    assert shown["huge"] == shown["unsigned"] == ("string", "categorical", None, None)
    assert shown["half"][3] == float(np.float16(39) / np.float16(3))
    assert shown["outer.inner.n"] == ("int64", "numeric", 0, 39) and shown["outer.word"][1] == "constant"
    assert [each.name for each in sample.columns if each.role == "date"] == ["local", "naive", "day"]
    assert {shown[name][1] for name in ("word", "large", "view", "clock")} == {"categorical"}
    found = prepared(tmp_path, data)
    (seconds,) = (
        each for each in found.manifest.transform.numeric if each.column == "local" and each.part == "seconds"
    )
    (naive,) = (each for each in found.manifest.transform.numeric if each.column == "naive" and each.part == "seconds")
    assert (seconds.minimum, seconds.maximum) == (naive.minimum, naive.maximum)
    assert seconds.minimum >= moments[0].timestamp() and seconds.maximum <= moments[-1].timestamp()
    known = {each.column: each.categories for each in found.manifest.transform.categorical if not each.part}
    assert set(known["huge"]) <= {str(10**30 + row) for row in range(20)}


def test_timestamps_of_one_instant_are_one_value_whatever_their_zone(tmp_path: Path) -> None:
    moments = pd.date_range("2024-10-27T00:00:00", periods=12, freq="30min", tz="UTC")  # summer time ends
    for name, zone, unit in (("a", "UTC", "us"), ("b", "Europe/Berlin", "ms"), ("c", "America/New_York", "ns")):
        table = pa.table({"at": pa.array(moments, pa.timestamp(unit, zone)), "y": [*"ab"] * 6})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    account = prepared(tmp_path, {"source": "*.parquet", "target": "y"}).manifest.account
    assert (account.read, account.kept, account.duplicates) == (36, 12, 24)


def test_few_cells_that_are_no_dates_make_rows_invalid_and_missing_words_are_missing(tmp_path: Path) -> None:
    days = [f"2013-{1 + row // 28:02}-{1 + row % 28:02}" for row in range(300)]
    days[7], days[11], days[12] = "2013-02-30", "NA", "null"
    for kind in FORMATS:
        cells = {"day": days, "x": list(range(300)), "y": ["a", "b"] * 150}
        data = {"source": write(tmp_path, kind, cells), "target": "y"}
        found = prepared(tmp_path, data).manifest
        assert (found.account.kept, found.account.missing, found.account.quarantined) == (297, 2, 1), kind
        place = {"csv": "rows.csv:9", "jsonl": "rows.jsonl:8"}.get(kind, f"rows.{kind}, row 8")
        assert (
            f"column 'day' holds dates: 1 cell that is none makes its row invalid (first {place}: '2013-02-30')"
            in found.decisions
        )
        assert "column 'day' holds dates: 2 cells like NA or null count as missing" in found.decisions
        assert [each.type for each in found.signature.inputs] == ["date", "number"]
        listed = prepared(tmp_path, data | {"features": {"categorical": ["day"]}}).manifest
        assert listed.account.kept == 300


def test_a_run_predicts_its_own_rows_as_it_evaluated_them(tmp_path: Path) -> None:
    """Through the command line: the job's way of reading reaches `predict`, `drift` and the bundle's signature."""
    cells = CELLS | {"rate": every([1.5, float("inf"), 2.5, -999.0, 3.5, None, 2.0, 4.0])}
    folded = {name: values * 4 for name, values in cells.items()}
    folded["x"] = np.random.default_rng(0).normal(size=4 * ROWS).round(3).tolist()
    read = {"decimal": ",", "missing": [-999]}
    loaded = job(
        tmp_path,
        DATA | {"source": write(tmp_path, "csv", folded, decimal=","), "read": read},
        train={"for": "2 epochs"},
    )
    done = raylway("run", loaded.path, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    done = raylway("predict", "made", "rows.csv", "-o", "answers.parquet", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = pq.read_table(tmp_path / "answers.parquet").to_pandas().set_index("row_id")
    (run,) = (path.parent for path in tmp_path.glob("runs/made/*/predictions.parquet"))
    evaluated = pq.read_table(run / "predictions.parquet").to_pandas().set_index("row_id")
    assert len(answers) == 4 * ROWS and len(evaluated) == 48
    same = answers.loc[evaluated.index]
    probabilities = [name for name in evaluated.columns if name.startswith("p_")]
    np.testing.assert_array_equal(same[probabilities].to_numpy(), evaluated[probabilities].to_numpy())
    record = load(run / "bundle").record
    compared = drift(record, str(tmp_path / "rows.csv"), loaded.job)
    assert (compared.rows, compared.unreadable) == (4 * ROWS, 0)
    assert not any(shift.reasons for shift in compared.shifts)
    assert record.signature.missing == ["-999"]
