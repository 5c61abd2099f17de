"""Files of every format: what pandas writes is read back equal, and what is wrong with a file is told."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import zipfile
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from preparing import read

from raylway.data import sources
from raylway.errors import UserError
from raylway.job.load import load_job


def job(folder: Path, **data: Any):
    path = folder / "job.yaml"
    path.write_text(json.dumps({"name": "made", "data": {"target": "y", **data}}))
    return load_job(path)


def refusal(folder: Path, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        sources.sample(job(folder, **data))
    return str(caught.value)


WORDS = st.text(st.characters(exclude_categories=("Cs",)), max_size=8).map(lambda text: f"t{text}")
"""Texts that no format takes for a number or a missing cell."""
TEXTS = WORDS | st.sampled_from(["1", "007", "1.0", "NA", "null", "true", " ", "2013-01-01", "1e5", "\0", "\r\n"])
"""Texts as a format with types tells them apart from anything else."""
MOMENTS = st.datetimes(datetime(1990, 1, 1), datetime(2260, 1, 1))
COLUMNS: dict[str, tuple[st.SearchStrategy[Any], str]] = {
    "whole": (st.integers(-(2**63), 2**63 - 1), "Int64"),
    "small": (st.integers(-128, 127), "Int8"),
    "unsigned": (st.integers(0, 2**64 - 1), "UInt64"),
    "real": (st.floats(allow_nan=False), "float64"),
    "single": (st.floats(allow_nan=False, width=32), "float32"),
    "truth": (st.booleans(), "boolean"),
    "word": (WORDS, "str"),
    "kind": (WORDS, "category"),
    "day": (st.dates(date(1, 1, 1), date(9999, 12, 31)), "object"),
    "moment": (MOMENTS, "datetime64[us]"),
    "instant": (MOMENTS.map(lambda moment: moment.replace(tzinfo=UTC)), "datetime64[us, Asia/Kathmandu]"),
}
"""A name, its values and the type that pandas holds them in. Any cell may be missing."""


@st.composite
def frames(draw, **more: tuple[st.SearchStrategy[Any], str]) -> pd.DataFrame:
    rows = draw(st.integers(1, 12))
    columns = {
        name: pd.Series(draw(st.lists(st.none() | values, min_size=rows, max_size=rows)), dtype=kind)
        for name, (values, kind) in (COLUMNS | more).items()
    }
    order = draw(st.permutations(list(columns)))
    classes = draw(st.lists(st.sampled_from("ab"), min_size=rows, max_size=rows))
    return pd.DataFrame({name: columns[name] for name in order} | {"y": pd.Series(classes, dtype="str")})


def equal(found: pa.Table, wanted: pd.DataFrame) -> None:
    """Every cell is what pandas wrote: numbers to the last bit, texts by character, times by the instant."""
    assert found.num_rows == len(wanted)
    for name in wanted.columns:
        cells = found[name].to_pylist()
        values = [None if pd.isna(value) else value for value in wanted[name].tolist()]
        assert [cell is None for cell in cells] == [value is None for value in values], name
        if name in ("moment", "instant"):
            cells, values = ([value and _instant(value) for value in each] for each in (cells, values))
        elif name == "unsigned":  # one that does not fit 64 bits with a sign makes the column text
            cells = [cell if cell is None else int(cell) for cell in cells]
        elif name == "truth":
            cells, values = ([cell if cell is None else str(cell).lower() for cell in each] for each in (cells, values))
        elif name == "amount":
            values = [value if value is None else float(value) for value in values]
        elif name == "day":
            values = [value if value is None else value.isoformat() for value in values]
        assert cells == values, name


def _instant(value: Any) -> pd.Timestamp:
    moment = pd.Timestamp(value)
    return moment if moment.tzinfo else moment.tz_localize(UTC)


def packed(content: bytes, how: str, name: str) -> bytes:
    half = len(content) // 2
    if how == ".gz":
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    if how == ".bz2":
        return bz2.compress(content[:half]) + bz2.compress(content[half:])
    if how == ".zst":
        return b"".join(pa.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:]))
    if how == ".zip":
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content)
        return sink.getvalue()
    return content


PACKINGS = st.sampled_from(["", ".gz", ".bz2", ".zst", ".zip"])


@settings(max_examples=40)
@given(
    frames(),
    st.tuples(
        st.sampled_from(",;\t|:^ "), st.sampled_from("\"'"), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
    ),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "gb18030"]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([".csv", ".tsv"]),
    PACKINGS,
)
def test_csv_is_read_back(tmp_path_factory, frame, dialect, encoding, end, ending, packing):
    delimiter, quote, quoting = dialect
    folder = tmp_path_factory.mktemp("csv")
    how: dict[str, Any] = {"quote": quote} if quote != '"' else {}
    if ending == ".tsv":
        delimiter = "\t"
    elif delimiter in ":^ ":  # which are not found out
        how["delimiter"] = delimiter
    text = frame.to_csv(
        index=False,
        sep=delimiter,
        quotechar=quote,
        quoting=quoting,
        lineterminator=end,
        float_format=lambda value: repr(float(value)),
    )
    try:
        content = text.encode(encoding)
    except UnicodeEncodeError:
        content, encoding = text.encode(), "utf-8"
    name = f"rows{ending}"
    (folder / f"{name}{packing}").write_bytes(packed(content, packing, name))
    if encoding in ("cp1252", "gb18030"):
        how["encoding"] = encoding
    for step in (1 << 20, 60):
        found, _, rejects, _ = read(folder, step, source=f"{name}{packing}", read=how)
        assert not rejects
        equal(found, frame)


@settings(max_examples=20)
@given(frames(), st.sampled_from(["gzip", "bz2", "zstd", "zip", None]))
def test_files_that_pandas_packs_itself_are_read_back(tmp_path_factory, frame, packing):
    folder = tmp_path_factory.mktemp("packed")
    ending = {"gzip": ".gz", "bz2": ".bz2", "zstd": ".zst", "zip": ".zip", None: ""}[packing]
    frame = frame.drop(columns=["real", "single", "day"])  # which pandas writes otherwise into JSON
    for name, write in (("rows.csv", frame.to_csv), ("lines.jsonl", frame.to_json)):
        if packing == "zstd":
            pytest.importorskip("zstandard", reason="pandas packs .zst with it")
        path = folder / f"{name}{ending}"
        if name == "rows.csv":
            write(path, index=False, compression=packing, quoting=csv.QUOTE_ALL)
        else:
            write(path, orient="records", lines=True, date_format="iso", date_unit="us", compression=packing)
        for step in (1 << 20, 50):
            found, _, rejects, _ = read(folder, step, source=path.name)
            assert not rejects
            equal(found, frame)


@settings(max_examples=30)
@given(frames(text=(TEXTS, "str")), PACKINGS)
def test_json_lines_are_read_back(tmp_path_factory, frame, packing):
    folder = tmp_path_factory.mktemp("json")
    rows = [
        {name: None if pd.isna(value) else value for name, value in zip(frame.columns, row, strict=True)}
        for row in frame.itertuples(index=False)
    ]
    content = "".join(
        json.dumps(row, ensure_ascii=bool(index % 2), default=_json) + "\n" for index, row in enumerate(rows)
    ).encode()
    (folder / f"rows.jsonl{packing}").write_bytes(packed(content, packing, "rows.jsonl"))
    for step in (1 << 20, 50):
        found, ids, rejects, _ = read(folder, step, source=f"rows.jsonl{packing}")
        assert not rejects and ids == list(range(1, len(frame) + 1))
        equal(found, frame)


LINES = st.lists(
    st.sampled_from(["a", " ", "é", "👩‍🚀", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\0", "\r", '"', "7"])
)


@settings(max_examples=40)
@given(
    st.lists(LINES.map("".join), min_size=1, max_size=8), st.booleans(), st.sampled_from(["utf-8", "utf-16"]), PACKINGS
)
def test_a_line_of_text_ends_with_a_line_feed_and_nothing_else(tmp_path_factory, lines, is_closed, encoding, packing):
    """Wherever the file is cut: within a character or between CR and LF."""
    folder = tmp_path_factory.mktemp("text")
    content = "\n".join(lines) + "\n" * (is_closed or not any(lines))
    assume(not content.startswith("\0"))  # in UTF-16 such a file begins as one in UTF-32 does
    (folder / f"rows.txt{packing}").write_bytes(packed(content.encode(encoding), packing, "rows.txt"))
    wanted = [line.removesuffix("\r") or None for line in content.split("\n")]
    wanted = wanted if content.split("\n")[-1] else wanted[:-1]
    for step in (1 << 20, 1, 3, 10):
        found, ids, rejects, _ = read(folder, step, source=f"rows.txt{packing}", target="text")
        assert found["text"].to_pylist() == wanted and not rejects
        assert ids == list(range(1, len(wanted) + 1))


def _json(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value.isoformat()


@settings(max_examples=40)
@given(
    frames(text=(TEXTS, "str"), amount=(st.decimals(-(10**6), 10**6, places=2), "object")),
    st.sampled_from(["rows.parquet", "rows.pq", "rows.arrow", "rows.feather", "stream.arrow"]),
    st.integers(1, 5),
    st.sampled_from(["snappy", "gzip", "zstd", None]),
)
def test_parquet_and_arrow_are_read_back(tmp_path_factory, frame, name, rows, packing):
    folder = tmp_path_factory.mktemp("arrow")
    table = pa.Table.from_pandas(frame, preserve_index=False)
    if name.endswith(("parquet", "pq")):
        frame.to_parquet(folder / name, row_group_size=rows, compression=packing)
    elif name.endswith("feather"):
        frame.to_feather(folder / name)
    else:
        make = pa.ipc.new_stream if name.startswith("stream") else pa.ipc.new_file
        with make(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    found, ids, _, _ = read(folder, source=name)
    assert ids == list(range(1, len(frame) + 1))
    equal(found, frame)
