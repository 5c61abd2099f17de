"""Batch prediction: every row answered or accounted for, the same in every format and on any number of workers."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from commands import raylway
from made import made
from made_prepared import make, make_run
from stores import Bucket
from typer.testing import CliRunner
from web_server import Web

from raylway import cli
from raylway.bundle.predictor import Predictor, shortest
from raylway.data import csv_read
from raylway.errors import UserError
from raylway.job.load import load_job
from raylway.predict import predict as predicting
from raylway.predict.output import output_of
from raylway.runs.progress import Reporter
from raylway.runs.run import Run

KINDS = {"length": "number", "colour": "category"}


def rows(count: int, seed: int = 0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    return pd.DataFrame({"length": draw.normal(10, 3, count), "colour": draw.choice(["red", "green"], count)})


def typed(frame: pd.DataFrame) -> pa.Table:
    return pa.table({"length": frame["length"].to_numpy(), "colour": pa.array(list(frame["colour"]), pa.string())})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("predict"))


def trained(folder: Path) -> Run:
    """A run that tells ripe fruit, those longer than 10."""
    table = typed(rows(200))
    table = table.append_column("ripe", pa.array(np.where(table["length"].to_numpy() > 10, "yes", "no")))
    splits = {"train": table, "validation": table.slice(0, 2), "test": table.slice(2, 2)}
    found = make_run(folder, make(folder / "prepared", splits, "ripe"))
    made(table, "ripe", KINDS, steps=30).stage(found.bundle)
    return found


def predict(
    run: Run, source: Path | str, output: Path | str | None, wanted: str | None = None
) -> predicting.Prediction:
    place = output_of(None if output is None else str(output), wanted)
    return predicting.predict(load_job(run.job), run.bundle, str(source), place, Reporter("lines"))


def test_every_row_is_answered_in_order_with_its_id(run: Run, tmp_path: Path) -> None:
    frame = rows(500, 1)
    frame.assign(more="x")[["colour", "more", "length"]].to_csv(tmp_path / "new.csv", index=False)
    done = predict(run, tmp_path / "new.csv", tmp_path / "answers.csv")
    assert (done.answered, done.rejected) == (500, 0)
    expected = Predictor(run.bundle).predict(typed(frame))
    found = pd.read_csv(tmp_path / "answers.csv", dtype={"p_no": np.float32, "p_yes": np.float32})
    assert list(found) == ["row_id", "file", "line", "prediction", "p_no", "p_yes"]
    assert found["line"].tolist() == found["row_id"].tolist() == list(range(2, 502))
    assert set(found["file"]) == {str(tmp_path / "new.csv")}
    assert found["prediction"].tolist() == expected.labels
    np.testing.assert_array_equal(found[["p_no", "p_yes"]].to_numpy(), expected.probabilities)
    assert {path.name for path in tmp_path.iterdir()} == {"new.csv", "answers.csv"}


BAD = "length,colour\n1,red\noops,red\n2,\n3,red,green\n,green\ninf,red\n4,blue\n"


def test_rows_without_an_answer_are_listed_beside_the_answers(run: Run, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text(BAD)
    done = predict(run, tmp_path / "new.csv", tmp_path / "answers.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    refused = [json.loads(line) for line in (tmp_path / "answers.jsonl.rejects.jsonl").read_text().splitlines()]
    assert [row["line"] for row in answers] == [2, 8]
    assert [(row["line"], row["column"], row["cell"]) for row in refused] == [
        (3, "length", "oops"), (4, "colour", ""), (5, None, "3,red,green"), (6, "length", ""), (7, "length", "inf"),
    ]  # fmt: skip
    assert "'oops' is no finite number" in refused[0]["reason"]
    assert (done.answered, done.rejected) == (2, 5)
    assert [row.line for row in done.first] == [row["line"] for row in refused]
    whole = (tmp_path / "answers.jsonl").read_bytes()
    with pytest.raises(UserError, match="the file is there already"):
        predict(run, tmp_path / "new.csv", tmp_path / "answers.jsonl")
    assert (tmp_path / "answers.jsonl").read_bytes() == whole
    (tmp_path / "answers.jsonl").unlink()  # as if killed between the two
    (tmp_path / "new.csv").write_text("length,colour\n1,red\n")
    predict(run, tmp_path / "new.csv", tmp_path / "answers.jsonl")
    assert not (tmp_path / "answers.jsonl.rejects.jsonl").exists()


def test_a_file_of_another_dialect_than_the_training_data_is_read_as_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decimal commas, and another word for missing."""
    frame = rows(300, 4)
    frame.to_csv(tmp_path / "new.csv", index=False)
    frame.to_csv(tmp_path / "comma.csv", index=False, sep=";", decimal=",")
    with (tmp_path / "comma.csv").open("a") as file:
        file.write("?;red\n")
    monkeypatch.chdir(tmp_path)
    how = ["--set", "data.read.decimal=,", "--set", "data.read.missing=['?']"]
    predict(run, "new.csv", "plain.csv")
    told = CliRunner().invoke(cli.app, ["predict", str(run.folder), "comma.csv", "-o", "told.csv", *how])
    assert told.exit_code == 1 and "1 of 301 rows got no answer" in told.output
    assert json.loads((tmp_path / "told.csv.rejects.jsonl").read_text())["reason"] == "the cell is empty"
    plain, found = (pd.read_csv(tmp_path / name).drop(columns="file") for name in ("plain.csv", "told.csv"))
    pd.testing.assert_frame_equal(found, plain)
    untold = CliRunner().invoke(cli.app, ["predict", str(run.folder), "comma.csv", "-o", "untold.csv"])
    assert untold.exit_code == 1 and "301 of 301 rows got no answer" in untold.output
    refused = CliRunner().invoke(cli.app, ["predict", str(run.folder), "new.csv", "--set", "seed=3"])
    assert "only how the files are read can differ from the run's job" in str(refused.exception)
    assert isinstance(refused.exception, UserError) and refused.exception.where == "--set seed=3"


