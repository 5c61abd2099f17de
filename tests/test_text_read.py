"""JSON Lines, plain text, encodings and compressions, through `raylway prepare`'s own readers, against pandas."""

from __future__ import annotations

import bz2
import gzip
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylway.data import columns, items, opening, sources
from raylway.data.items import Reading
from raylway.errors import UserError
from raylway.job.load import LoadedJob, load_job


def job(folder: Path, source: str, target: str = "y", **data: Any) -> LoadedJob:
    path = folder / "job.yaml"
    path.write_text(json.dumps({"name": "made", "data": {"source": source, "target": target, **data}}))
    return load_job(path)


def texts(loaded: LoadedJob) -> tuple[dict[str, list[str | None]], list[str]]:
    """Every cell of a source of text as text, and the reasons of invalid rows."""
    source = opening.open_source(loaded)
    reading = Reading(source.columns, [], 1 << 16, as_text=source.columns)
    found: dict[str, list[str | None]] = {name: [] for name in source.columns}
    reasons: list[str] = []
    for item in items.grouped(source.parts, 1 << 16):
        for piece in items.read(item, reading):
            for name in source.columns:
                found[name] += piece.table[name].cast(pa.string()).to_pylist()
            reasons += [f"{source.places.of(reject.row_id)}: {reject.reason}" for reject in piece.facts.rejects]
    return found, reasons


PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252"])
def test_csv_in_every_compression_and_encoding_is_what_pandas_reads(tmp_path: Path, packed: str, encoding: str) -> None:
    frame = pd.DataFrame({"name": ["Zoë", "a;b", 'q"q', "two\nlines"] * 60, "n": range(240), "y": ["ja", "nein"] * 120})
    content = frame.to_csv(index=False, sep=";").encode(encoding)
    half = len(content) // 2
    (tmp_path / f"rows.csv{packed}").write_bytes(PACKERS[packed](content[:half]) + PACKERS[packed](content[half:]))
    read = {"encoding": encoding} if encoding == "cp1252" else {}
    found, reasons = texts(job(tmp_path, f"rows.csv{packed}", read=read))
    assert not reasons
    assert found == {name: [str(cell) for cell in frame[name]] for name in frame}


def test_an_encoding_that_does_not_fit_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("näme,y\n1,a\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"data\.read\.encoding: cp1252"):
        texts(job(tmp_path, "rows.csv"))
    with pytest.raises(UserError, match=r"rows\.csv: the file is not utf-16"):
        texts(job(tmp_path, "rows.csv", read={"encoding": "utf-16"}))
    with pytest.raises(UserError, match=r"(?s)no such encoding.*klingon"):
        texts(job(tmp_path, "rows.csv", read={"encoding": "klingon"}))
    (tmp_path / "cut.csv.zst").write_bytes(pa.compress(b"a,y\n" + b"1,2\n" * 9_000, "zstd", asbytes=True)[:-8])
    with pytest.raises(UserError, match=r"cut\.csv\.zst: the compressed file is damaged"):
        texts(job(tmp_path, "cut.csv.zst"))
    (tmp_path / "cut.csv.bz2").write_bytes(bz2.compress(b"a,y\n" + b"1,2\n" * 9_000)[:-30])
    with pytest.raises(UserError, match=r"cut\.csv\.bz2: the compressed file is damaged"):
        texts(job(tmp_path, "cut.csv.bz2"))


def test_a_file_without_a_heading_and_with_any_delimiter(tmp_path: Path) -> None:
    (tmp_path / "rows.dat").write_text("1^a\n2^b\n")
    read = {"format": "csv", "delimiter": "^", "columns": ["n", "y"]}
    assert texts(job(tmp_path, "rows.dat", read=read))[0] == {"n": ["1", "2"], "y": ["a", "b"]}


JSON_CELL = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8),
)


@given(
    st.lists(
        st.fixed_dictionaries({"a": JSON_CELL, "b": st.dictionaries(st.sampled_from("xyz"), JSON_CELL)}), max_size=8
    )
)
@settings(max_examples=60, deadline=None)
def test_json_lines_are_flattened_as_pandas_does(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    folder = tmp_path_factory.mktemp("json")
    rows = [{"a": 1, "b": {"x": 1, "y": 1, "z": 1}}, *rows]
    ascii_only = len(rows) % 2 == 0
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows))
    found, reasons = texts(job(folder, "rows.jsonl", "a"))
    assert not reasons
    for name, column in pd.json_normalize(rows).astype(object).items():
        for cell, expected in zip(found[str(name)], column, strict=True):
            if expected is None or (isinstance(expected, float) and math.isnan(expected)):
                assert cell is None
            elif isinstance(expected, bool):
                assert cell == str(expected).lower()
            elif isinstance(expected, float):
                assert cell is not None
                assert float(cell) == expected
            else:
                assert cell == str(expected)


