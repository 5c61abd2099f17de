"""Jobs with dates, functions of the user's own and every kind of transform, from `raylway run` to the served answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
from asking import ask, local
from commands import raylway

from raylway.bundle import contents
from raylway.bundle.predictor import Predictor
from raylway.data import generations, sources
from raylway.errors import UserError
from raylway.features.prepared import Prepared
from raylway.job.load import LoadedJob, load_job
from serve_app.service import Service

MODULE = """
import pyarrow.compute as pc
from own_help import HOUR

def speed(table):
    return pc.divide(table["distance"], table["air_time"])

def minutes(table):
    parts = pc.split_pattern(table["clock"], ":")
    hours, minutes = (pc.cast(pc.list_element(parts, index), "float64") for index in (0, 1))
    return pc.add(pc.multiply(hours, HOUR), minutes)
"""
DATA: dict[str, Any] = {
    "source": "rows.csv",
    "target": "late",
    "derive": {"speed": "own_job_steps:speed(distance, air_time)", "mins": "own_job_steps:minutes(clock)"},
    "features": {"date": ["when"], "drop": ["clock", "air_time"]},
    "transform": {
        "bins": 8,
        "rare": 20,
        "columns": {
            "fare": {"scale": "log"},
            "carrier": {"categories": "one_hot"},
            "distance": {"scale": "quantile"},
        },
    },
}
ROW = {"when": "2013-05-01T05:00:00Z", "distance": 500, "air_time": 100, "clock": "05:30", "carrier": "A", "fare": 20}


def frame() -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), 1500
    when = pd.date_range("2013-01-01", periods=rows, freq="3h")
    clock = zip(rng.integers(0, 24, rows), rng.integers(0, 60, rows), strict=True)
    table = pd.DataFrame(
        {
            "when": when.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "distance": rng.integers(100, 3000, rows),
            "air_time": rng.integers(0, 400, rows),
            "clock": [f"{hour:02}:{minute:02}" for hour, minute in clock],
            "carrier": rng.choice(list("ABCDEF"), rows, p=[0.4, 0.3, 0.2, 0.085, 0.01, 0.005]),
            "fare": rng.lognormal(3, 1, rows).round(2),
        }
    )
    table["late"] = np.where((table["distance"] > 1500) ^ (when.hour > 12), "yes", "no")
    table.loc[5, "when"], table.loc[7, "when"], table.loc[9, "fare"] = "2013-02-30", "NA", np.nan
    return table


def write(folder: Path, data: dict[str, Any], table: pd.DataFrame) -> LoadedJob:
    table.to_csv(folder / "rows.csv", index=False)
    (folder / "own_job_steps.py").write_text(MODULE)
    (folder / "own_help.py").write_text("HOUR = 60\n")
    (folder / "job.yaml").write_text(json.dumps({"name": "demo", "data": data, "train": {"for": "2 epochs"}}))
    return load_job(folder / "job.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transform")
    write(folder, DATA, frame())
    done = raylway("run", "job.yaml", folder=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Far from the job's folder and its modules."""
    (found,) = folder.glob("runs/demo/*/bundle")
    place = tmp_path_factory.mktemp("elsewhere") / "bundle"
    shutil.copytree(found, place)
    return place


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[httpx.Client]:
    with local(Service(Predictor(bundle), 64)) as client:
        yield client


def test_the_row_account(folder: Path) -> None:
    (manifest,) = folder.glob("runs/prepared/*/manifest.json")
    found, table = Prepared(manifest.parent).manifest, frame()
    no_speed = (table["air_time"] == 0) & (table["distance"] >= 0)
    missing = no_speed | table["fare"].isna() | (table["when"] == "NA")
    assert (found.account.quarantined, found.account.missing) == (1, int(missing.drop(5).sum()))
    assert found.account.kept == len(table) - 1 - found.account.missing
    (rejected,) = map(json.loads, (manifest.parent / "quarantine" / "rows.jsonl").read_text().splitlines())
    assert (rejected["line"], rejected["column"], rejected["cell"]) == (7, "when", "2013-02-30")
    assert rejected["reason"] == "no date"


