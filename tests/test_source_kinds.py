"""What people really have: every packing, encoding, layout and shape of a source, on disk and in buckets."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import job, read
from stores import Bucket

from raylway.data import sources
from raylway.errors import UserError

ROWS = {"a": [1, 2, 3], "b": ["x", "y", "z"], "y": ["p", "q", "p"]}
CSV = b"a,b,y\n1,x,p\n2,y,q\n3,z,p\n"


def wrote(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def found(folder: Path, source: Any, **data: Any) -> dict[str, list[Any]]:
    table, _, rejects, _ = read(folder, source=source, **data)
    assert not rejects
    return table.to_pydict()


def refusal(folder: Path, source: Any, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        sources.sample(job(folder, {"source": source, "target": "y", **data}))
    return str(caught.value)


def parquet(columns: Any, **how: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), sink, **how)
    return sink.getvalue()


def archive(*members: tuple[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as file:
        for name, content in members:
            file.writestr(name, content)
    return sink.getvalue()


PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": lambda content: pa.compress(content, "zstd", asbytes=True) if content else b"",
}


@settings(max_examples=40)
@given(st.sampled_from(list(PACK)), st.lists(st.integers(0, len(CSV)), max_size=5), st.data())
def test_members_are_read_whole_and_damage_is_told(
    tmp_path_factory: pytest.TempPathFactory, packing: str, cuts: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("members")
    edges = [0, *sorted(cuts), len(CSV)]
    members = [PACK[packing](CSV[start:end]) for start, end in itertools.pairwise(edges)]
    name = f"rows.csv.{packing}"
    (folder / name).write_bytes(b"".join(members))
    assert found(folder, name) == ROWS
    (folder / name).write_bytes(b"".join(members) + b"no member")
    assert "the compressed file is damaged" in refusal(folder, name)
    last = max(index for index, member in enumerate(members) if member)
    cut = data.draw(st.integers(1, len(members[last]) - 1))
    (folder / name).write_bytes(b"".join(members[:last]) + members[last][:cut])
    assert "the compressed file is damaged" in refusal(folder, name)


@pytest.mark.parametrize("named", ["auto", "utf-8", "cp1252", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_decides_before_a_name(tmp_path: Path, encoding: str, named: str) -> None:
    (tmp_path / "rows.csv").write_bytes(CSV.decode().replace("x", "é").encode(encoding))
    assert found(tmp_path, "rows.csv", read={"encoding": named}) == {**ROWS, "b": ["é", "y", "z"]}


def test_an_encoding_that_is_not_the_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(CSV.decode().encode("utf-16-be"))
    told = refusal(tmp_path, "rows.csv", read={"encoding": "utf-16"})
    assert "not in the encoding that the job names" in told and "utf-16-be" in told
    assert found(tmp_path, "rows.csv", read={"encoding": "utf-16-be"}) == ROWS


LAYOUTS: dict[str, tuple[list[str], str, int]] = {
    "a folder and what tools leave in it": (
        ["in/a.csv", "in/_SUCCESS", "in/_temporary/0/b.csv", "in/.hidden/b.csv", "in/__MACOSX/._a.csv", "in/b.csv~",
         "in/readme.md", "in/notes.txt", "in/.DS_Store", "in/part.csv.tmp"], "in", 1,
    ),
    "a hidden folder that is named": (["_in/a.csv", "_in/_b.csv"], "_in", 1),
    "a wildcard in a hidden folder": (["_in/a.csv", "_in/_b.csv"], "_in/*.csv", 1),
    "wildcards find no hidden files": (["in/a.csv", "in/_b.csv", "in/d/_t/c.csv", "in/d/e.csv"], "in/**/*.csv", 2),
    "unless they spell them": (["in/a.csv", "in/_b.csv", "in/_c.csv"], "in/_*.csv", 2),
    "names of all kinds": (
        ["in/ä ö/a b.csv", "in/日本.csv", "in/a%20b.csv", "in/[x].csv", "in/q'uo\"te.csv", "in/&#;.csv"], "in", 6,
    ),
    "a name with a space": (["in/ä ö/a b.csv"], "in/ä ö/a b.csv", 1),
    "a name with an escape": (["in/a%20b.csv", "in/a b.csv"], "in/a%20b.csv", 1),
    "a name with a wildcard": (["in/a*b.csv", "in/aXb.csv"], "in/a*b.csv", 1),
    "a name with a set": (["in/[x].csv", "in/x.csv"], "in/[x].csv", 1),
    "partitions": (["in/_p=1/q=/a.csv", "in/_p=2/q=k%20%C3%A9/a.csv"], "in", 2),
    "partitions by a wildcard": (["in/_p=1/a.csv", "in/_p=2/a.csv"], "in/_p=*/a.csv", 2),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_read_alike_on_disk_and_in_buckets(bucket: Bucket, tmp_path: Path, name: str) -> None:
    files, source, count = LAYOUTS[name]
    contents = {file: f"a,y\n{index},p\n".encode() for index, file in enumerate(files)}
    wrote(tmp_path, contents)
    for file, content in contents.items():
        bucket.write(f"{name}/{file}", content)
    here = found(tmp_path, source)
    assert len(here["a"]) == count
    assert found(tmp_path, bucket.address(f"{name}/{source}")) == here
    if "partitions" in name:
        assert here["_p"] == [1, 2]
    assert here.get("q", [None, "k é"]) == [None, "k é"]


def test_empty_files_among_others(bucket: Bucket, tmp_path: Path) -> None:
    empty = {"b.csv": b"", "c.csv": b"\n\n", "d.csv": b"a,b,y\n", "e.csv": b"\xef\xbb\xbf", "f.csv": b"a,b,y"}
    empty |= {"g.csv.gz": b"", "h.csv.gz": gzip.compress(b""), "i.csv.bz2": b"", "j.csv.bz2": bz2.compress(b"")}
    empty |= {"k.csv.zst": b"", "l.zip": archive(("m.csv", b""))}
    wrote(tmp_path / "in", {"a.csv": CSV, **empty})
    for name, content in {"a.csv": CSV, **empty}.items():
        bucket.write(f"empty/{name}", content)
    assert found(tmp_path, "in") == found(tmp_path, bucket.address("empty")) == ROWS


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ({"a": [1, 2]}, {"a": [1.5]}, [1.0, 2.0, 1.5]),
        ({"a": pa.nulls(2)}, {"a": ["x"]}, [None, None, "x"]),
        ({"a": pa.array([1, 2], pa.int8())}, {"a": pa.array([2**40], pa.uint64())}, [1, 2, 2**40]),
        ({"a": pa.array(["k", "l"]).dictionary_encode()}, {"a": pa.array(["k"], pa.large_string())}, ["k", "l", "k"]),
        ({"a": pa.array([True, None])}, {"a": [False]}, [True, None, False]),
        ({}, {"a": ["x"]}, [None, None, "x"]),
        ({"a": [1, 2]}, {"a": ["x"]}, "int64 in in/0.parquet and string in in/1.parquet"),
        ({"a": [True, True]}, {"a": [1]}, "bool in in/0.parquet and int64 in in/1.parquet"),
        ({"a": [[1], [2]]}, {"a": [[3]]}, "has a type that is not read"),
    ],
)
def test_parquet_files_of_mixed_schemas(tmp_path: Path, one: Any, two: Any, expected: Any) -> None:
    wrote(tmp_path, {"in/0.parquet": parquet({**one, "y": ["p", "q"]}), "in/1.parquet": parquet({"y": ["p"], **two})})
    if isinstance(expected, str):
        assert expected in refusal(tmp_path, "in")
    else:
        assert found(tmp_path, "in") == {"a": expected, "y": ["p", "q", "p"]}


NESTED = [
    {"a": {"b": 1, "c": {"d": "x"}}, "y": "p"},
    {"a": None, "y": "q"},
    {"a": {}, "y": "p"},
    {"a": {"c": {"d": "z"}, "b": 2.5}, "y": "q"},
]


def test_nested_objects_are_flattened_as_pandas_does(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\r\n" for row in NESTED))
    wanted = pd.json_normalize(NESTED)
    have = found(tmp_path, "rows.jsonl")
    assert set(have) == {"a.b", "a.c.d", "y"} <= set(wanted)
    for name, cells in have.items():
        assert cells == [None if pd.isna(cell) else cell for cell in wanted[name]]
    table = pa.Table.from_pylist(NESTED)
    (tmp_path / "rows.parquet").write_bytes(parquet(table))
    assert found(tmp_path, "rows.parquet") == have


def test_lists_of_a_dropped_column_tell_rows_apart(tmp_path: Path) -> None:
    lines = ['{"l":[1],"y":"p"}', '{"l":["1"],"y":"p"}', '{"l":[{"k":1}],"y":"q"}', '{"l":[["k",1]],"y":"q"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert len(set(found(tmp_path, "rows.jsonl", features={"drop": ["l"]})["l"])) == 4


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b'[{"a":1,"y":"p"}]', ["no JSON Lines", "rows.jsonl:1", "orient='records'"]),
        ("rows.jsonl", b'\n{\n "a": 1\n}\n', ["no JSON Lines", "rows.jsonl:2", "not JSON"]),
        ("rows.json", b"{}", ["no known format", "data.read.format"]),
        ("rows.zip", archive(("rows.csv.gz", gzip.compress(CSV))), ["holds a packed file", "rows.csv.gz"]),
        ("rows.zip", archive(("rows.csv", CSV))[:-9], ["the archive is damaged"]),
        ("rows.zip", archive(("rows.parquet", b"")), ["holds no data file", "rows.parquet"]),
        ("rows.zip", archive(("a.csv", CSV), ("b.jsonl", b"{}")), ["one format", "a.csv", "b.jsonl"]),
        ("rows.parquet", b"", ["not a whole Parquet file"]),
        ("rows.arrow", b"", ["not a whole Arrow file"]),
        ("a=1/rows.csv", CSV, ["in the file and in the name of its folder"]),
    ],
)
def test_what_is_refused(bucket: Bucket, tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    wrote(tmp_path, {name: content})
    bucket.write(f"refused/{name}", content)
    for source in (name, bucket.address(f"refused/{name}")):
        told = refusal(tmp_path, source)
        assert all(word in told for word in words), told
