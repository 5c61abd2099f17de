"""Every row of a source can be followed to what became of it, and back; the leak test sees what is broken."""

from __future__ import annotations

import bz2
import dataclasses
import functools
import gzip
import io
import itertools
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import feather
from typer.testing import CliRunner

from raylway import cli, storage
from raylway.data import csv_read, division, leaks, prepare, remote, trace
from raylway.data.leaks import Contents, leak_test
from raylway.errors import UserError
from raylway.features.prepared import DUPLICATES, LINE_BITS, MANIFEST, SPLITS, LeakTest, Prepared, Shard
from raylway.job.load import LoadedJob, load_job
from raylway.runs.progress import Reporter
from raylway.runs.run import Run

TEXT = 'size,note,answer\n1.5,"two\nlines",yes\nx,a,no\n,b,no\n'


def job(folder: Path, source: str = "rows.csv", **data: Any) -> LoadedJob:
    path = folder / "job.yaml"
    clean = {"max_invalid": "5%"}
    described = {"source": source, "target": "answer", "clean": clean, **data}
    path.write_text(json.dumps({"name": "made", "storage": str(folder / "runs"), "data": described}))
    return load_job(path)


def made(folder: Path, loaded: LoadedJob) -> Prepared:
    return prepare.prepare(loaded, folder / "runs", Reporter("lines", io.StringIO()))


def rows() -> pd.DataFrame:
    rng = np.random.default_rng(4)
    frame = pd.DataFrame({"size": rng.normal(size=80).round(4), "note": rng.choice(["a", "b", "c"], 80)})
    frame["answer"] = rng.choice(["yes", "no"], 80)
    return frame


def csv(folder: Path) -> LoadedJob:
    """Rows 2 to 5 by hand (a cell over two lines, a bad one, a missing one), then ordinary ones from line 6."""
    (folder / "rows.csv").write_text(TEXT + rows().to_csv(index=False, header=False))
    return job(folder)


def test_each_row_of_a_csv_file_is_found_with_its_fate(tmp_path: Path) -> None:
    loaded = csv(tmp_path)
    prepared = made(tmp_path, loaded)
    found = trace.trace(prepared, loaded, "2", None)
    assert (found.file, found.line, found.record) == (
        "rows.csv",
        2,
        {"size": "1.5", "note": "two\nlines", "answer": "yes"},
    )
    assert found.side in SPLITS and found.fate.startswith("kept, a ")
    frame = rows()
    encoded = {}
    for split in SPLITS:
        numeric, categorical, _, ids = prepared.rows(split).take(np.arange(len(prepared.rows(split))))
        encoded |= {int(i): (split, n.tolist(), c.tolist()) for i, n, c in zip(ids, numeric, categorical, strict=True)}
    for at in range(len(frame)):
        line = 6 + at
        found = trace.trace(prepared, loaded, f"rows.csv:{line}", None)
        assert float(found.record["size"]) == frame["size"][at] and found.record["answer"] == frame.answer[at]
        if line in encoded:
            assert (found.side, list(found.numeric.values()), list(found.categorical.values())) == encoded[line]
    bad = trace.trace(prepared, loaded, "rows.csv:4", None)
    assert bad.fate == "quarantined: column 'size': no number" and bad.raw == "x"
    empty = trace.trace(prepared, loaded, "rows.csv:5", None)
    assert empty.fate == "left out: a cell is missing (size)"
    assert "rows.csv:5 (row id 5)" in trace.as_text(empty) and "(missing)" in trace.as_text(empty)


