"""A source as the inputs of a model, each row for itself: for `raylway predict` and `raylway drift`.

The same readers as preparation: whatever `data.source` takes, read as the run's job says (`data.read`). A row's values
do not depend on the other rows; columns that are no input are not read.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.data import arrow_read, clean, columns, csv_read, files, items, reading
from raylway.data.csv_read import Reject
from raylway.data.items import ROW_ID, Item, Part, Reading
from raylway.data.opening import Source, open_source
from raylway.errors import UserError
from raylway.features.schema import as_float64, canonical_text
from raylway.features.signature import Input, Signature
from raylway.features.texts import Decimal, category_names
from raylway.job.load import LoadedJob, load_job
from raylway.job.schema import Job
from raylway.storage import Place


class How(msgspec.Struct, frozen=True):
    """How the run's job has cells read, in training as in prediction."""

    decimal: Decimal = "."
    """Of numbers in CSV files."""
    infinite_is_missing: bool = False
    missing: list[str] = []
    """Further texts and numbers that are missing cells."""

    @classmethod
    def of(cls, job: Job) -> How:
        read = job.data.read
        return cls(read.decimal, job.data.clean.infinite == "missing", read.missing_words)


def job_of(path: Place, overrides: Sequence[str]) -> LoadedJob:
    """The job of a run, its rows read as a person says: files to predict may be of another dialect than those of
    training.

    Args:
        path: `job.yaml` of the run.
        overrides: `data.read.key=value` texts of `--set`.

    Raises:
        UserError: One names another key, or breaks the schema.
    """
    for text in overrides:
        if not text.startswith("data.read."):
            raise UserError(
                "only how the files are read can differ from the run's job",
                where=f"--set {text}",
                expected="data.read.KEY=VALUE, such as data.read.decimal=,",
                found=text.partition("=")[0],
                fix="take it out; another model is another run",
            )
    return load_job(path, overrides)


@dataclass(frozen=True)
class Opened:
    """A source whose headings and footers were read and have a column for each input."""

    source: Source
    """Its files have these columns at least; each may have more."""
    how: How

    @property
    def files(self) -> list[str]:
        """Names by the file index of the row ids."""
        return self.source.files

    @property
    def size(self) -> int:
        """Bytes; of a packed file about those unpacked."""
        return self.source.size

    def items(self, is_cut: bool) -> list[Item]:
        """What to read, in the order of the rows.

        Args:
            is_cut: Cut large files, so that several processes can read one.
        """
        return items.grouped(reading.cut(self.source) if is_cut else self.source.parts, csv_read.RANGE_BYTES)


@dataclass(frozen=True)
class Block:
    """Some consecutive rows of a source."""

    table: pa.Table
    """N rows that can be answered; the signature's inputs, number as float64, others as text, missing as null."""
    row_ids: np.ndarray
    """uint64 [N]"""
    rejects: list[Reject]
    """Rows that can't be read as the inputs, in the order of the file."""


def opened(source: str, signature: Signature, job: Job | None = None) -> Opened:
    """Find a source's files and see that each has the inputs; no rows are read.

    Args:
        source: File, glob, folder, or address, as in `data.source`; relative to the current folder.
        signature: Of the model.
        job: The run's, for how files are read (`data.read`).

    Raises:
        UserError: There is no such file, it can't be read, or it lacks the column of an input: of a misspelt heading
            the whole column would be filled in silently.
    """
    job = job or Job.model_validate({"name": "none", "data": {"source": source, "target": signature.target}})
    asked = job.model_copy(update={"data": job.data.model_copy(update={"source": source})})
    loaded = LoadedJob(asked, Path("SOURCE"), {"data.source": source})
    locations = files.locate(loaded)
    names: list[str] = []
    parts: list[Part] = []
    for location in locations:
        one = open_source(loaded, [location], may_be_empty=True)
        if not one.columns:
            if len(locations) == 1:
                raise UserError(
                    "the file is empty",
                    where=location.name,
                    expected="a heading and rows",
                    found="0 bytes",
                    fix="name a file with rows",
                )
            continue  # no heading and no rows, as in preparation
        _require_inputs(one.columns, signature, one.files[0])
        parts += [msgspec.structs.replace(part, file=len(names) + part.file) for part in one.parts]
        names += one.files
    columns_ = [each.name for each in signature.inputs]
    return Opened(Source(locations[0].format, names, columns_, parts), How.of(job))


def read(item: Item, signature: Signature, how: How) -> Iterator[Block]:
    """The rows of an item as the inputs of a model, in parts of some ten thousand rows.

    Raises:
        UserError: A file is damaged or a column is of a type that is not read.
    """
    for table, reasons, refused in _parts(item, signature, how):
        rows, inputs = table
        bad = [Reject(int(rows[row]), *reason) for row, reason in sorted(reasons.items())]
        good = np.ones(len(rows), bool)
        good[list(reasons)] = False
        rejects = sorted([*bad, *refused], key=lambda reject: reject.row_id)
        yield Block(inputs.filter(pa.array(good)), rows[good], rejects)