def test_lines_that_are_no_records_are_invalid_with_their_number(tmp_path: Path) -> None:
    good = '{"n": 1, "y": "a"}\n'
    bad = [
        '{"n": 1',
        "[1]",
        '{"n": [1], "y": "a"}',
        '{"n": 1, "n": 2}',
        '{"a.b": 1, "a": {"b": 2}}',
        '{"n": 1, "z": 2}',
    ]
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.write(good * 100_000 + "\n")  # what follows lies behind the bytes that name the columns
        file.write(good * 140_000 + "\n".join(bad))
    found, reasons = texts(job(tmp_path, "rows.jsonl"))
    assert len(found["n"]) == 240_000
    first = 240_002
    wanted = [
        "no JSON",
        "no JSON object",
        "'n' holds a list",
        "'n' stands twice",
        "'a.b' stands twice",
        "'z' is none of",
    ]
    assert len(reasons) == len(wanted)
    for number, (reason, words) in enumerate(zip(reasons, wanted, strict=True), first):
        assert reason.startswith(f"rows.jsonl:{number}: ")
        assert words in reason
    (tmp_path / "none.jsonl").write_text("1\n2\n")
    with pytest.raises(UserError, match=r"(?s)no line is a JSON object.*no JSON object"):
        texts(job(tmp_path, "none.jsonl"))


def test_text_is_broken_at_line_ends_only(tmp_path: Path) -> None:
    lines = ["one", "two\u2028three", "\u2029", "a\x85b", "v\x0bt", "f\x0cf", "c\x1cd\x1de", "lone\rreturn", "🏳️‍🌈 é"]
    for end in ("\n", "\r\n"):
        (tmp_path / "corpus.txt").write_bytes((end.join(lines) + end).encode())
        assert texts(job(tmp_path, "corpus.txt", "text"))[0] == {"text": lines}


def test_an_archive_holds_one_format(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "both.zip", "w") as archive:
        archive.writestr("a.csv", "n,y\n1,a\n")
        archive.writestr("b.jsonl", '{"n": 1, "y": "a"}\n')
    with pytest.raises(
        UserError, match=r"(?s)both\.zip: the files in the archive must have one format.*a\.csv, b\.jsonl"
    ):
        texts(job(tmp_path, "both.zip"))
    with zipfile.ZipFile(tmp_path / "lines.zip", "w") as archive:
        archive.writestr("readme.txt", "about the rows")
        archive.writestr("a.jsonl", '{"n": 1, "y": "a"}\n')
        archive.writestr("b.jsonl", '{"n": 2, "y": "b", "z": 3}\n')
    found, reasons = texts(job(tmp_path, "lines.zip"))
    assert found == {"n": ["1", "2"], "y": ["a", "b"], "z": [None, "3"]}
    assert not reasons


def test_parquet_files_may_lack_columns_and_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"n": [1, 2], "y": ["a", "b"]}), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"y": ["a", "b"], "m": [0.5, 1.5]}), tmp_path / "in" / "b.parquet")
    source = opening.open_source(job(tmp_path, "in"))
    assert source.columns == ["n", "y", "m"]
    assert source.notes == ["in/b.parquet lacks 'n' and has 'm', which files before it lack: such cells are missing"]
    loaded = job(tmp_path, "in", clean={"missing": "impute"}, split={"validation": "0%", "test": "25%"})
    sample = sources.sample(loaded)
    assert sample.rows == 4
    assert sample.numeric == ["n", "m"]


def test_a_column_of_json_has_the_type_that_all_of_it_says(tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("w") as file:
        for index in range(3_000):
            n: Any = index if index < 2_900 else f"word {index}"
            file.write(json.dumps({"n": n, "big": 10**18 + index, "y": "ab"[index % 2]}) + "\n")
    source = opening.open_source(job(tmp_path, "rows.jsonl"))
    piece = next(items.read(items.grouped(source.parts, 1 << 20)[0], Reading(source.columns, [], 1 << 20)))
    assert piece.facts.seen["n"].bad == 100
    big, _ = columns.final(piece.table["big"].combine_chunks(), "int64", False)
    assert pc.min(big).as_py() == 10**18
    assert pc.max(big).as_py() == 10**18 + 2_999
