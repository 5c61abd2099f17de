"""A bucket of a real S3 server holds what a folder does: lines, leases, prepared data, rows, bundles, runs."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made as making
import made_prepared
import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stores
import torch
from commands import environment, raylway, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preparing import job, prepare_elsewhere
from safetensors.torch import load_file
from test_storage import counted, named
from test_train_watch import events_in
from typer.testing import CliRunner

from raylway import cli, storage
from raylway.bundle import artefact, contents
from raylway.bundle.predictor import Predictor
from raylway.data import engine, pieces, prepare
from raylway.errors import RunFailed, UserError
from raylway.features.prepared import MANIFEST, Prepared
from raylway.job.load import load_job
from raylway.predict import predict
from raylway.predict.output import output_of
from raylway.runs import hold, journal, pace
from raylway.runs.progress import Reporter
from raylway.runs.run import Run, all_runs, find_run, summary
from raylway.storage import Address, Place, buckets
from raylway.train import sinks

ROWS = "n,word,y\n" + "".join(f"{n},w{n % 7},{'ab'[n % 2]}\n" for n in range(400)) + "x,w1,a\n3,w3,b\n3,w3,b\n"


@pytest.fixture
def root(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Address]:
    """An address where nothing is yet, and a cache of its own. Of S3, unless the test asks for the other store too."""
    monkeypatch.setenv("RAYLWAY_CACHE", str(tmp_path / "cache"))
    server = request.getfixturevalue(getattr(request, "param", "s3_server"))
    found = storage.place(named(monkeypatch, server).address(tmp_path.name))
    assert isinstance(found, Address)
    yield found
    buckets.system.cache_clear()


def everything(place: Place) -> dict[str, bytes]:
    """All files below a place."""
    found = {}
    for each in storage.children(place):
        if storage.size(each) is None:
            found |= {f"{each.name}/{name}": content for name, content in everything(each).items()}
        else:
            found[each.name] = each.read_bytes()
    return found


def prepared(loaded: Any, where: Place) -> Prepared:
    return prepare.prepare(loaded, where, Reporter("lines", io.StringIO()), engine.ALL)


both_stores = pytest.mark.parametrize("root", ["s3_server", "google_server"], indirect=True)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 400), max_size=12), st.integers(0, 2), st.floats(0, 1)), max_size=4),
    st.sampled_from([300, 1 << 20]),
)
def test_lines_of_a_bucket_are_those_of_a_file(
    root: Address, tmp_path: Path, starts: list[tuple[list[int], int, float]], segment_bytes: int
) -> None:
    """Starts that cut back what is there, write lines of some lengths, and end with or without a last word. What comes
    behind the last mark of a start that dies may be lost, and nothing else."""
    name = f"{time.monotonic_ns()}.jsonl"
    file, address = tmp_path / name, root / name
    before, marks = journal._SEGMENT_BYTES, [0]
    journal._SEGMENT_BYTES = segment_bytes
    try:
        for lengths, marked, cut in starts:
            size = marks[int(cut * (len(marks) - 1))]
            marks = [mark for mark in marks if mark <= size]
            writers = journal.begin(file, size), journal.begin(address, size)
            for place, length in enumerate(lengths):
                for writer in writers:
                    writer.write(b"%d" % (10**length) + b"\n")
                if place % 3 < marked:
                    for writer in writers:
                        writer.sync()
                    assert writers[0].size == writers[1].size
                    marks.append(writers[0].size)
            for writer in writers:
                writer.close()
            assert journal.read(address) == journal.read(file)
    finally:
        journal._SEGMENT_BYTES = before


@both_stores
def test_a_writer_whose_successor_has_begun_is_not_heard(root: Address) -> None:
    first = journal.begin(root / "metrics.jsonl", 0)
    first.write(b"1\n")
    first.sync()
    size = first.size
    first.write(b"lost\n")
    first.sync()
    second = journal.begin(root / "metrics.jsonl", size)
    assert journal.read(root / "metrics.jsonl") == b"1\n"
    tail = journal.Tail(root / "metrics.jsonl")
    tail._looked_at = 0.0
    first.write(b"zombie\n")
    first.sync()
    second.write(b"2\n")
    second.sync()
    assert journal.read(root / "metrics.jsonl") == b"1\n2\n"
    assert tail.new() == [b"2"] and tail.new() == []


@both_stores
def test_what_tensorboard_shows_of_a_bucket_is_that_of_a_folder(
    root: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two starts, the second of which goes on behind step 15; a full object follows another."""
    monkeypatch.setattr(sinks, "_OBJECT_BYTES", 400)
    for place in (root, tmp_path):
        for first, last in ((1, 20), (16, 30)):
            sink = sinks.TensorBoard(place / sinks.FOLDER, first - 1)
            for step in range(first, last + 1):
                sink.write({"kind": "step", "step": step, "loss": 1 / step, "time": pace.now()})
                if step % 5 == 0:
                    sink.flush()
    for place in (root, tmp_path):
        shown = [(event.step, value.simple_value) for event in events_in(place) for value in event.summary.value]
        assert shown == [(step, float(np.float32(1 / step))) for step in range(1, 31)]
    assert len(storage.children(root / sinks.FOLDER)) > 4