def test_the_bundle_carries_the_users_modules_and_the_signature_the_date(bundle: Path) -> None:
    assert sorted(path.name for path in (bundle / contents.CODE).iterdir()) == ["own_help.py", "own_job_steps.py"]
    record = contents.load(bundle).record
    assert {each.name: each.type for each in record.signature.inputs} == {
        "when": "date", "distance": "number", "air_time": "number", "clock": "category", "carrier": "category",
        "fare": "number",
    }  # fmt: skip
    names = record.transform.numeric_names
    assert {"carrier is A", "carrier is rare", "fare", "distance"} < set(names)
    assert sum(name.startswith("speed ") for name in names) == 8
    assert [each.name for each in record.transform.embedded] == ["when.month", "when.day", "when.weekday", "when.hour"]
    changed = bundle.parent / "changed"
    shutil.copytree(bundle, changed, dirs_exist_ok=True)
    (changed / contents.CODE / "own_help.py").write_text("HOUR = 61\n")
    with pytest.raises(UserError, match="damaged"):
        contents.load(changed)


def test_served_predicted_and_evaluated_answers_are_one(folder: Path, client: httpx.Client) -> None:
    (run,) = folder.glob("runs/demo/*/bundle")
    rows = frame().drop(columns="late").iloc[20:60]
    rows.to_csv(folder / "some.csv", index=False)
    done = raylway("predict", run.parent, folder / "some.csv", "--output", folder / "out.jsonl", folder=folder)
    assert done.returncode == 0, done.stderr
    predicted = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    for row, found in zip(json.loads(rows.to_json(orient="records")), predicted, strict=True):
        status, answer = ask(client, row)
        if row["air_time"] == 0:
            assert status == 422 and found["prediction"] is None and "speed has no value" in found["error"]
        else:
            served = np.float32([answer["probabilities"][0][name] for name in ("no", "yes")])
            assert served.tobytes() == np.float32([found["p_no"], found["p_yes"]]).tobytes()


def test_a_row_whose_derived_feature_has_no_value_is_refused(client: httpx.Client) -> None:
    status, answer = ask(client, ROW, ROW | {"air_time": 0}, ROW | {"clock": "noon"})
    assert status == 422
    assert [(each["row"], each["feature"]) for each in answer["errors"]] == [(1, "speed"), (2, "mins")]
    assert "trained without such rows" in answer["errors"][0]["reason"]
    assert "can't be computed: your function raised ArrowInvalid" in answer["errors"][1]["reason"]


@pytest.mark.parametrize("value", ["x", "2013-02-30", "20130101", 20130101, None, True, "", ["2013-01-01"]])
def test_what_is_no_date_is_refused(client: httpx.Client, value: Any) -> None:
    for body in ({"rows": [ROW | {"when": value}]}, {"data": [[*(ROW | {"when": value}).values()]]}):
        answer = client.post("/predict", json=body)
        assert answer.status_code == 422
        (error,) = answer.json()["errors"]
        assert (error["row"], error["feature"]) == (0, "when") and "2013-01-01T05:00:00Z" in error["reason"]


def test_one_instant_has_one_answer(client: httpx.Client) -> None:
    spellings = ["2013-05-01T05:00:00Z", "2013-05-01 07:00+02:00", "2013-05-01T05"]
    answers = [ask(client, ROW | {"when": text})[1]["probabilities"] for text in spellings]
    assert answers[0] == answers[1] == answers[2] != ask(client, ROW | {"when": "2013-05-01T20"})[1]["probabilities"]