def test_every_format_has_the_same_digits(run: Run, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    rows(300, 2).to_csv(tmp_path / "new.csv", index=False)
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        predict(run, tmp_path / "new.csv", tmp_path / name)
    predict(run, tmp_path / "new.csv", None)
    assert capfdbinary.readouterr().out == (tmp_path / "a.csv").read_bytes()
    by_csv = [float(row["p_yes"]) for row in csv.DictReader((tmp_path / "a.csv").open())]
    by_json = [json.loads(line)["p_yes"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    by_parquet = pq.read_table(tmp_path / "a.parquet")["p_yes"].to_numpy()
    assert by_csv == by_json == shortest(by_parquet).tolist() == [float(str(value)) for value in by_parquet]


def test_a_folder_of_several_formats_of_output(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_read, "RANGE_BYTES", 2_000)
    (tmp_path / "in").mkdir()
    frame = rows(300, 3)
    for place in range(3):
        part = frame.iloc[place * 100 : place * 100 + 100]
        part.to_csv(tmp_path / "in" / f"{place}.csv.gz", index=False)
    for name, content in (("empty.csv", b""), ("blank.csv", b"\n\n"), ("empty.csv.gz", gzip.compress(b""))):
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "z.csv").write_text("colour,length\nred,oops\n")
    done = predict(run, tmp_path / "in", f"{tmp_path}/out/", "csv")
    assert (done.answered, done.rejected) == (300, 1)
    success = json.loads((tmp_path / "out" / "_SUCCESS").read_text())
    assert (success["answered"], success["rejected"]) == (300, 1)
    parts = [pd.read_csv(tmp_path / "out" / name) for name, _ in success["parts"]]
    assert [len(part) for part in parts] == [count for _, count in success["parts"]]
    found = pd.concat(parts)
    assert found["row_id"].is_monotonic_increasing
    assert found["line"].tolist() == [*range(2, 102)] * 3
    expected = Predictor(run.bundle).predict(typed(frame))
    assert found["prediction"].tolist() == expected.labels
    (refused,) = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(refused)["file"].endswith("z.csv")
    with pytest.raises(UserError, match="the folder is there already"):
        predict(run, tmp_path / "in", f"{tmp_path}/out/")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_source_without_rows_gives_an_empty_answer(run: Run, tmp_path: Path, ending: str) -> None:
    pq.ParquetWriter(tmp_path / "none.parquet", pa.schema({"length": pa.float64(), "colour": pa.string()})).close()
    (tmp_path / "none.csv").write_text("length,colour\n")
    for source in ("none.parquet", "none.csv"):
        answers = tmp_path / f"answers to {source}.{ending}"
        assert predict(run, tmp_path / source, answers).answered == 0
        content = answers.read_bytes()
        if ending == "csv":
            assert list(csv.reader([content.decode()])) == [["row_id", "file", "line", "prediction", "p_no", "p_yes"]]
        elif ending == "parquet":
            assert pq.read_schema(io.BytesIO(content)).names[-1] == "p_yes"
        else:
            assert content == b""


MISTAKES = {
    "lacks": ("colour\nred\n", "a.csv", None, "lacks the column 'length'"),
    "misspelt": ("lenght,colour\n1,red\n", "a.csv", None, "rename 'lenght'"),
    "empty": ("", "a.csv", None, "the file is empty"),
    "ending": ("length,colour\n1,red\n", "a.xlsx", None, "can't be written in this format"),
    "format": ("length,colour\n1,red\n", "a", "xlsx", "can't be written in this format"),
    "place": ("length,colour\n1,red\n", "ftp://host/a.csv", None, "can't be written there"),
    "credentials": ("length,colour\n1,red\n", "s3://key:secret@made/a.csv", None, "the address holds credentials"),
    "under a file": ("length,colour\n1,red\n", "new.csv/a.csv", None, "the answers can't be written"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_and_nothing_is_written(
    run: Run, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, output, wanted, words = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    Path("new.csv").write_text(content)
    with pytest.raises(UserError, match=words):
        predict(run, "new.csv", output, wanted)
    assert [path.name for path in Path().iterdir()] == ["new.csv"]


def test_ray_gives_the_same_bytes(run: Run, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_read, "RANGE_BYTES", 20_000)
    text = rows(3_000, 4).to_csv(index=False) + "oops,red\n" + rows(500, 5).to_csv(index=False, header=False)
    (tmp_path / "new.csv").write_text(text)
    predict(run, tmp_path / "new.csv", tmp_path / "here.csv")
    monkeypatch.setattr(predicting, "SMALL_BYTES", 0)
    assert predict(run, tmp_path / "new.csv", tmp_path / "there.csv").rejected == 1
    for ending in ("", ".rejects.jsonl"):
        assert (tmp_path / f"here.csv{ending}").read_bytes() == (tmp_path / f"there.csv{ending}").read_bytes()
    whole = (tmp_path / "new.csv").read_bytes()
    with gzip.open(tmp_path / "cut.csv.gz", "wb") as file:
        file.write(whole)
    packed = (tmp_path / "cut.csv.gz").read_bytes()
    (tmp_path / "cut.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match="cut.csv.gz"):
        predict(run, tmp_path / "cut.csv.gz", tmp_path / "cut.csv")
    assert not (tmp_path / "cut.csv").exists()


def test_a_bucket_gets_the_same_bytes(run: Run, tmp_path: Path, bucket: Bucket) -> None:
    (tmp_path / "new.csv").write_text(BAD)
    predict(run, tmp_path / "new.csv", tmp_path / "a.csv")
    predict(run, tmp_path / "new.csv", bucket.address("made/a.csv"))
    for ending in ("", ".rejects.jsonl"):
        assert bucket.read(f"made/a.csv{ending}") == (tmp_path / f"a.csv{ending}").read_bytes()
    bucket.write("made/out/part-00007.csv", b"left by one that was killed")
    predict(run, tmp_path / "new.csv", f"{tmp_path}/out", "csv")
    predict(run, tmp_path / "new.csv", bucket.address("made/out"), "csv")
    listed = [each.base_name for each in bucket.files.get_file_info(pafs.FileSelector("rows/made/out"))]
    assert sorted(listed) == ["_SUCCESS", "part-00000.csv", "rejects.jsonl"]
    assert all(bucket.read(f"made/out/{name}") == (tmp_path / "out" / name).read_bytes() for name in listed)
    for place in ("made/out/", "made/a.csv"):
        with pytest.raises(UserError, match="is there already"):
            predict(run, tmp_path / "new.csv", bucket.address(place))
    bucket.write("made/in/new.csv", BAD.encode())
    assert predict(run, bucket.address("made/in/"), tmp_path / "b.csv").rejected == 5
    assert pd.read_csv(tmp_path / "b.csv")["file"].unique() == [bucket.address("made/in/new.csv")]


def test_a_web_server_is_read_as_the_disk_is(run: Run, tmp_path: Path, web: Web) -> None:
    frame = rows(300, 9)
    (tmp_path / "new.csv").write_text(frame.to_csv(index=False) + "oops,red\n")
    frame.to_parquet(tmp_path / "new.parquet", row_group_size=100)
    for name in ("new.csv", "new.parquet"):
        here, there = tmp_path / f"here of {name}.csv", tmp_path / f"there of {name}.csv"
        predict(run, tmp_path / name, here)
        address = web.put(f"a b/{name}", (tmp_path / name).read_bytes())
        assert predict(run, address, there).rejected == (name == "new.csv")
        local = here.read_text()
        assert there.read_text() == local.replace(str(tmp_path / name), address)
    with pytest.raises(UserError, match="can't be written there"):
        predict(run, address, f"{web.address}/answers.csv")


def test_other_formats_are_answered_alike(run: Run, tmp_path: Path) -> None:
    frame = rows(50, 8).round(6)
    frame.to_json(tmp_path / "new.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "new.parquet")
    frame.to_csv(tmp_path / "new.tsv", sep="\t", index=False)
    answers = []
    for ending in ("tsv", "jsonl", "parquet"):
        assert predict(run, tmp_path / f"new.{ending}", tmp_path / f"{ending}.csv").answered == 50
        answers.append(pd.read_csv(tmp_path / f"{ending}.csv").drop(columns=["row_id", "file", "line"]))
    pd.testing.assert_frame_equal(answers[0], answers[1])
    pd.testing.assert_frame_equal(answers[0], answers[2])


def test_the_command_and_its_exit_codes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text(BAD)
    shown = raylway("predict", run.folder, "new.csv", folder=tmp_path)
    assert shown.returncode == 1
    assert [row["line"] for row in csv.DictReader(io.StringIO(shown.stdout))] == ["2", "8"]
    assert "new.csv:3: length: 'oops' is no finite number" in shown.stderr
    assert "5 of 7 rows got no answer" in shown.stderr
    written = raylway("predict", run.folder, "new.csv", "-o", "a.parquet", folder=tmp_path)
    assert written.returncode == 1
    assert "2 rows answered: a.parquet" in written.stderr
    assert "a.parquet.rejects.jsonl says why" in written.stderr
