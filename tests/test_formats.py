"""Files of every format: what pandas writes is read back equal, and what is wrong with a file is told."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import read

from raylway.data import columns, sources
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


TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), max_size=8).filter(
    lambda text: text.strip() == text and text not in columns.MISSING_WORDS
)
WORDS = TEXTS.map(lambda text: f"t{text}")


@st.composite
def frames(draw) -> pd.DataFrame:
    rows = draw(st.integers(1, 12))

    def column(values):
        return st.lists(st.one_of(st.none(), values), min_size=rows, max_size=rows)

    return pd.DataFrame(
        {
            "whole": pd.Series(draw(column(st.integers(-(2**63), 2**63 - 1))), dtype="Int64"),
            "real": pd.Series(draw(column(st.floats(allow_nan=False, allow_infinity=False))), dtype="float64"),
            "word": pd.Series(draw(column(WORDS)), dtype="str"),
            "y": pd.Series(draw(st.lists(st.sampled_from("ab"), min_size=rows, max_size=rows)), dtype="str"),
        }
    )


def equal(found: pa.Table, wanted: pd.DataFrame) -> None:
    assert found.num_rows == len(wanted)
    for name in ("whole", "real", "word", "y"):
        values = [None if pd.isna(value) else value for value in wanted[name].tolist()]
        if all(value is None for value in values):
            assert found[name].null_count == found.num_rows
            continue
        assert found[name].to_pylist() == values, name


def packed(content: bytes, how: str) -> bytes:
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
            archive.writestr("rows" + ENDING[0], content)
        return sink.getvalue()
    return content


ENDING = [".csv"]
PACKINGS = st.sampled_from(["", ".gz", ".bz2", ".zst", ".zip"])


@settings(max_examples=60)
@given(
    frames(),
    st.tuples(st.sampled_from(",;\t|:^ "), st.sampled_from("\"'"), st.sampled_from([0, 1])),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "gb18030"]),
    st.sampled_from(["\n", "\r\n"]),
    PACKINGS,
)
def test_csv_is_read_back(tmp_path_factory, frame, dialect, encoding, end, packing):
    delimiter, quote, quoting = dialect
    folder = tmp_path_factory.mktemp("csv")
    ENDING[0] = ".csv"
    try:
        text = frame.to_csv(
            index=False,
            sep=delimiter,
            quotechar=quote,
            quoting=quoting,
            lineterminator=end,
            float_format=lambda value: repr(float(value)),
        )
        content = text.encode(encoding)
    except UnicodeEncodeError:
        content, encoding = text.encode(), "utf-8"
    (folder / f"rows.csv{packing}").write_bytes(packed(content, packing))
    how: dict[str, Any] = {"delimiter": delimiter, "quote": quote}
    if encoding in ("cp1252", "gb18030"):
        how["encoding"] = encoding
    for step in (1 << 20, 60):
        found, _, rejects, _ = read(folder, step, source=f"rows.csv{packing}", read=how)
        assert not rejects
        equal(found, frame)


@settings(max_examples=40)
@given(frames(), PACKINGS)
def test_json_lines_are_read_back(tmp_path_factory, frame, packing):
    folder = tmp_path_factory.mktemp("json")
    ENDING[0] = ".jsonl"
    rows = [
        {name: None if pd.isna(value) else value for name, value in zip(frame.columns, row, strict=True)}
        for row in frame.itertuples(index=False)
    ]
    content = "".join(
        json.dumps(row, ensure_ascii=bool(index % 2), default=lambda value: value.item()) + "\n"
        for index, row in enumerate(rows)
    ).encode()
    (folder / f"rows.jsonl{packing}").write_bytes(packed(content, packing))
    for step in (1 << 20, 50):
        found, ids, rejects, _ = read(folder, step, source=f"rows.jsonl{packing}")
        assert not rejects and ids == list(range(1, len(frame) + 1))
        equal(found, frame)


@settings(max_examples=30)
@given(frames(), st.sampled_from(["rows.parquet", "rows.arrow", "rows.feather", "stream.arrow"]), st.integers(1, 5))
def test_parquet_and_arrow_are_read_back(tmp_path_factory, frame, name, rows):
    folder = tmp_path_factory.mktemp("arrow")
    table = pa.Table.from_pandas(frame, preserve_index=False)
    if name.endswith("parquet"):
        frame.to_parquet(folder / name, row_group_size=rows)
    elif name.endswith("feather"):
        frame.to_feather(folder / name)
    else:
        make = pa.ipc.new_stream if name.startswith("stream") else pa.ipc.new_file
        with make(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    found, ids, _, _ = read(folder, source=name)
    assert ids == list(range(1, len(frame) + 1))
    equal(found, frame)
