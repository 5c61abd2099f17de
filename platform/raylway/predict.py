"""`raylway predict`: every row of a file answered by a bundle, or told why not."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from raylway import storage
from raylway.bundle.predictor import Answers, Predictor
from raylway.data import sources
from raylway.errors import UserError

_FORMATS = (".csv", ".jsonl", ".parquet")


def predict_file(bundle: Path, file: Path, output: Path | None) -> tuple[int, int]:
    """Answer a file's rows in their order; an answer has the row's line, and each row of the file has one.

    The columns are `line`, `prediction`, `p_<class>` for each class, and `error`: why a row could not be answered.

    Args:
        bundle: The bundle's folder.
        file: CSV (.gz, .zip) or Parquet.
        output: A .csv, .jsonl or .parquet file; None prints CSV.

    Returns:
        Rows answered, and rows that could not be.

    Raises:
        UserError: The file can't be read or lacks an input; the output can't be written.
    """
    if output is not None and output.suffix not in _FORMATS:
        raise UserError(
            "answers can't be written in this format", str(output), " or ".join(_FORMATS), output.suffix or "no ending"
        )
    predictor = Predictor(bundle)
    record = predictor.bundle.record
    rows = sources.read_table(file, record.signature, record.transform)
    rows = _answerable(rows, predictor.unanswerable(rows.table))
    answered = _table(predictor.predict(rows.table), rows, record.signature.classes)
    content = _encoded(answered, output.suffix if output else ".csv")
    if output is None:
        sys.stdout.buffer.write(content)
    else:
        _write(output, content)
    return len(rows.positions), len(rows.errors)


def _answerable(rows: sources.FileRows, reasons: list[str | None]) -> sources.FileRows:
    """The rows without those that the model has a reason not to answer, which become errors."""
    refused = [
        sources.RowError(int(rows.positions[row]), int(rows.lines[row]), None, reason)
        for row, reason in enumerate(reasons)
        if reason is not None
    ]
    good = np.array([reason is None for reason in reasons], bool)
    errors = sorted([*rows.errors, *refused], key=lambda error: error.position)
    return sources.FileRows(
        rows.table.filter(pa.array(good)), rows.positions[good], rows.lines[good], errors, rows.total
    )


def _table(answers: Answers, rows: sources.FileRows, classes: list[str]) -> pa.Table:
    columns: dict[str, pa.Array] = {"position": pa.array(rows.positions), "line": pa.array(rows.lines)}
    columns["prediction"] = pa.array(answers.values if answers.labels is None else answers.labels)
    if answers.probabilities is not None:
        columns |= {f"p_{name}": pa.array(answers.probabilities[:, code]) for code, name in enumerate(classes)}
    failed = {
        "position": pa.array([error.position for error in rows.errors], pa.int64()),
        "line": pa.array([error.line for error in rows.errors], pa.int64()),
        "error": pa.array(
            [f"{error.column}: {error.reason}" if error.column else error.reason for error in rows.errors], pa.string()
        ),
    }
    every = pa.concat_tables([pa.table(columns), pa.table(failed)], promote_options="default")
    return every.sort_by("position").drop_columns("position")


def _encoded(table: pa.Table, ending: str) -> bytes:
    sink = io.BytesIO()
    if ending == ".parquet":
        pq.write_table(table, sink)
    elif ending == ".jsonl":
        for row in table.to_pylist():
            sink.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    else:
        pacsv.write_csv(table, sink, pacsv.WriteOptions(quoting_style="needed"))
    return sink.getvalue()


def _write(output: Path, content: bytes) -> None:
    try:
        storage.write_bytes(output, content)
    except OSError as error:
        raise UserError("the answers can't be written", str(output), found=error.strerror or str(error)) from None
