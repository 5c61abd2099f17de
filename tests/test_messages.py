"""What a mistake in the job's data section or its files is told by `raylway check`: the place, what was expected, what
was found, and what to do. Through the command line, in this process."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from telling import CSV, ROWS, Made, mine, step, told, written

pytestmark = pytest.mark.usefixtures("own_modules")


def parquet(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


def archive(*names: str, content: str = CSV) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for name in names:
            packed.writestr(name, content)
    return file.getvalue()


def locked(name: str) -> bytes:
    """A zip archive whose entry says that it is encrypted."""
    content = bytearray(archive(name))
    content[content.index(b"PK\1\2") + 8] |= 1
    return bytes(content)


ONE = {"rows.csv": CSV}
TABLE = {"source": "python://made_by_test:f"}
LATE = "size > 3"
NO_ROW = "no row is left to train on: each misses a cell or is invalid"
SOURCES: list[tuple[Made, dict[str, Any], list[str]]] = [
    ({}, {"source": []}, ["job.yaml", "the source names nothing"]),
    ({}, {"source": "row.csv"}, ["job.yaml:1 (data.source): the source is not there", "row.csv"]),
    (ONE, {"source": "row.csv"}, ["the source is not there", "did you mean rows.csv?"]),
    (ONE, {"source": "~nobody_of_this_name/rows.csv"}, ["the source is not there", "~nobody"]),
    ({"rows.csv": os.mkfifo}, {}, ["the source is no ordinary file", "rows.csv", "write what it gives into a file"]),
    ({"d/rows.csv": os.mkfifo}, {"source": "d"}, ["the source is no ordinary file", "d/rows.csv"]),
    (
        {"rows.csv": lambda path: path.symlink_to("rows.csv")},
        {},
        ["the source is a link to nothing", "leads to rows.csv"],
    ),
    (
        {"d/a.csv": CSV, "d/b.csv": lambda path: path.symlink_to("gone.csv")},
        {"source": "d/*.csv"},
        ["a link to nothing", "d/b.csv", "gone.csv"],
    ),
    ({"d/notes.md": "x"}, {"source": "d"}, ["the folder holds no data file", "notes.md", ".parquet"]),
    ({"rows.xml": CSV}, {"source": "rows.xml"}, ["the file is of no known format", "rows.xml", "data.read.format"]),
    ({"d\udcff.csv": CSV}, {"source": "."}, ["(data.source): the name of a file is not UTF-8", "d\\udcff.csv"]),
    ({}, {"source": "x" * 5000}, ["the source can't be looked for", "File name too long"]),
    ({}, {"source": "hdfs://b/c.csv"}, ["hdfs:// is not read", "https://", "copy the files"]),
    ({}, {"source": "s3://me:word@b/c.csv"}, ["the address holds credentials", "a user before @"]),
    ({}, {"source": "pkg://no_such_package/x.csv"}, ["the package 'no_such_package' is not installed", "pip install"]),
    ({}, {"source": "pkg://os/x.csv"}, ["'os' is a module without files", "name a package with files"]),
    (
        {"a.csv": CSV, "b.parquet": parquet(size=[1])},
        {"source": "."},
        ["the files of one source must have one format", "a.csv", "b.parquet"],
    ),
    (
        ONE,
        {"source": {"train": "rows.csv", "test": "rows.csv"}},
        ["a file can't be on two sides of the split", "rows.csv: train, test"],
    ),
    (
        {"a.csv": CSV, "b.csv": "size,sold\n1,yes\n"},
        {"source": "*.csv"},
        ["b.csv: the files of one source must have the same columns", "without colour, day"],
    ),
    (
        {"a=1/rows.csv": "a,sold\n1,yes\n"},
        {"source": "a=1"},
        ["the column 'a' is in the file and in the name of its folder", "rename the folder"],
    ),
    (
        {"a.parquet": parquet(a=[1], sold=["x"]), "b.parquet": parquet(a=["1"], sold=["x"])},
        {"source": "*.parquet"},
        ["the files do not agree on the column 'a'", "int64 in a.parquet", "string in b.parquet"],
    ),
    (
        {"rows.parquet": parquet(a=[True, False] * 9, n=range(18), sold=["x", "y"] * 9)},
        {"source": "rows.parquet", "derive": {"b": "a == true"}},
        ["the feature 'b' derives from 'a', which holds true and false", "found: a == true", "use 'a' itself"],
    ),
    ({"rows.zip": b"PK\3\4"}, {"source": "rows.zip"}, ["rows.zip: the archive is damaged", "copy it again"]),
    ({"rows.zip": locked("a.csv")}, {"source": "rows.zip"}, ["the archive is encrypted", "a.csv"]),
    (
        {"rows.zip": archive("a.csv", "b.csv").replace(b"b.csv", b"a.csv")},
        {"source": "rows.zip"},
        ["rows.zip: two files in the archive have the same name", "a.csv", "pack it anew"],
    ),
    ({"rows.zip": archive("a.csv.gz")}, {"source": "rows.zip"}, ["the archive holds a packed file", "a.csv.gz"]),
    ({"rows.zip": archive("a.md")}, {"source": "rows.zip"}, ["the archive holds no data file", "a.md"]),
    (
        {"rows.csv.gz": gzip.compress(CSV.encode())[:-9]},
        {"source": "rows.csv.gz"},
        ["rows.csv.gz: the compressed file is damaged", "copy it again"],
    ),
    ({"rows.parquet": CSV}, {"source": "rows.parquet"}, ["rows.parquet: the file is not a whole Parquet file"]),
    ({"rows.arrow": CSV}, {"source": "rows.arrow"}, ["rows.arrow: the file is not a whole Arrow file"]),
    (
        {"rows.parquet": parquet(a=[[1]], sold=["x"])},
        {"source": "rows.parquet"},
        ["rows.parquet: the column 'a' has a type that is not read", "list<", "features.drop"],
    ),
    ({"rows.csv": ""}, {}, ["the source has no rows", "rows.csv"]),
    ({"rows.csv": "size,sold\n"}, {}, ["the source has no rows", "rows below the heading"]),
    ({"rows.jsonl": "\n"}, {"source": "rows.jsonl"}, ["the source has no rows", "a JSON object in a line"]),
    (
        {"rows.jsonl": CSV},
        {"source": "rows.jsonl"},
        ["rows.jsonl:1: the file is no JSON Lines", "on each line one object"],
    ),
    ({}, {"source": "python://no_such_module:rows"}, ["there is no such Python module", "python://my_data:rows"]),
    ({}, {"source": "python://sys:exit"}, ["there is no such Python module", "python://sys:exit"]),
    (mine("pass"), {"source": "python://made_by_test:g"}, ["has no function 'g'", "it has f"]),
    (mine("exit(3)"), TABLE, ["made_by_test.py:4, in f: python://made_by_test:f failed: SystemExit: 3"]),
    (mine("return 1 / 0"), TABLE, ["made_by_test.py:4, in f", "failed: ZeroDivisionError", "correct the function"]),
    (mine("return [1]"), TABLE, ["python://made_by_test:f returned no table", "a value of type list"]),
    (mine("return {'a': [1], 'b': []}"), TABLE, ["the table that python://made_by_test:f returned can't be used: "]),
]
TEXTS: list[tuple[str | bytes, dict[str, Any], list[str]]] = [
    ('"a,sold\n1,x\n', {}, ["rows.csv:1: the heading does not end", "close its quotes"]),
    ("größe,sold\n1,x\n".encode("latin-1"), {}, ["rows.csv:1: the file is not text in its encoding", "0xf6", "cp1252"]),
    ("a,s\0old\n1,x\n", {}, ["rows.csv:1: the file is not text in its encoding", "a NUL character", "utf-16-le"]),
    (CSV, {"read": {"encoding": "utf-16"}}, ["the file is not in the encoding that the job names", "utf-16-le"]),
    (CSV, {"read": {"encoding": "klingon"}}, ["(data.read.encoding): there is no such encoding", "'klingon'"]),
    (CSV, {"read": {"encoding": "a\0b"}}, ["there is no such encoding"]),
    (CSV, {"read": {"delimiter": "€"}}, ["(data.read.delimiter): this can't be a delimiter", "'€'"]),
    (CSV, {"read": {"delimiter": ";"}}, ["there is no column 'sold'", "correct data.read.delimiter"]),
    (CSV, {"read": {"columns": list(ROWS)}}, ["the file has a heading, which would become a row", "data.read.columns"]),
    ("a,,sold\n1,2,x\n", {}, ["rows.csv:1: column 2 has no name", "'a', '', 'sold'"]),
    ("a,a,sold\n1,2,x\n", {}, ["rows.csv:1: two columns have the same name", "'a'"]),
    (CSV, {"read": {"columns": ["a", "a"]}}, ["(data.read.columns): two columns have the same name"]),
    (CSV + '"7,red\n', {}, ["rows.csv:62: a quoted cell never closes", "data.read.quote: none"]),
    (CSV + "7\n", {}, ["rows.csv:62: too few cells: 1 where the heading has 4", "max_invalid: 1.7%"]),
    (CSV, {"features": {"numeric": ["colour"]}}, ["rows.csv:2: column 'colour': no ", "out of data.features.numeric"]),
    (CSV + "inf,red,yes,2013-01-01\n", {}, ["rows.csv:62: the column 'size' holds an infinite number", "'inf'"]),
    ("a,sold\n1,\n2,\n", {}, [f"(data.target): {NO_ROW}", "choose a target"]),
    ("a,b,sold\n1,,x\n,2,y\n", {}, [f"(data.source): {NO_ROW}", "a (1), b (1)", "missing: impute"]),
    ("a,sold\n1,x\n2,x\n", {}, ["the target 'sold' has a single class", "'x' in each row that is complete, 2 in all"]),
    (
        "a,sold\n1,x\n2,x\n3,y\n3,y\n",
        {},
        [
            "a class of the target 'sold' has too few rows for a stratified split",
            "'y' (1 row); 1 rows that equal others do not count",
        ],
    ),
]
DATA: list[tuple[dict[str, Any], list[str]]] = [
    ({"target": "sodl"}, ["(data.target): there is no column 'sodl'", "did you mean 'sold'?"]),
    ({"target": "so\nld\x1b[2J"}, ["there is no column 'so\\nld\\x1b[2J'", "found: so\\nld\\x1b[2J\n"]),
    ({"derive": {" ": LATE}}, ["(data.derive): a derived column has no name"]),
    ({"derive": {"size": "1"}}, ["(data.derive.size): the derived column 'size' is a column of the source already"]),
    ({"derive": {"a": "b", "b": "a"}}, ["derived columns read each other in a circle", "a, b"]),
    ({"derive": {"a": "size +"}}, ["(data.derive.a): the expression 'size +' can't be read"]),
    ({"derive": {"a": "size ** 2"}}, ["the expression 'size ** 2' holds 'size ** 2', which is not allowed"]),
    ({"derive": {"a": "1e999"}}, ["the expression '1e999' holds a number that is too large"]),
    ({"derive": {"a": "-" * 5000 + "size"}}, ["is nested too deeply", "-...'"]),
    ({"derive": {"a": "colour + 1"}}, ["does not fit the types of its columns (colour is string): text is no number"]),
    ({"derive": {"a": "'x' + 1"}}, ["does not fit its constants: text is no number"]),
    ({"features": {"categorical": ["sold"]}}, ["(data.features.categorical): the feature 'sold' is the target"]),
    (
        {"target": "late", "derive": {"late": LATE}, "features": {"numeric": ["size"]}},
        ["the feature 'size' gives the target 'late' away"],
    ),
    ({"features": {"date": ["size"]}}, ["the column 'size' does not hold dates", "out of data.features.date"]),
    ({"features": {"drop": ["size", "colour", "day"]}}, ["(data.features): no column is left to be a feature"]),
    ({"task": "regression"}, ["the target 'sold' is text, which regression can't predict", "rows.csv:2: 'yes'"]),
    (
        {"transform": {"columns": {"colour": {"scale": "log"}}}},
        ["scale means nothing for the column 'colour', which is a category", "data.features.numeric"],
    ),
    *(
        (
            {"transform": {"columns": {column: {"impute": how}}}, "clean": {"missing": "impute"}},
            [f"{column}.impute): this can't stand in for a missing cell of the column '{column}', which is ", words],
        )
        for column, how, words in (
            ("day", 3, "mean, median, most_frequent or a date such as 2013-01-31"),
            ("day", "2013-02-30", "found: 2013-02-30"),
            ("size", "none", "which is numeric\n  expected: mean, median, most_frequent or a number"),
            ("colour", "mean", "most_frequent, or a category that is none of these words"),
        )
    ),
    ({"target": "size", "split": {"by": "stratified"}}, ["(data.split.by): a stratified split needs classes"]),
    (
        {"split": {"by": "group", "column": "sold"}},
        ["(data.split): too few groups to divide into training, validation and test rows", "2 different groups"],
    ),
    ({"split": {"by": "column", "column": "colour"}}, ["rows.csv:2: column 'colour': none of train, validation and"]),
    ({"split": {"by": "time", "column": "colour"}}, ["rows.csv:2: column 'colour': no number, date or time", "'red'"]),
    (
        {"split": {"by": "time", "column": "day", "at": {"test": "soon"}}},
        ["(data.split.at.test): 'soon' is no place in the column 'day'", "the column holds text"],
    ),
    (
        {"split": {"by": "time", "column": "day", "at": {"validation": "2013-01-20", "test": "2013-01-10"}}},
        ["(data.split.at.validation): the validation rows begin after the test rows", "'2013-01-10'", "swap them"],
    ),
    (
        {"split": {"by": "time", "column": "day", "at": {"test": "2000-01-01"}}},
        [
            "no row is left to train on: the source gives all rows to the other sides of the split",
            "rows before '2000-01-01'",
            "data.split.at",
        ],
    ),
]
STEPS: list[tuple[Made, str, list[str]]] = [
    ({}, "made_by_test:f()", ["'made_by_test:f()' names no columns", "module:function(column, column)"]),
    ({}, "made_by_test:f(1)", ["'made_by_test:f(1)' can't be read", "put constants into the function"]),
    ({}, "no_such_module:f(size)", ["there is no module 'no_such_module'", "write no_such_module.py"]),
    (mine("pass"), "made_by_test:g(size)", ["the module 'made_by_test' has no function 'g'", "made_by_test.py"]),
    (mine("return 1 / 0"), "", ["made_by_test.py:4 (f): your function raised ZeroDivisionError", "return 1 / 0"]),
    (mine("exit(3)"), "", ["made_by_test.py:4 (f): your function raised SystemExit: 3"]),
    ({"made_by_test.py": "exit(4)"}, "", ["made_by_test.py:1 (<module>): your function raised SystemExit: 4"]),
    (mine("return [1]"), "", ["the function of 'made_by_test:f(size)' returns what is no column", "builtins.list"]),
    (mine("return np.array(['\\ud800'] * len(t[0]))"), "", ["returns what is no column", "surrogate"]),
    (mine("return t[0]['size'].slice(1)"), "", ["returns what is no column", "59 values for 60 rows"]),
    (mine("return np.random.rand(len(t[0]))"), "", ["does not compute each row by itself", "among 60 rows"]),
]
JOBS: list[tuple[str | bytes, list[str]]] = [
    ("- a", ["job.yaml:1: a job file is a mapping of keys"]),
    (b"name: \xff", ["job.yaml: the job file can't be read", "UTF-8"]),
    ("name: a\nname: b\n", ["job.yaml:2: this is not YAML: found duplicate key", "name: b"]),
    ("a: \0", ["job.yaml: this is not YAML: unacceptable character"]),
    ("a: " + "[" * 300 + "]" * 300, ["the text is nested too deeply"]),
    ("&a {name: x, data: *a}", ["the text is nested too deeply", "an anchor (&) that holds its own alias"]),
]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    def check(made: Made, data: dict[str, Any]) -> str:
        written(tmp_path, made)
        top = {"task": data["task"]} if "task" in data else {}
        data = {"source": "rows.csv", "target": "sold"} | {key: value for key, value in data.items() if key != "task"}
        written(tmp_path, {"job.yaml": json.dumps({"name": "made", "data": data} | top)})
        return told(monkeypatch, capsys, tmp_path, "check", "job.yaml")

    return check


@pytest.mark.parametrize(("made", "data", "words"), SOURCES)
def test_sources(check: Callable[..., str], made: Made, data: dict[str, Any], words: list[str]) -> None:
    shown = check(made, data)
    assert all(word in shown for word in words), shown


@pytest.mark.parametrize(("text", "data", "words"), TEXTS)
def test_text_and_rows(check: Callable[..., str], text: str | bytes, data: dict[str, Any], words: list[str]) -> None:
    shown = check({"rows.csv": text}, data)
    assert all(word in shown for word in words), shown


@pytest.mark.parametrize(("data", "words"), DATA)
def test_keys_of_the_data_section(check: Callable[..., str], data: dict[str, Any], words: list[str]) -> None:
    shown = check(ONE, data)
    assert all(word in shown for word in words), shown


@pytest.mark.parametrize(("made", "call", "words"), STEPS)
def test_functions_for_derived_columns(check: Callable[..., str], made: Made, call: str, words: list[str]) -> None:
    shown = check(ONE | made, step(call or "made_by_test:f(size)"))
    assert all(word in shown for word in words), shown


@pytest.mark.parametrize(("text", "words"), JOBS)
def test_job_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, text: str | bytes, words: list[str]
) -> None:
    written(tmp_path, {"job.yaml": text})
    shown = told(monkeypatch, capsys, tmp_path, "check", "job.yaml")
    assert all(word in shown for word in words), shown