def test_each_row_of_a_parquet_file_is_found(tmp_path: Path) -> None:
    rows().to_parquet(tmp_path / "rows.parquet", row_group_size=30)
    loaded = job(tmp_path, "rows.parquet")
    prepared = made(tmp_path, loaded)
    for at in (0, 29, 30, 79):
        found = trace.trace(prepared, loaded, f"rows.parquet:{at + 1}", None)
        assert found.record == rows().iloc[at].to_dict()
        assert found.by_line is False and f"rows.parquet, row {at + 1}" in trace.as_text(found)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_quarantined_row_of_a_parquet_file_is_found_by_its_group(tmp_path: Path, ending: str) -> None:
    bad = [0, 29, 31, 70, 79]
    frame = rows().astype({"size": str})
    frame.loc[bad, "size"] = [f"bad {at}" for at in bad]
    table = pa.Table.from_pandas(frame)
    file = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pq.write_table(table, file, row_group_size=30)
    else:
        with pa.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=30)
    loaded = job(tmp_path, f"rows.{ending}", features={"numeric": ["size"]}, clean={"max_invalid": "20%"})
    prepared = made(tmp_path, loaded)
    found = trace.quarantined(prepared, 20)
    assert [(row["line"] - 1, row["cell"]) for row in found.rows] == [(at, f"bad {at}") for at in bad]
    for row in found.rows:
        if ending == "parquet":
            group = pq.ParquetFile(file).read_row_group(row["row_group"])
        else:
            group = pa.Table.from_batches([pa.ipc.open_file(str(file)).get_batch(row["row_group"])])
        assert group["size"][row["row"]].as_py() == row["cell"]
        shown = trace.trace(prepared, loaded, str(row["row_id"]), None)
        assert shown.fate == "quarantined: column 'size': no number" and shown.record["size"] == row["cell"]
    assert f"rows.{ending}, row 32 (row group 1, row 1 in it), column 'size': no number" in trace.quarantine_text(
        found, 0
    )


