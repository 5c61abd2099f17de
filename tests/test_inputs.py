"""Sources as the inputs of a model: each row for itself, every row accounted for."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from raylway.data import csv_read, inputs
from raylway.errors import UserError
from raylway.features.prepared import LINE_BITS
from raylway.features.signature import Input, Signature

SIGNATURE = Signature(
    "classification",
    "y",
    [Input("n", "number", True), Input("store", "category", True, "number"), Input("word", "category", False)],
    ["a", "b"],
)


def read(path):
    """All rows, their lines, and those that can't be read."""
    blocks = []
    opened = inputs.opened(str(path), SIGNATURE)
    for item in opened.items(is_cut=True):
        blocks += inputs.read(item, SIGNATURE, opened.how)
    lines = np.concatenate([np.zeros(0, np.uint64), *(block.row_ids for block in blocks)]) % (1 << LINE_BITS)
    return (
        [row for block in blocks for row in block.table.to_pylist()],
        lines.tolist(),
        [reject for block in blocks for reject in block.rejects],
    )


def test_a_file_to_predict_accounts_for_every_row(tmp_path, monkeypatch):
    rows = ["1,1,x", "2.5,2.0,NA", ",1,x", "oops,1,x", "3,1", "inf,1,x", "4,,x", "5, 10,", "NA,1,x", "6,99,1.0"]
    (tmp_path / "f.csv").write_text("n,store,word\n" + "\n".join(rows))
    for step in (1 << 20, 10):
        monkeypatch.setattr(csv_read, "RANGE_BYTES", step)
        found, lines, rejects = read(tmp_path / "f.csv")
        assert lines == [2, 3, 9, 11]
        assert found == [
            {"n": 1.0, "store": "1", "word": "x"},
            {"n": 2.5, "store": "2", "word": "NA"},
            {"n": 5.0, "store": "10", "word": None},
            {"n": 6.0, "store": "99", "word": "1.0"},
        ]
        assert [(reject.row_id, reject.column, reject.cell) for reject in rejects] == [
            (4, "n", ""), (5, "n", "oops"), (6, None, "3,1"), (7, "n", "inf"), (8, "store", ""), (10, "n", "NA"),
        ]  # fmt: skip
    assert "'oops' is no finite number" in rejects[1].reason and "too few cells" in rejects[2].reason


def test_a_parquet_file_to_predict(tmp_path):
    frame = pa.table({"store": [1.0, 2.0, None], "n": pa.array([1, 2, 3], pa.int8()), "more": ["p", "q", "r"]})
    frame = frame.append_column("word", pa.nulls(3, pa.string()))
    pa.parquet.write_table(frame, tmp_path / "f.parquet", row_group_size=2)
    found, lines, rejects = read(tmp_path / "f.parquet")
    assert found == [{"n": 1.0, "store": "1", "word": None}, {"n": 2.0, "store": "2", "word": None}]
    assert lines == [1, 2] and [(reject.row_id, reject.column) for reject in rejects] == [(3, "store")]


def test_a_parquet_file_without_rows_or_with_a_column_of_lists(tmp_path):
    schema = pa.schema({"store": pa.string(), "n": pa.int8(), "word": pa.string()})
    pa.parquet.ParquetWriter(tmp_path / "none.parquet", schema).close()
    assert read(tmp_path / "none.parquet") == ([], [], [])
    pa.parquet.write_table(pa.table({"store": ["1"], "n": [[1]], "word": ["x"]}), tmp_path / "lists.parquet")
    with pytest.raises(UserError, match="not read") as caught:
        read(tmp_path / "lists.parquet")
    assert "lists.parquet" in caught.value.where


def test_a_file_to_predict_without_the_column_of_an_input_is_refused(tmp_path):
    """Of an optional one too: with a misspelt heading the whole column would be filled in silently."""
    (tmp_path / "e.csv").write_text("n,store,wrod\n1,2,x\n")
    with pytest.raises(UserError, match="lacks the column 'word'"):
        read(tmp_path / "e.csv")
    (tmp_path / "f.csv").write_text("n,stor\n1,2\n")
    with pytest.raises(UserError, match="lacks the column 'store'") as caught:
        read(tmp_path / "f.csv")
    assert "stor" in caught.value.fix
    with pytest.raises(UserError, match="g.csv"):
        read(tmp_path / "g.csv")