def test_the_documents_show_the_date(client: httpx.Client) -> None:
    api = client.get("/openapi.json").json()
    assert api["components"]["schemas"]["Row"]["properties"]["when"]["type"] == ["string"]
    example = api["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["examples"]["rows"]
    assert client.post("/predict", json=example["value"]).status_code == 200


def test_a_parquet_file_of_timestamps_is_predicted_as_its_text(folder: Path) -> None:
    (run,) = folder.glob("runs/demo/*/bundle")
    rows = frame().drop(columns="late").iloc[20:40].query("air_time > 0")
    rows.to_csv(folder / "t.csv", index=False)
    rows.assign(when=pd.to_datetime(rows["when"])).to_parquet(folder / "t.parquet")
    answers = [
        raylway("predict", run.parent, folder / f"t.{kind}", folder=folder).stdout for kind in ("csv", "parquet")
    ]
    columns = [[line.split(",")[3:] for line in text.splitlines()] for text in answers]
    assert columns[0] == columns[1] and len(columns[0]) == len(rows) + 1


def test_the_modules_source_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    marks = []
    for hour in (60, 61):
        loaded = write(tmp_path, DATA, frame().head(50))
        (tmp_path / "own_help.py").write_text(f"HOUR = {hour}\n")
        marks.append(generations.find(loaded, None).fingerprint)
    assert marks[0] != marks[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": {"date": ["fare"]}}, "the column 'fare' does not hold dates"),
        ({"features": {"date": ["whn"]}}, "there is no column 'whn'"),
        ({"features": {"date": ["late"]}}, "is the target"),
        ({"transform": {"columns": {"fre": {"scale": "log"}}}}, "there is no column 'fre'"),
        ({"transform": {"columns": {"carrier": {"scale": "log"}}}}, "scale means nothing for the column 'carrier'"),
        ({"transform": {"columns": {"fare": {"scale": "log", "bins": 4}}}}, "expected scale or bins for a column"),
        ({"derive": {"speed": "own_job_steps:speed(distance, airtime)"}}, "there is no column 'airtime'"),
        ({"derive": {"speed": "own_job_nowhere:speed(distance)"}}, "there is no module 'own_job_nowhere'"),
        ({"derive": {"speed": "own_job_steps:sped(distance)"}}, "has no function 'sped'"),
        ({"derive": {"speed": "own_job_steps:speed(distance)"}}, "your function raised KeyError"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    data = DATA | {"derive": {}, "features": {}, "transform": {}} | change
    with pytest.raises(UserError, match=words) as caught:
        sources.sample(write(tmp_path, data, frame().drop(index=[5, 7])))
    assert str(tmp_path) in str(caught.value)


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    section = {"impute": "median", "columns": {"clock": {"rare": 3}}}
    found = sources.sample(write(tmp_path, DATA | {"transform": section}, frame()))
    assert any("impute have no effect" in text for text in found.decisions)
    assert any("columns.clock has no effect" in text for text in found.decisions)


def test_a_column_of_which_every_cell_is_a_date_is_one(tmp_path: Path) -> None:
    table = frame().drop(index=[5, 7])
    data = DATA | {"features": {}, "derive": {}, "transform": {}}
    assert sources.sample(write(tmp_path, data, table)).date == ["when"]
    assert sources.sample(write(tmp_path, data | {"features": {"drop": ["when"]}}, table)).date == []
    listed = sources.sample(write(tmp_path, data | {"features": {"categorical": ["when"]}}, table))
    assert listed.date == [] and "when" in listed.categorical
    table.loc[11, "when"] = "2013-02-30"
    found = sources.sample(write(tmp_path, data, table))
    assert found.date == ["when"] and any(
        "1 cell that is none makes its row invalid" in text for text in found.decisions
    )
    table.loc[11::20, "when"] = "2013-02-30"
    found = sources.sample(write(tmp_path, data, table))
    assert found.date == [] and any("'when' is no feature" in text for text in found.decisions)
    assert any("column 'when' is text: " in text and "cells are no dates (first" in text for text in found.decisions)