FORMATS = ["csv", "csv.gz", "csv.bz2", "csv.zst", "zip", "jsonl", "jsonl.gz", "txt", "arrow", "year=1/rows.csv"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_kept_row_of_every_format_is_found(tmp_path: Path, name: str) -> None:
    frame = rows()
    source, data = write(tmp_path, name, frame)
    loaded = job(tmp_path, source, **data)
    prepared = made(tmp_path, loaded)
    records = []
    for split in SPLITS:
        for row in prepared.rows(split).take(np.arange(len(prepared.rows(split))))[3].tolist():
            found = trace.trace(prepared, loaded, str(row), None)
            assert found.side == split
            assert trace.trace(prepared, loaded, f"{found.file}:{found.line}", None).row_id == row
            records.append((row, found.record))
    assert len(records) == len(frame) == prepared.manifest.account.kept
    records.sort()
    if name == "txt":
        assert [record["text"] for _, record in records] == [f"line {at}" for at in range(len(frame))]
    else:
        assert [float(record["size"]) for _, record in records] == frame["size"].tolist()
        assert [record["note"] for _, record in records] == frame["note"].tolist()


def write(folder: Path, name: str, frame: pd.DataFrame) -> tuple[str, dict[str, Any]]:
    """A file of this name, the source that names it, and what else the job says."""
    texts = {"csv": frame.to_csv(index=False), "jsonl": frame.to_json(orient="records", lines=True)}
    packers = {"gz": gzip.compress, "bz2": bz2.compress, "zst": lambda text: pa.compress(text, "zstd", asbytes=True)}
    path = folder / (name if "/" in name else f"rows.{name}")
    kind, _, packed = name.partition(".")
    if name == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("one.csv", frame[:30].to_csv(index=False))
            archive.writestr("sub/two.csv", frame[30:].to_csv(index=False))
    elif name == "arrow":
        feather.write_feather(frame, path)
    elif name == "txt":
        for answer, some in (("no", range(40)), ("yes", range(40, 80))):
            (folder / "in" / f"answer={answer}").mkdir(parents=True)
            (folder / "in" / f"answer={answer}" / "a.txt").write_text("".join(f"line {at}\n" for at in some))
        return "in", {"features": {"categorical": ["text"]}}
    elif "/" in name:
        path.parent.mkdir()
        path.write_text(texts["csv"])
        return name, {}
    else:
        content = texts[kind].encode()
        path.write_bytes(packers[packed](content) if packed else content)
    return path.name, {}


@pytest.fixture(params=["s3", "https"])
def put(request: pytest.FixtureRequest) -> Iterator[Callable[[str, bytes], str]]:
    """Gives a file to a real server; returns its address."""
    server = request.getfixturevalue("s3_server" if request.param == "s3" else "web")
    if request.param == "https":
        yield server.put
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables.items():
            patch.setenv(name, value)
        remote.system.cache_clear()
        yield lambda name, content: server.write(name, content) or server.address(name)
    remote.system.cache_clear()


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
def test_rows_of_a_server_are_found_as_those_on_disk(
    tmp_path: Path, put: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(csv_read, "RANGE_BYTES", 1_000)

    def written(frame: pd.DataFrame) -> bytes:
        if ending == "parquet":
            frame.to_parquet(tmp_path / "made", row_group_size=30)
            return (tmp_path / "made").read_bytes()
        text = (TEXT + frame.to_csv(index=False, header=False)).encode()
        return gzip.compress(text) if ending.endswith("gz") else text

    content = written(rows())
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / f"show.{ending}").write_bytes(content)
    address = put(f"show.{ending}", content)
    here, there = job(tmp_path / "here", f"show.{ending}"), job(tmp_path / "there", address)
    known, asked = made(tmp_path / "here", here), made(tmp_path / "there", there)
    lines = (1, 30, 31, 80) if ending == "parquet" else (2, 4, 5, 6, 40, 85)
    for line in lines:
        wanted, found = trace.trace(known, here, str(line), None), trace.trace(asked, there, str(line), None)
        assert (found.file, wanted.file) == (address, f"show.{ending}") and found.record
        assert dataclasses.replace(found, file=wanted.file) == wanted
    monkeypatch.chdir(tmp_path / "there")
    shown = CliRunner().invoke(cli.app, ["show", "job.yaml", "--row", f"{address}:{lines[-1]}"])
    assert shown.exit_code == 0 and f"(row id {lines[-1]})" in shown.output, shown.output

    put(f"show.{ending}", written(rows().iloc[::-1]))
    assert "has changed since" in trace.trace(asked, there, str(lines[-1]), None).changed


def test_what_names_no_row(tmp_path: Path) -> None:
    loaded = csv(tmp_path)
    prepared = made(tmp_path, loaded)
    with pytest.raises(UserError, match="there is no such row id"):
        trace.trace(prepared, loaded, str(1 << LINE_BITS), None)
    for name in ("others.csv:2", "csv:2", ":2", "rows.csv", "rows.csv:", "", "-2", " 2", "2.0", "²", "rows.csv:²"):
        with pytest.raises(UserError, match="this does not name one row"):
            trace.trace(prepared, loaded, name, None)
    for name in (f"rows.csv:{1 << LINE_BITS}", f"rows.csv:{'9' * 39}", "9" * 5_000):
        with pytest.raises(UserError, match="this does not name one row"):
            trace.trace(prepared, loaded, name, None)
    with pytest.raises(UserError, match="no record begins there"):
        trace.trace(prepared, loaded, "rows.csv:3", None)
    with pytest.raises(UserError, match="no record begins there"):
        trace.trace(prepared, loaded, "rows.csv:1000", None)


def test_a_source_that_has_changed_is_said_and_a_missing_one_an_error(tmp_path: Path) -> None:
    loaded = csv(tmp_path)
    prepared = made(tmp_path, loaded)
    (tmp_path / "rows.csv").write_text("size,note,answer\n9,z,no\n")
    found = trace.trace(prepared, loaded, "2", None)
    assert found.changed.startswith("the source or the job has changed since it was prepared")
    assert "note: the source or the job has changed" in trace.as_text(found)


def test_the_quarantine_is_counted_and_listed(tmp_path: Path) -> None:
    prepared = made(tmp_path, csv(tmp_path))
    shown = CliRunner().invoke(cli.app, ["quarantine", str(tmp_path / "job.yaml")])
    assert shown.exit_code == 0, shown.output
    assert "1 rows in quarantine; " in shown.output and "1 rows left out for a missing cell" in shown.output
    assert "rows.csv:4, column 'size': no number: 'x'" in shown.output
    copies = pa.table({"row_id": pa.array([9, 10, 11], pa.uint64()), "first_row_id": pa.array([2, 2, 3], pa.uint64())})
    with pa.ipc.new_file(str(prepared.folder / DUPLICATES), copies.schema) as writer:
        writer.write_table(copies)
    listed = {DUPLICATES: storage.checksum(prepared.folder / DUPLICATES)}
    manifest = msgspec.structs.replace(prepared.manifest, set_aside=prepared.manifest.set_aside | listed)
    storage.write_sealed(prepared.folder / MANIFEST, manifest)
    found = json.loads(
        CliRunner().invoke(cli.app, ["quarantine", str(tmp_path / "job.yaml"), "--json", "--limit", "2"]).output
    )
    assert (found["quarantined"], found["duplicates"], len(found["duplicate_rows"])) == (1, 3, 2)
    assert found["duplicate_rows"][0] == {"file": "rows.csv", "line": 9, "first_file": "rows.csv", "first_line": 2}
    assert found["by_reason"] == {"no number": 1} and found["by_column"] == {"size": 1}
    shown = CliRunner().invoke(cli.app, ["quarantine", str(tmp_path / "job.yaml"), "--limit", "0"])
    assert "... and 1 more (--limit)" in shown.output and "... and 3 more duplicates (--limit)" in shown.output


def test_show_prints_a_row_and_names_what_is_not_prepared(tmp_path: Path) -> None:
    made(tmp_path, csv(tmp_path))
    shown = CliRunner().invoke(cli.app, ["show", str(tmp_path / "job.yaml"), "--row", "2", "--json"])
    assert json.loads(shown.output)["record"]["size"] == "1.5"
    shown = CliRunner().invoke(cli.app, ["show", str(tmp_path / "job.yaml"), "--row", "6"])
    assert shown.output.startswith("rows.csv:6 (row id 6)\nkept, a ")
    (tmp_path / "rows.csv").write_text("size,note,answer\n9,z,no\n")
    shown = CliRunner().invoke(cli.app, ["show", str(tmp_path / "job.yaml"), "--row", "6"])
    assert isinstance(shown.exception, UserError) and "the prepared data is not there" in str(shown.exception)


def test_the_leak_test_passes_and_sees_what_is_broken(tmp_path: Path) -> None:
    prepared = made(tmp_path, csv(tmp_path))
    manifest = prepared.manifest
    assert manifest.leak_test is not None and manifest.leak_test.passed
    assert manifest.leak_test == LeakTest(manifest.account.kept, manifest.account.kept, 0, 0, 0)
    sides = {split: prepared.rows(split).take(np.arange(len(prepared.rows(split))))[3] for split in SPLITS}
    ids = np.sort(np.concatenate(list(sides.values())))
    places = np.arange(len(ids))

    def broken(contents: Contents, words: np.ndarray = ids, shards: list[Shard] = manifest.shards) -> LeakTest:
        """`words` say what the rows hold."""
        order = np.argsort(words, kind="stable")
        table = pa.table({"key": words[order] >> np.uint64(1), "rest": words[order]})
        moved = dataclasses.replace(contents, places=np.argsort(order)[: len(contents.row_ids)])
        return leak_test(prepared.folder, shards, len(ids), [lambda: moved], [table])

    assert broken(Contents(ids, places)).passed
    equal = ids.copy()
    train, test = (np.searchsorted(ids, sides[split][0]) for split in ("train", "test"))
    equal[train] = equal[test]
    assert broken(Contents(ids, places), equal) == LeakTest(len(ids), len(ids), 0, 0, 1)
    group = ids.copy()
    assert broken(Contents(ids, places, group=group)).groups_on_two_sides == 0
    group[train] = group[test]
    assert broken(Contents(ids, places, group=group)).groups_on_two_sides == 1
    order = {int(row): number for number, split in enumerate(SPLITS) for row in sides[split]}
    instant = np.array([order[int(row)] for row in ids], float)
    assert broken(Contents(ids, places, instant=instant)).out_of_order == 0
    instant[train] = 5
    found = broken(Contents(ids, places, instant=instant))
    assert found.out_of_order == 1 and not found.passed
    more = np.append(ids, np.uint64(10**6))
    assert broken(Contents(more, places), more).unplaced == 1
    (first,) = prepared.shards("test")
    twice = [*manifest.shards, msgspec.structs.replace(first, split="train")]
    assert broken(Contents(ids, places), shards=twice).row_ids_on_two_sides == first.rows


@given(st.data())
def test_every_content_on_two_sides_is_found_whatever_the_ranges(data: st.DataObject) -> None:
    """Against a count by hand, in ranges of few rows; some rows share a key and are not equal."""
    count = data.draw(st.integers(1, 60))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    content = draw.integers(0, data.draw(st.integers(1, 80)), count).astype(np.uint64)
    side = draw.integers(0, 3, count)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(division, "BUCKET_ROWS", data.draw(st.integers(1, 20)))
        patch.setattr(division, "_EVERY", 1)
        shards = []
        for number, split in enumerate(SPLITS):
            table = pa.table({"row_id": np.flatnonzero(side == number).astype(np.uint64)})
            with pa.ipc.new_file(f"{name}/{split}", table.schema) as writer:
                writer.write_table(table)
            shards.append(Shard(split, split, table.num_rows, 0, ""))
        cuts = [0, *sorted(draw.integers(0, count, 2).tolist()), count]
        parts, tables = [], []
        for low, high in itertools.pairwise(cuts):
            words = content[low:high]
            order = np.argsort(words // 3, kind="stable")
            tables.append(pa.table({"key": words[order] // 3, "rest": words[order]}))
            ids = np.arange(low, high).astype(np.uint64)
            parts.append(functools.partial(Contents, ids, np.argsort(order)))
        found = leak_test(Path(name), shards, count, parts, tables)
    expected = sum(len(set(side[content == each])) - 1 for each in np.unique(content))
    assert found == LeakTest(count, count, 0, 0, expected)


@pytest.mark.parametrize(
    ("sabotage", "words"),
    [
        ("copy", "1 row stands on two sides"),
        ("rename", "1 row of a shard is no kept row"),
        ("repeat", "1 row of a shard is no kept row"),
        ("lose", "1 kept row is in no shard"),
        ("equal", "1 content of rows is on two sides"),
    ],
)
def test_a_preparation_that_leaks_is_told_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sabotage: str, words: str
) -> None:
    """The written shards are spoilt before the leak test reads them, as a mistake of ours would."""
    real = leaks.leak_test

    def spoilt(folder: Path, shards: list[Shard], kept: int, parts: Any, tables: Any) -> LeakTest:
        by_side = {shard.split: folder / shard.file for shard in shards}
        train, test = (pa.ipc.open_file(str(by_side[side])).read_all() for side in ("train", "test"))
        if sabotage in ("copy", "repeat"):
            train = pa.concat_tables([train, (test if sabotage == "copy" else train).slice(0, 1)])
        elif sabotage == "rename":
            foreign = pa.array([1 << LINE_BITS], pa.uint64())
            train = pa.concat_tables([train, test.slice(0, 1).set_column(3, test.schema.field(3), foreign)])
        elif sabotage == "lose":
            train = train.slice(1)
        else:  # a row of the source that equals a test row goes to training
            (contents,) = (part() for part in parts)
            at = dict(zip(contents.row_ids.tolist(), contents.places.tolist(), strict=True))
            equal = pd.DataFrame({name: tables[0][name].to_numpy() for name in ("key", "rest")})
            equal.loc[at[train["row_id"][0].as_py()]] = equal.loc[at[test["row_id"][0].as_py()]]
            order = np.argsort(equal["key"].to_numpy(), kind="stable")
            tables = [pa.Table.from_pandas(equal.iloc[order], preserve_index=False)]
            moved = dataclasses.replace(contents, places=np.argsort(order)[contents.places])
            parts = [lambda: moved]
        with pa.ipc.new_file(str(by_side["train"]), train.schema) as writer:
            writer.write_table(train)
        return real(folder, shards, kept, parts, tables)

    monkeypatch.setattr(leaks, "leak_test", spoilt)
    loaded = csv(tmp_path)
    prepared = made(tmp_path, loaded)
    assert prepared.manifest.leak_test is not None and not prepared.manifest.leak_test.passed
    run = Run(tmp_path / "runs" / "made" / "0123456789ab")
    run.create(loaded, prepared.manifest.fingerprint)
    shown = CliRunner().invoke(cli.app, ["report", str(run.folder)])
    assert shown.exit_code == 0, shown.output
    page = run.report.read_text()
    assert f"✗ Read back from the shards, of {prepared.manifest.account.kept} rows: {words}<" in page
    assert "The leak test failed: what was measured on the test rows can" in page


def test_the_profile_is_of_the_columns_and_in_the_manifest(tmp_path: Path) -> None:
    prepared = made(tmp_path, csv(tmp_path))
    columns = json.loads((prepared.folder / "profile.json").read_bytes())["columns"]
    by_name = {column["name"]: column for column in columns}
    assert [column["role"] for column in columns] == ["numeric", "categorical", "target"]
    assert by_name["size"]["missing"] == 1 and sum(by_name["size"]["histogram"]) == prepared.manifest.account.kept
    profile = prepared.manifest.profile
    assert profile is not None and profile.rows == prepared.manifest.account.train
    assert [each.name for each in profile.numbers] == ["size"]
    assert isinstance(pa.array(profile.numbers[0].edges), pa.DoubleArray)
