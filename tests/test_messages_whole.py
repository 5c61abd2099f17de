"""What is told of the data as a whole, of files that change, of a full disk, and by the other commands; and that every
message of these rooms is printed by a test."""

from __future__ import annotations

import ast
import gzip
import random
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made import made
from made_prepared import make, make_run
from preparing import prepared
from telling import CSV, ROWS, mine, step, told, written

from raylway import cli
from raylway.data import csv_read, engine, files, trace
from raylway.errors import RunFailed, UserError
from raylway.features.prepared import DUPLICATES, MANIFEST, PROFILE, QUARANTINE, SPLITS, Prepared
from raylway.job.load import load_job
from raylway.runs.run import Run

pytestmark = pytest.mark.usefixtures("own_modules")
TESTS = Path(__file__).parent
ROOMS = ("data", "features", "predict", "job")
UNSAID = 5
"""Calls without a text of their own: an error that is told again, or gets its place, or a reason of the quarantine, or
what pydantic says of keys."""


def refused(folder: Path, data: dict[str, Any], **top: Any) -> str:
    """What preparing says that is refused."""
    with pytest.raises(UserError) as caught:
        prepared(folder, {"source": "rows.csv", "target": "sold"} | data, **top)
    shown = str(caught.value)
    assert all(f"\n  {label}: " in shown for label in ("expected", "found", "fix")), shown
    return shown


FITTED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "numbers too large": (
        {"big": [1e200, 2e200, -1e200, 3e200] * 9, "n": range(36), "sold": ["x", "y"] * 18},
        {},
        ["(data.features): the numbers of column 'big' are too large to be standardised", "-1e+200 to 3e+200"],
    ),
    "a target too large": (
        {"n": range(36), "sold": [row * 1e200 for row in range(36)]},
        {},
        ["(data.target): the numbers of column 'sold' are too large", "predict a smaller number"],
    ),
    "one-hot": (
        {"name": [f"n{row // 2}" for row in range(10_000)], "n": range(10_000), "sold": ["x", "y"] * 5000},
        {"transform": {"columns": {"name": {"categories": "one_hot"}}}, "features": {"categorical": ["name"]}},
        ["(data.transform.columns.name.categories): the column 'name' has too many categories for one-hot", "4,096"],
    ),
    "most frequent": (
        {"n": [None, *np.arange(99_999) / 4], "m": range(100_000), "sold": ["x", "y"] * 50_000},
        {"transform": {"impute": "most_frequent"}, "clean": {"missing": "impute"}},
        ["(data.transform.columns.n.impute): no number of the column 'n' stands out as its most frequent one"],
    ),
}


@pytest.mark.parametrize("name", FITTED)
def test_what_only_the_whole_data_tells(tmp_path: Path, name: str) -> None:
    columns, data, words = FITTED[name]
    pd.DataFrame(columns).to_csv(tmp_path / "rows.csv", index=False)
    shown = refused(tmp_path, data)
    assert all(word in shown for word in words), shown


def test_a_derived_column_of_two_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "return t[0]['n'] if t[0]['n'][0].as_py() < 99 else pa.array(['x'] * len(t[0]))"
    written(tmp_path, mine(line))
    for name, start, more in (("a", 0, {}), ("b", 100, {"more": [1] * 40})):
        columns = {"n": range(start, start + 40), "sold": ["x", "y"] * 20} | more
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    data = {"source": "*.parquet", "derive": {"z": "made_by_test:f(n)"}, "clean": {"missing": "impute"}}
    shown = refused(tmp_path, data)
    assert "(data.derive.z): the derived column 'z' has no one type" in shown and "float64 and string" in shown


@pytest.mark.parametrize("change", ["f.write('1,red,yes,2013-01-01\\n')", "__import__('os').unlink(path)"])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, form: str
) -> None:
    """The user's own function changes it: in the middle of the preparation."""
    path = tmp_path / f"rows.{form}"
    frame = pd.concat([ROWS.assign(n=number) for number in range(200)])
    if form == "parquet":
        frame.to_parquet(path, row_group_size=500)
    else:
        frame.to_csv(path, index=False)
    monkeypatch.setattr(csv_read, "RANGE_BYTES", 10_000)
    monkeypatch.setattr(engine, "FEW", engine.ALL)
    body = f"path = {str(path)!r}\ndef f(t):\n    with open(path, 'a') as f:\n        {change}\n    return t['size']\n"
    written(tmp_path, {"made_by_test.py": body})
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, {"source": path.name, "target": "sold"} | step())
    assert f"rows.{form}: the file was changed or removed while it was read" in str(caught.value)


def test_a_packed_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    written(tmp_path, {"rows.csv.gz": gzip.compress(CSV.encode())})
    [location] = files.find(["rows.csv.gz"], [tmp_path], "data.source")
    heading = csv_read.heading(location)
    assert heading is not None
    rows = csv_read.read_stream(location, heading, 200)
    next(rows)
    with (tmp_path / "rows.csv.gz").open("ab") as file:
        file.write(gzip.compress(b"1,red,yes,2013-01-01\n"))
    with pytest.raises(UserError, match="the file was changed or removed while it was read"):
        list(rows)