def tables(source: Opened, signature: Signature) -> Iterator[tuple[pa.Table, int]]:
    """A source in parts: its rows as the inputs of a model, a cell that is no value for its input as missing; and how
    many rows could not be read at all."""
    for item in source.items(is_cut=False):
        for (_, inputs), _, refused in _parts(item, signature, source.how):
            yield inputs, len(refused)


def _parts(
    item: Item, signature: Signature, how: How
) -> Iterator[tuple[tuple[np.ndarray, pa.Table], dict[int, tuple[str, str, str]], list[Reject]]]:
    """Row ids and inputs, the rows that can't be used, and those that could not be read."""
    names = [each.name for each in signature.inputs]
    location = item.parts[0].location
    how = how if location.format == "csv" else msgspec.structs.replace(how, decimal=".")
    reading = Reading(names, [], csv_read.RANGE_BYTES, names, how.decimal, how.missing)
    for piece in items.read(item, reading):
        inputs, reasons = _inputs(piece.table, signature, how, location.name)
        yield (piece.table[ROW_ID].to_numpy(), inputs), reasons, piece.facts.rejects


def _require_inputs(names: list[str], signature: Signature, where: str) -> None:
    wanted = [each.name for each in signature.inputs]
    lacking = [name for name in wanted if name not in names]
    if lacking:
        near = difflib.get_close_matches(lacking[0], names, n=1)
        raise UserError(
            f"the file lacks the column {lacking[0]!r}",
            where=where,
            expected=f"the model's inputs: {', '.join(wanted)}",
            found=", ".join(names[:40]),
            fix=f"rename {near[0]!r} to {lacking[0]!r} in the file, or add the column" if near else "add the column",
        )


def _inputs(
    table: pa.Table, signature: Signature, how: How, where: str
) -> tuple[pa.Table, dict[int, tuple[str, str, str]]]:
    """The inputs' columns, and for each row that can't be used the first column that stands in the way, why, and its
    cell."""
    arrays: dict[str, pa.Array] = {}
    reasons: dict[int, tuple[str, str, str]] = {}
    rows = table[ROW_ID].to_numpy()
    for each in signature.inputs:
        name, bad = each.name, np.zeros(table.num_rows, bool)
        stored = arrow_read.stored(table[name], name, rows, False, where)[0]
        if each.type == "number":
            arrays[name], bad = _as_number(stored, how)
        elif each.type == "date":
            texts = stored.cast(pa.string()) if pa.types.is_dictionary(stored.type) else canonical_text(stored)
            arrays[name], bad = clean.dates_of(texts)
        else:
            arrays[name], bad = _as_category(stored, each, how)
        for row in np.flatnonzero(bad):
            cell = str(table[name][int(row)].as_py())
            reason = f"{cell!r} is no {'date' if each.type == 'date' else 'finite number'}"
            reasons.setdefault(int(row), (name, reason, cell))
        if each.required:
            for row in np.flatnonzero(pc.is_null(arrays[name]).to_numpy(zero_copy_only=False)):
                cell = table[name][int(row)].as_py()
                reasons.setdefault(int(row), (name, "the cell is empty", "" if cell is None else str(cell)))
    return pa.table(arrays) if arrays else table.select([]), reasons


def _as_number(stored: pa.Array, how: How) -> tuple[pa.Array, np.ndarray]:
    """Float64, and which cells are neither missing nor a finite number."""
    if pa.types.is_dictionary(stored.type):
        numbers, bad = columns.as_numbers(stored, False, how.decimal)
    elif pa.types.is_boolean(stored.type):
        return pa.nulls(len(stored), pa.float64()), stored.is_valid().to_numpy(zero_copy_only=False)
    else:
        numbers = pa.array(as_float64(stored), from_pandas=True)
        bad = np.zeros(len(stored), bool)
    infinite = pc.fill_null(pc.is_inf(numbers), False)
    if how.infinite_is_missing:
        return pc.if_else(infinite, pa.scalar(None, pa.float64()), numbers), bad
    return numbers, bad | infinite.to_numpy(zero_copy_only=False)


def _as_category(stored: pa.Array, each: Input, how: How) -> tuple[pa.Array, np.ndarray]:
    """The categories' names, and which cells are infinite numbers that are not missing."""
    if pa.types.is_dictionary(stored.type):
        names = category_names(stored.dictionary, each.values, how.decimal).take(stored.indices)
    else:
        names = canonical_text(stored)
    if each.values != "number":
        return names, np.zeros(len(stored), bool)
    infinite = pc.is_in(names, pa.array(["inf", "-inf"]))
    if how.infinite_is_missing:
        return pc.if_else(infinite, pa.scalar(None, pa.string()), names), np.zeros(len(stored), bool)
    return names, infinite.to_numpy(zero_copy_only=False)