def test_events_of_many_processes_are_all_kept(root: Address) -> None:
    run = Run(root / "job" / "run")
    threads = [threading.Thread(target=lambda n=n: [run.log("made", n=n) for _ in range(5)]) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [msgspec.json.decode(line)["n"] for line in journal.read(run.events).splitlines()]
    assert sorted(found) == sorted(list(range(6)) * 5)


def test_a_run_is_held_by_one_command(root: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "RENEW_EVERY_S", 0.3)
    place = root / "lease.json"
    with hold.hold(root):
        with (
            pytest.raises(UserError, match=f"worked on by another process(.|\n)*process {os.getpid()}"),
            hold.hold(root),
        ):
            pass
        renewed = storage.read_record(place, hold.Lease).renewed
        deadline = time.monotonic() + 30
        while storage.read_record(place, hold.Lease).renewed == renewed:
            assert time.monotonic() < deadline
    assert not place.exists()
    gone = multiprocessing.get_context("spawn").Process()
    gone.start()
    gone.join()
    for dead in (hold.Lease("x", platform.node(), gone.pid or 0, 3), hold.Lease("x", "another machine", 1, 3)):
        storage.write_record(place, dead)
        with hold.hold(root):
            assert storage.read_record(place, hold.Lease).holder != "x"


@both_stores
def test_prepared_data_of_a_bucket_is_that_of_a_folder(root: Address, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(ROWS)
    loaded = job(tmp_path, {"source": ["rows.csv"], "target": "y", "clean": {"max_invalid": "5%"}})
    there, here = prepared(loaded, root), prepared(loaded, tmp_path / "runs")
    found, expected = everything(there.folder), everything(here.folder)
    assert found.keys() == expected.keys() and len(found) == 8
    assert {name for name in found if found[name] != expected[name]} == set()
    assert prepared(loaded, root).manifest == there.manifest
    for split in ("train", "validation", "test"):
        rows, same = there.rows(split), here.rows(split)
        order = np.random.default_rng(0).permutation(len(same))
        for ours, theirs in zip(rows.take(order), same.take(order), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    # killed before the manifest: the pieces are there
    storage.remove(there.folder / MANIFEST)
    storage.remove(there.folder / "train-00000.arrow")
    progress = io.StringIO()
    prepare.prepare(loaded, root, Reporter("lines", progress), engine.ALL)
    assert everything(there.folder) == found
    assert "read 0 of" in progress.getvalue()


def test_two_preparations_at_once_make_the_same(root: Address, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(ROWS)
    loaded = job(tmp_path, {"source": "rows.csv", "target": "y", "clean": {"max_invalid": "5%"}})
    context = multiprocessing.get_context("spawn")
    both = [
        context.Process(target=prepare_elsewhere, args=(tmp_path, str(root), tmp_path / f"cache-{number}"))
        for number in range(2)
    ]
    for each in both:
        each.start()
    for each in both:
        each.join(120)
    assert [each.exitcode for each in both] == [0, 0]
    here = prepared(loaded, tmp_path / "runs")
    assert everything(root / "prepared" / here.folder.name) == everything(here.folder)


def test_pieces_that_nobody_uses_go_after_a_week(
    root: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.csv").write_text(ROWS)
    for source in ("rows.csv", ["rows.csv"]):
        prepared(job(tmp_path, {"source": source, "target": "y", "clean": {"max_invalid": "5%"}}), root)
    (key,) = [each.name for each in storage.children(root / "prepared" / pieces.FOLDER)]
    storage.write_bytes(root / "prepared" / pieces.FOLDER / "unnamed" / "facts", b"")
    pieces.sweep(root / "prepared", ["unnamed"])
    assert (root / "prepared" / pieces.FOLDER / "unnamed" / "facts").exists()
    monkeypatch.setattr(pieces, "_UNUSED_IN_BUCKET_S", -1.0)
    pieces.sweep(root / "prepared", [])
    there = [each.name for each in storage.children(root / "prepared" / pieces.FOLDER) if everything(each)]
    assert there == [key]  # a prepared folder names it


def test_rows_of_a_bucket_through_a_cache_that_is_too_small(
    root: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten shards, room for three: rows are right all the same, in any order, and only what is needed is fetched."""
    table = pa.table({"a": np.arange(1000.0), "c": [f"w{n % 5}" for n in range(1000)], "y": np.arange(1000.0) * 2})
    nothing = table.slice(0, 0)
    here = made_prepared.make(tmp_path / "here", {"train": table, "validation": nothing, "test": nothing}, "y")
    for name, content in everything(here.folder).items():
        storage.write_bytes(root / "prepared" / name, content)
    downloads = counted(monkeypatch)
    shard = here.shards("train")[0].bytes
    monkeypatch.setenv("RAYLWAY_CACHE_GB", f"{3.5 * shard / 1e9}")
    there, rng = Prepared(root / "prepared"), np.random.default_rng(1)
    rows, same = there.rows("train", verify=True), here.rows("train")
    assert downloads == []
    for positions in (np.arange(0, 150), np.arange(900, 1000), rng.permutation(1000), np.zeros(0, np.int64)):
        for ours, theirs in zip(rows.take(positions), same.take(positions), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert len(list((tmp_path / "cache" / "objects").iterdir())) <= 3 and len(rows.opened) <= 3
        if positions.max(initial=0) == 149:
            assert len(downloads) == 2
    np.testing.assert_array_equal(rows.targets(), same.targets())
    storage.write_bytes(root / "prepared" / "train-00004.arrow", b"other")
    with pytest.raises(RunFailed, match=r"train-00004\.arrow"):
        rows.take(np.arange(400, 500))
    storage.remove(root / "prepared" / "train-00005.arrow")
    with pytest.raises(RunFailed, match=r"train-00005\.arrow: the shard is missing"):
        rows.take(np.arange(500, 600))


@both_stores
def test_a_bundle_is_fetched_once_and_checked(root: Address, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = making.fruit()
    local = made.stage(tmp_path / "bundle")
    staged, final = root / "bundle.staged", root / "bundle"
    for name, content in everything(local).items():
        storage.write_bytes(staged / name, content)
    storage.write_bytes(final / contents.RECORD, b"of another time")
    artefact.publish(staged, final, {"accuracy": 0.5})
    assert everything(staged) == {} and everything(final).keys() == everything(local).keys()
    downloads = counted(monkeypatch)
    artefact.publish(staged, final, {"accuracy": 0.7})  # again, after a kill: what was published stays
    bundle = contents.load(final)
    assert contents.load(final).folder == bundle.folder and len(downloads) == len(bundle.record.files)
    assert bundle.record.metrics == {"accuracy": 0.5}
    table = pa.table({"length": [1.0, 9.0], "width": [2.0, 3.0], "colour": ["red", "green"]})
    np.testing.assert_array_equal(
        Predictor(final).predict(table).probabilities, Predictor(local).predict(table).probabilities
    )
    for damage, words in ((b"x", "checksum"), (None, "no file")):
        storage.remove(bundle.folder)
        if damage is None:
            storage.remove(final / contents.WEIGHTS)
        else:
            storage.write_bytes(final / contents.WEIGHTS, damage)
        with pytest.raises(UserError, match=rf"{final}/model.safetensors: the bundle is damaged(.|\n)*{words}"):
            contents.load(final)
        assert not bundle.folder.exists()
    storage.remove(final / contents.RECORD)
    with pytest.raises(UserError, match=f"{final}: there is no whole bundle here"):
        contents.load(final)


def test_runs_of_a_bucket_are_found_by_all_their_names(root: Address, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: made\ndata: {source: a.csv, target: y}\n")
    loaded = load_job(tmp_path / "job.yaml")
    for number in range(3):
        Run(root / "made" / f"run{number}").create(loaded, "f" * 32)
        time.sleep(0.002)
    storage.write_bytes(root / "made" / "no-run" / "x", b"")
    storage.write_bytes(root / "made" / "run1" / "bundle" / contents.RECORD, b"")
    assert [run.folder.name for run in all_runs(root)] == ["run0", "run1", "run2"]
    for name, found in (("latest", "run2"), ("run1", "run1"), ("made", "run2"), (str(root / "made" / "run0"), "run0")):
        assert find_run(root, name).folder == root / "made" / found
    assert find_run(root, "latest", with_bundle=True).folder.name == "run1"
    assert summary(find_run(root, "run0"))["folder"] == str(root / "made" / "run0")
    assert load_job(find_run(root, "run0").job).job == loaded.job
    with pytest.raises(UserError, match=r"no such run(.|\n)*s3://rows/"):
        find_run(root, "nothing")


def test_a_job_in_a_bucket_from_raw_rows_to_answers(
    root: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the commands that people give; nothing is left in the folder, and no secret anywhere."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "rows.csv").write_text(ROWS)
    data = {"source": "rows.csv", "target": "y", "clean": {"max_invalid": "5%"}}
    job(folder, data, train={"for": "30 steps", "checkpoint": {"every": "10 steps", "keep": 1}})
    done = raylway("run", "job.yaml", "--set", f"storage={root}", folder=folder)
    assert done.returncode == 0, done.stderr
    assert str(root) in done.stdout and stores.SECRET not in done.stdout + done.stderr
    assert {path.name for path in folder.iterdir()} == {"job.yaml", "rows.csv"}
    found = everything(root)
    assert not [name for name, content in found.items() if stores.SECRET.encode() in content]
    run = find_run(root, "latest")
    assert [stage.status for stage in run.record.stages.values()] == ["done"] * 5
    lines = [msgspec.json.decode(line) for line in journal.read(run.metrics).splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 31))
    assert not (run.folder / "lease.json").exists()

    monkeypatch.chdir(folder)
    size = sum(shard.bytes for shard in Prepared(root / "prepared" / run.record.fingerprint).manifest.shards)
    told = re.search(r"cache +(\S+) GB of shards", command("check", "job.yaml", "--set", f"storage={root}"))
    assert told and 0.5 < float(told[1]) / (size / 1e9) < 2
    with storage.here(run.predictions) as path:
        answers = {row["row_id"]: row for row in pq.read_table(path).to_pylist()}
    assert len(answers) > 50
    predicted = pd.read_csv(io.StringIO(command("predict", "latest", "rows.csv", "--storage", root, code=1)))
    assert len(predicted) == 402
    both = predicted[predicted["row_id"].isin(answers)]
    np.testing.assert_array_equal(
        both["p_a"].to_numpy(np.float32), np.array([answers[row]["p_a"] for row in both["row_id"]], np.float32)
    )
    row = next(iter(answers.values()))
    shown = json.loads(command("show", run.folder, "--row", row["row_id"], "--storage", root, "--json"))
    assert (shown["side"], shown["prediction"]["prediction"]) == ("test", row["prediction"])
    assert "1 rows in quarantine; 2 duplicates" in command("quarantine", "made", "--storage", root)
    assert "no input has drifted" in command("drift", "latest", "rows.csv", "--storage", root)
    assert "finished" in command("runs", "--storage", root)
    assert command("report", "latest", "--storage", root).strip() == str(run.report)
    before = everything(root)
    assert f"serve {run.folder}" in command("run", "job.yaml", "--set", f"storage={root}")
    assert everything(root) == before


def test_answers_on_a_cluster_need_a_folder_that_all_see(
    root: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in everything(making.fruit().stage(tmp_path / "bundle")).items():
        storage.write_bytes(root / "bundle" / name, content)
    (tmp_path / "rows.csv").write_text("length,width,colour\n1,2,red\n")
    loaded = job(tmp_path, {"source": "rows.csv", "target": "y"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(predict, "SMALL_BYTES", 0)
    told = "the parts of the answers have no place that all machines see"
    for output, shown in ((None, "standard output"), (str(root / "answers.csv"), "a bucket")):
        with pytest.raises(UserError, match=rf"{told}(.|\n)*found: {shown}"):
            reporter = Reporter("lines", io.StringIO())
            predict.predict(loaded, root / "bundle", "rows.csv", output_of(output, None), reporter)


@pytest.mark.long
def test_a_bucket_serves_over_http(root: Address, tmp_path: Path) -> None:
    local = making.fruit().stage(tmp_path / "bundle")
    (tmp_path / "job.yaml").write_text("name: made\ndata: {source: a.csv, target: y}\n")
    run = Run(root / "made" / "run0")
    run.create(load_job(tmp_path / "job.yaml"), "f" * 32)
    for name, content in everything(local).items():
        storage.write_bytes(run.bundle / name, content)
    table = pa.table({"length": [1.0], "width": [2.0], "colour": ["red"]})
    expected = Predictor(local).predict(table)
    with serving("latest", "--storage", str(root), folder=tmp_path) as client:
        answer = client.post("/predict", json={"rows": table.to_pylist()}).json()
    assert answer["predictions"] == expected.labels
    assert expected.probabilities is not None
    assert np.float32(list(answer["probabilities"][0].values())).tolist() == expected.probabilities[0].tolist()


@pytest.mark.long
def test_a_command_killed_over_a_bucket_ends_as_the_unbroken_one_in_a_folder(root: Address, tmp_path: Path) -> None:
    """To the last bit of the weights. Killed twice, whenever another checkpoint is whole."""
    (tmp_path / "rows.csv").write_text(ROWS)
    data = {"source": "rows.csv", "target": "y", "clean": {"max_invalid": "5%"}}
    job(tmp_path, data, train={"for": "3000 steps", "checkpoint": {"every": "100 steps", "keep": 2}})
    assert raylway("run", "job.yaml", "--set", f"storage={tmp_path / 'runs'}", folder=tmp_path).returncode == 0
    words = [sys.executable, "-m", "raylway", "run", "job.yaml", "--set", f"storage={root}"]
    for _ in range(2):
        before = {name for name in everything(root) if name.endswith("-a001/manifest.json")}
        process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE)
        deadline = time.monotonic() + 200
        while not {name for name in everything(root) if "checkpoints" in name and name.endswith(MANIFEST)} - before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.kill()
        process.communicate()
        assert process.returncode == -9
        time.sleep(4)  # its Ray ends
    done = raylway("run", "job.yaml", "--set", f"storage={root}", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    here, there = find_run(tmp_path / "runs", "latest"), find_run(root, "latest")
    ours, theirs = (load_file(contents.load(run.bundle).folder / contents.WEIGHTS) for run in (there, here))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = [msgspec.json.decode(line) for line in journal.read(there.metrics).splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "step"] == list(range(1, 3001))


@pytest.mark.long
def test_a_bucket_that_goes_away_ends_the_run_with_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is killed while training writes to it."""
    (tmp_path / "rows.csv").write_text(ROWS)
    (tmp_path / "server").mkdir()
    data = {"source": "rows.csv", "target": "y", "clean": {"max_invalid": "5%"}}
    job(tmp_path, data, train={"for": "1000000 steps", "checkpoint": {"every": "200 steps", "keep": 2}})
    monkeypatch.setenv("RAYLWAY_CACHE", str(tmp_path / "cache"))
    with stores.s3(tmp_path / "server") as server:
        root = storage.place(named(monkeypatch, server).address("runs"))
        words = [sys.executable, "-m", "raylway", "train", "job.yaml", "--set", f"storage={root}"]
        process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 200
        while not [name for name in everything(root) if "checkpoints" in name and name.endswith(MANIFEST)]:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
    _, said = process.communicate(timeout=buckets.GIVE_UP_AFTER_S * 4)
    assert process.returncode == 1, said
    assert said.count("error: ") == 1 and "can't be reached" in said and stores.SECRET not in said
    assert "Traceback" not in said


def command(*words: object, code: int = 0) -> str:
    """What a command of this process prints."""
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return str(done.stdout)