def test_a_disk_without_room(tmp_path: Path) -> None:
    written(tmp_path, {"rows.csv": CSV * 200})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        shown = refused(tmp_path, {"clean": {"max_invalid": "50%", "duplicates": "keep"}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the storage folder can't be written" in shown and "File too large" in shown
    assert not list((tmp_path / "runs").rglob("*.arrow"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a bundle, and a prepared job."""
    folder = tmp_path_factory.mktemp("messages")
    table = pa.table({"length": np.arange(60.0), "colour": ["red", "green"] * 30, "ripe": ["no", "yes"] * 30})
    found = make_run(folder, make(folder / "prepared", dict.fromkeys(SPLITS, table), "ripe"))
    made(table, "ripe", {"length": "number", "colour": "category"}, steps=1).stage(found.bundle)
    written(folder, {"rows.csv": CSV, "new.csv": "length,colour\n1,red\n", "less.csv": "length,color\n1,red\n"})
    written(folder, {"empty.csv": "", "none.csv": "length,colour\n", "job.xml": "", "taken/x": ""})
    (folder / "run").symlink_to(found.folder)
    prepared(folder, {"source": "rows.csv", "target": "sold"})
    return folder


PREDICT = ("predict", "run", "new.csv")
COMMANDS: list[tuple[tuple[str, ...], list[str]]] = [
    (("check", "jobs.yaml"), ["jobs.yaml: no such job file", "did you mean job.yaml?"]),
    (("check", "taken"), ["taken: the job file can't be read", "Is a directory"]),
    (("check", "job.yaml", "--set", "seed"), ["--set: --set takes key=value", "found: seed"]),
    (("check", "job.yaml", "--set", "seed=["), ["--set seed=[: this is not YAML: "]),
    (("check", "job.yaml", "--set", "seed=&a [*a]"), ["--set seed=&a [*a]: the text is nested too deeply"]),
    (
        ("prepare", "job.yaml", "--set", "storage=rows.csv"),
        ["storage: the storage folder can't be written", "rows.csv"],
    ),
    (("prepare", "job.yaml", "--set", 'storage="a\\0b"'), ["the storage folder can't be written", "null"]),
    (
        ("prepare", "job.yaml", "--set", "storage=http://b/c"),
        ["storage: it must be a folder or a bucket", "http://b/c"],
    ),
    (
        ("predict", "run", "less.csv"),
        ["less.csv: the file lacks the column 'colour'", "rename 'color' to 'colour'"],
    ),
    (("predict", "run", "empty.csv"), ["empty.csv: the file is empty", "name a file with rows"]),
    (("predict", "run", "job.xml"), ["job.xml (data.source): the file is of no known format"]),
    ((*PREDICT, "--format", "xml"), ["--format: answers can't be written in this format", "csv or jsonl or parquet"]),
    ((*PREDICT, "-o", "a.xml"), ["--output a.xml: answers can't be written in this format", "found: .xml"]),
    (
        (*PREDICT, "-o", "http://a/b.csv"),
        ["--output http://a/b.csv: answers can't be written there", "s3://bucket/path"],
    ),
    ((*PREDICT, "-o", "taken/"), ["taken: the folder is there already", "name another one"]),
    ((*PREDICT, "-o", "rows.csv/x.csv"), ["rows.csv/x.csv: the answers can't be written", "name another place"]),
    ((*PREDICT, "-o", "/proc/x.csv"), ["/proc/x.csv: the answers can't be written"]),
    (("drift", "run", "new.csv"), ["the bundle has no profile of its training rows", "run the job again"]),
    (("show", "job.yaml", "--row", str(1 << 50)), ["there is no such row id", "name the row as file:line"]),
    (("show", "job.yaml", "--row", "rows.csv:²"), ["rows.csv:²: this does not name one row", "such as rows.csv:2"]),
    (("show", "job.yaml", "--row", "rows.csv:" + "9" * 30), ["this does not name one row"]),
    (("show", "job.yaml", "--row", "rows.csv:900"), ["rows.csv:900: no record begins there"]),
]


@pytest.mark.parametrize(("arguments", "words"), COMMANDS)
def test_commands(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: tuple[str, ...],
    words: list[str],
) -> None:
    shown = told(monkeypatch, capsys, run, *arguments)
    assert all(word in shown for word in words), shown


def test_a_row_whose_prepared_data_or_source_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    names = ("a/rows.csv", "b/rows.csv")
    written(tmp_path, {name: ROWS.assign(n=name).to_csv(index=False) for name in names})
    done = prepared(tmp_path, {"source": "*/rows.csv", "target": "sold"})
    shown = told(monkeypatch, capsys, tmp_path, "show", "job.yaml", "--row", "rows.csv:2")
    assert "rows.csv:2: more than one file is called so" in shown and "a/rows.csv, b/rows.csv" in shown
    with pytest.raises(UserError, match=r"a/rows.csv: the source of this row is gone"):
        (tmp_path / "a" / "rows.csv").unlink()
        trace.trace(done, load_job(tmp_path / "job.yaml"), "a/rows.csv:2", None)
    shown = told(monkeypatch, capsys, tmp_path, "quarantine", "job.yaml")
    assert "the prepared data is not there" in shown


def flipped(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Prepared, Run]:
    """A folder with a run whose data has rows of every fate: of lines 2 (kept), 62 (quarantined) and 63 (repeated)."""
    folder = tmp_path_factory.mktemp("whole")
    written(folder, {"rows.csv": CSV + "no number,red,yes,2013-01-01\n" + CSV.splitlines()[1] + "\n"})
    done = prepared(folder, {"source": "rows.csv", "target": "sold", "clean": {"max_invalid": "5%"}})
    found = Run(folder / "runs" / "made" / "0123456789ab")
    found.create(load_job(folder / "job.yaml"), done.manifest.fingerprint)
    table = pa.table({"size": np.arange(60.0), "sold": ["no", "yes"] * 30})
    made(table, "sold", {"size": "number"}, steps=1).stage(found.bundle)
    return folder, done, found


KEPT, INVALID, REPEATED = (("show", "made", "--row", f"rows.csv:{line}") for line in (2, 62, 63))
READ_BY = [
    (MANIFEST, [("report", "made"), ("quarantine", "made"), KEPT]),
    (PROFILE, [("report", "made"), KEPT]),
    (QUARANTINE, [("report", "made"), ("quarantine", "made"), INVALID]),
    (DUPLICATES, [("quarantine", "made"), REPEATED]),
    ("bundle.json", [("drift", "made", "rows.csv")]),
    ("shard", [KEPT]),
]


@pytest.mark.parametrize(("name", "commands"), READ_BY)
def test_every_damage_of_a_file_is_told(
    whole: tuple[Path, Prepared, Run],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    name: str,
    commands: list[tuple[str, ...]],
) -> None:
    folder, done, found = whole
    sides = [shard.file for split in SPLITS for shard in done.shards(split)]
    [holds] = [
        file for file in sides if 2 in pa.ipc.open_file(str(done.folder / file)).read_all()["row_id"].to_pylist()
    ]
    path = found.bundle / name if name == "bundle.json" else done.folder / (holds if name == "shard" else name)
    content, draw = path.read_bytes(), random.Random(name)
    cut = [content[: len(content) // 2], content[:-1], b""]
    for command in commands:
        for damaged in [*cut, *(flipped(content, draw) for _ in range(6)), None]:
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            shown = told(monkeypatch, capsys, folder, *command)
            assert str(path.relative_to(folder)) in shown or damaged is None
            words = ["the prepared data is damaged", "damaged or of another version", "another format", "damaged"]
            words += ["is not there", "is gone", "no such run"] * (damaged is None)
            assert any(each in shown for each in words), shown
            path.write_bytes(content)
        monkeypatch.setattr(sys, "argv", ["raylway", *command])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0 or name == "bundle.json"  # that has no profile


def test_a_shard_that_is_damaged(tmp_path: Path) -> None:
    written(tmp_path, {"rows.csv": CSV})
    done = prepared(tmp_path, {"source": "rows.csv", "target": "sold"})
    [shard] = done.shards("train")
    path = done.folder / shard.file
    path.write_bytes(flipped(path.read_bytes(), random.Random(4)))
    with pytest.raises(RunFailed, match=r"the shard is damaged; remove .* and run the job again"):
        done.rows("train", verify=True).take(np.array([0]))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunFailed, match=r"the shard is missing or damaged; remove .* and run the job again"):
        done.rows("train").take(np.array([0]))


def _calls() -> list[tuple[str, ast.Call]]:
    """Where the rooms build a message."""
    package = TESTS.parent / "platform" / "raylway"
    paths = [path for room in ROOMS for path in sorted((package / room).glob("*.py"))]
    return [
        (f"{path.relative_to(package)}:{node.lineno}", node)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("UserError", "RunFailed")
    ]


def _texts(node: ast.AST) -> list[str]:
    """The constant text of an expression, the longest piece of each alternative."""
    match node:
        case ast.IfExp():
            return _texts(node.body) + _texts(node.orelse)
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr():
            pieces = [text for part in node.values for text in _texts(part)]
            return [max(pieces, key=len).strip(" :,;")] if pieces else []
    return []


def test_every_message_is_expected_by_a_test() -> None:
    """Its own words stand in a test. Like the words themselves it is no proof that they are printed, but a message that
    nobody has seen has none."""
    expected = "\n".join(
        node.value
        for path in TESTS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    calls = [(where, _texts(node.args[0])) for where, node in _calls()]
    unseen = [f"{where}: {text}" for where, texts in calls for text in texts if text not in expected]
    assert not unseen, "\n".join(unseen)
    assert sum(not texts for _, texts in calls) == UNSAID


def test_every_message_has_its_parts() -> None:
    lacking = {}
    for where, node in _calls():
        missing = {"where", "expected", "found", "fix"} - {each.arg for each in node.keywords}
        if isinstance(node.func, ast.Name) and node.func.id == "UserError" and _texts(node.args[0]) and missing:
            lacking[where] = missing
    assert not lacking
