"""One rule for each kind of cell, whatever the format and whoever reads it: training, prediction, drift or serving.

A table with every kind of cell is prepared from each format. The same rows, read back from each format as `raylway
predict` reads them, and sent as a request, must come to the numbers and codes that stand in the shards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import job, prepared

from raylway.bundle.rows import RowReader
from raylway.data import inputs
from raylway.features.prepared import LINE_BITS, SPLITS, Prepared
from raylway.features.transform import Encoded

ROWS = 60
FORMATS = ("csv", "jsonl", "parquet", "arrow")
BIG = 2**53 + 1


def every(kinds: list[Any]) -> list[Any]:
    return [kinds[row % len(kinds)] for row in range(ROWS)]


CELLS: dict[str, list[Any]] = {
    "whole": every([1, None, -3, 40, 5, 6, 7]),
    "real": every([0.1, 1e-300, -2.5, None, 3.0]),
    "rate": every([1.5, float("inf"), 2.5, float("-inf"), 3.5, None, 2.0, 4.0]),
    "big": every([BIG, BIG + 2, 2**62 + 1, None]),
    "store": every([1, 2, None, 30]),
    "flag": every([True, False, True, None, False]),
    "zip": every(["01234", "00099", None, "99999"]),
    "country": every(["NA", "DE", None, "null", "FR"]),
    "day": every(["2013-01-01", None, "2013-03-31T01:30:00Z", "2014-06-15T12:00:00+02:00"]),
    "y": every(["a", "b", "b"]),
}
DATA: dict[str, Any] = {
    "target": "y",
    "features": {"categorical": ["big", "store"]},
    "clean": {"missing": "impute", "infinite": "missing", "duplicates": "keep"},
    "split": {"by": "random", "validation": "10%", "test": "20%"},
}


def table(columns: dict[str, list[Any]]) -> pa.Table:
    """Typed as well as Arrow can: whole numbers, booleans, texts."""
    return pa.table({name: pa.array(cells) for name, cells in columns.items()})


def write(folder: Path, kind: str, columns: dict[str, list[Any]], decimal: str = ".") -> str:
    """The columns as a file of this format by its usual writer; returns the file's name."""
    name = f"rows.{kind}"
    typed = table(columns)
    if kind == "csv":
        frame = pd.DataFrame({each: pd.Series(typed[each].to_pylist(), dtype=object) for each in columns})
        if decimal == ",":
            frame = frame.map(lambda cell: repr(cell).replace(".", ",") if isinstance(cell, float) else cell)
        frame.to_csv(folder / name, index=False, sep=";" if decimal == "," else ",", na_rep="")
    elif kind == "jsonl":
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in typed.to_pylist()))
    elif kind == "parquet":
        pq.write_table(typed, folder / name, row_group_size=17)
    else:
        with pa.ipc.new_file(str(folder / name), typed.schema) as writer:
            writer.write_table(typed, max_chunksize=17)
    return name


def shards(found: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and codes of all rows in the order of the source."""
    parts = [found.rows(side) for side in SPLITS]
    taken = [part.take(np.arange(len(part))) for part in parts]
    order = np.argsort(np.concatenate([row_ids for *_, row_ids in taken]))
    return np.concatenate([each[0] for each in taken])[order], np.concatenate([each[1] for each in taken])[order]


def answered(found: Prepared, loaded: Any, path: Path) -> tuple[Encoded, list[tuple[int, str | None, str]]]:
    """What the model would be given for a file, as `raylway predict` reads it, and the rows that it refuses."""
    opened = inputs.opened(str(path), found.manifest.signature, loaded.job)
    blocks = [
        block for item in opened.items(is_cut=True) for block in inputs.read(item, found.manifest.signature, opened.how)
    ]
    rejects = [reject for block in blocks for reject in block.rejects]
    shown = [(reject.row_id & ((1 << LINE_BITS) - 1), reject.column, reject.reason) for reject in rejects]
    return found.manifest.transform.encode(pa.concat_tables([block.table for block in blocks])), shown


@pytest.mark.parametrize("kind", FORMATS)
def test_training_prediction_and_serving_read_alike(tmp_path: Path, kind: str) -> None:
    data = {"source": write(tmp_path, kind, CELLS), **DATA}
    found = prepared(tmp_path, data)
    manifest = found.manifest
    assert manifest.account.kept == manifest.account.read == ROWS
    roles = {each.name: (each.type, each.values) for each in manifest.signature.inputs}
    assert roles == {
        "whole": ("number", "number"),
        "real": ("number", "number"),
        "rate": ("number", "number"),
        "big": ("category", "number"),
        "store": ("category", "number"),
        "flag": ("category", "boolean"),
        "zip": ("category", "text"),
        "country": ("category", "text"),
        "day": ("date", "text"),
    }
    known = {each.column: each.categories for each in manifest.transform.categorical if not each.part}
    assert known["big"] == [str(BIG), str(BIG + 2), str(2**62 + 1)] and known["store"] == ["1", "2", "30"]
    assert known["flag"] == ["false", "true"] and known["zip"] == ["00099", "01234", "99999"]
    assert known["country"] == ["DE", "FR", "NA", "null"]
    numeric, codes = shards(found)
    for other in FORMATS:
        encoded, rejects = answered(found, job(tmp_path, data), tmp_path / write(tmp_path, other, CELLS))
        assert rejects == []
        np.testing.assert_array_equal(encoded.numeric, numeric, err_msg=other)
        np.testing.assert_array_equal(encoded.categorical, codes, err_msg=other)
    rows = [{name: cell for name, cell in row.items() if name != "y"} for row in table(CELLS).to_pylist()]
    asked = [row | {"rate": None if row["rate"] in (float("inf"), float("-inf")) else row["rate"]} for row in rows]
    _, read = RowReader(manifest.signature).read(json.dumps({"rows": asked}).encode())
    served = manifest.transform.encode(read.table(manifest.signature))
    np.testing.assert_array_equal(served.numeric, numeric)
    np.testing.assert_array_equal(served.categorical, codes)
