"""Looking at a source without Ray: `raylway check` samples one, `raylway predict` reads one file whole."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.data import (
    arrow_read,
    clean,
    columns,
    csv_read,
    describe,
    division,
    items,
    lines_read,
    outcome,
    report,
    warnings,
)
from raylway.data.clean import Rules
from raylway.data.columns import MISSING_WORDS
from raylway.data.csv_read import Reject
from raylway.data.decide import lost, refuse_infinite
from raylway.data.division import Division
from raylway.data.files import file_at, members
from raylway.data.items import ROW_ID, Piece, Reading
from raylway.data.location import Location
from raylway.data.opening import Asked, Source, no_rows, open_files, open_source
from raylway.data.outcome import Found, Outcome, Preview
from raylway.data.report import Reported
from raylway.data.roles import Names, check_names
from raylway.errors import UserError
from raylway.features import derive
from raylway.features.schema import as_float64, canonical_text
from raylway.features.signature import Input, Signature, Task
from raylway.features.transform import Transform
from raylway.job.load import LoadedJob

SAMPLE_BYTES = 8 << 20


class Sample(msgspec.Struct, frozen=True):
    """What the first rows of a source say; of a small source everything, and then it is exact."""

    exact: bool
    files: int
    rows_read: int
    """In the sample."""
    rows: int
    """Rows to train, validate and test with; estimated unless `exact`."""
    train: int
    validation: int
    test: int
    columns: list[Reported]
    """Of the source, then derived ones."""
    task: Task
    target: str
    classes: list[str]
    """Those in the sample."""
    numeric: list[str]
    categorical: list[str]
    date: list[str]
    decisions: list[str]
    warnings: list[str]


def sample(loaded: LoadedJob, max_bytes: int = SAMPLE_BYTES) -> Sample:
    """Infer from a source's first bytes what preparation will decide; imports neither ray nor torch.

    Args:
        loaded: The job.
        max_bytes: About how much is read; a source no larger is judged whole.

    Raises:
        UserError: Whatever of it preparation would raise and the sample can show.
    """
    source = open_source(loaded, head=True)
    names = check_names(loaded, source.columns)
    pieces, share = _heads(source, names.numeric, max_bytes)
    if not pieces or (share == 1 and not sum(piece.facts.read for piece in pieces)):
        raise no_rows(loaded.location("data.source"), ", ".join(source.files[:5]))
    seen = outcome.merged([piece.facts.seen for piece in pieces])
    types = outcome.types_of(loaded, names, seen, source.places)
    refuse_infinite(seen, types.of, loaded.job.data.clean, set(names.drop), source.places)
    rules = outcome.rules_of(loaded, names, types)
    if again := lost(seen, types.of):
        pieces, share = _heads(source, names.numeric, max_bytes, again)
    order = outcome.ordering_of(loaded, source)
    both = [outcome.found_of(piece, rules, order) for piece in pieces]
    assessed, tables = [found for found, _, _ in both], [table for _, table, _ in both]
    found: Outcome | Preview
    if share == 1:
        every = outcome.Pieces(assessed, tables, functools.partial(_count, assessed, tables))
        found = outcome.conclude(loaded, source, names, rules, seen, every)
        rows, train, validation = found.account.kept, found.account.train, found.account.validation
    else:
        found = outcome.preview(loaded, names, rules, seen, assessed)
        rows = round(found.usable / share)
        asked = loaded.job.data.split
        validation = round(rows * asked.validation)
        train = rows - validation - round(rows * asked.test)
    rows_seen = _sampled(pieces, assessed, tables, found, names, rules)
    return Sample(
        exact=share == 1,
        files=len(source.files),
        rows_read=sum(piece.facts.read for piece in pieces),
        rows=rows,
        train=train,
        validation=validation,
        test=rows - train - validation,
        columns=report.report(found.described.columns, names, found.roles, outcome.empty_columns(seen), rows_seen),
        task=found.task,
        target=names.target,
        classes=found.classes,
        numeric=found.roles.numeric,
        categorical=found.roles.categorical,
        date=found.roles.date,
        decisions=[*source.notes, *types.sentences, *found.sentences],
        warnings=warnings.find(outcome.subject(loaded, names, found), rows_seen),
    )


def _count(
    found: list[Found], tables: list[pa.Table], divided: Division, codes: list[list[int]]
) -> list[outcome.Counted]:
    return [
        outcome.counted(table, each, own, divided, divided.exceptions)
        for table, each, own in zip(tables, found, codes, strict=True)
    ]


def _heads(
    source: Source, numeric: list[str], limit: int, as_text: list[str] | None = None
) -> tuple[list[Piece], float]:
    """Pieces from the beginning of the source, and which share of it they are."""
    pieces: list[Piece] = []
    covered = 0.0
    left = limit
    for part in source.parts:
        if left <= 0:
            break
        piece, share = items.read_head(part, Reading(source.columns, numeric, left, as_text or []))
        pieces.append(piece)
        covered += share * part.size
        left -= int(share * part.size) + 1
    whole = covered >= source.size or not source.size
    return pieces, 1.0 if whole else max(covered, 1.0) / source.size


def _sampled(
    pieces: list[Piece],
    assessed: list[Found],
    tables: list[pa.Table],
    found: Outcome | Preview,
    names: Names,
    rules: Rules,
) -> pa.Table:
    """Some usable rows with derived columns; of the whole data their sides, else all count as training rows."""
    position = {name: index for index, name in enumerate(found.classes)}
    sides = []
    for piece, each, table in zip(pieces, assessed, tables, strict=True):
        side = np.zeros(piece.facts.rows, np.int8)
        own = np.ones(table.num_rows, np.int8)
        if isinstance(found, Outcome):
            codes = np.array([position[value] for value in each.assessed.values] if position else [], np.int32)
            own = division.sides(table, codes, found.division, found.division.exceptions)
        side[table["position"].to_numpy()] = own
        sides.append(side)
    rate = describe.rate(sum(int((side > 0).sum()) for side in sides))
    parts = []
    for piece, side in zip(pieces, sides, strict=True):
        some = describe.chosen(piece.table[ROW_ID].combine_chunks().to_numpy(), side, rate)
        rows = clean.typed_rows(piece, some, list(rules.types), rules)
        parts.append(describe.sample(rows, side[some], 1.0))
    return derive.derived(describe.sampled(parts), derive.parsed(names.derive))


class RowError(msgspec.Struct, frozen=True):
    """A row of a file that can't be read as the model's inputs."""

    position: int
    """Of the row in the file, from 0."""
    line: int
    """Line it starts on; for Parquet its number from 1."""
    column: str | None
    reason: str


@dataclass(frozen=True)
class FileRows:
    """All rows of a file: those that can be answered, and why the others can't."""

    table: pa.Table
    """N rows; the signature's inputs, number as float64 and category as canonical text, missing as null."""
    positions: np.ndarray
    """int64 [N]: of each row in the file, from 0."""
    lines: np.ndarray
    """int64 [N]: line of each row; for Parquet its number from 1."""
    errors: list[RowError]
    """In the order of the file."""
    total: int


def read_table(path: Path, signature: Signature, transform: Transform) -> FileRows:
    """Read a CSV (.gz, .zip) or Parquet file as the inputs of a model, each row for itself.

    A row's values do not depend on the other rows of the file. Columns that are no input are ignored.

    Raises:
        UserError: The file can't be read, or lacks the column of an input: of a misspelt heading the whole column would
            be filled in silently.
    """
    location = file_at(path)
    wanted = {each.name: each for each in signature.inputs}
    known = {feature.column: pa.array(feature.known, pa.string()) for feature in transform.categorical}
    schema = {name: _kind(each) for name, each in wanted.items()} | {_LINE: pa.int64(), _PLACE: pa.int64()}
    tables = [pa.schema(schema).empty_table()]  # a Parquet file without row groups gives no other
    errors: list[RowError] = []
    total = 0
    for table, rejects in _file_tables(location, wanted):
        lines = table[ROW_ID].to_numpy().astype(np.int64)
        refused = np.array([reject.row_id for reject in rejects], np.int64)
        order = np.sort(np.concatenate([lines, refused]))
        places = total + np.searchsorted(order, lines)
        typed, reasons = _inputs(table, wanted, known, location.name)
        found = [RowError(int(places[row]), int(lines[row]), column, why) for row, (column, why) in reasons.items()]
        for reject, place in zip(rejects, total + np.searchsorted(order, refused), strict=True):
            found.append(RowError(int(place), reject.row_id, reject.column, reject.reason))
        errors += sorted(found, key=lambda error: error.position)
        good = np.ones(table.num_rows, bool)
        good[list(reasons)] = False
        arrays = {**typed, _LINE: pa.array(lines), _PLACE: pa.array(places, pa.int64())}
        tables.append(pa.table(arrays).filter(pa.array(good)))
        total += len(order)
    every = pa.concat_tables(tables)
    return FileRows(every.select(list(wanted)), every[_PLACE].to_numpy(), every[_LINE].to_numpy(), errors, total)


def input_tables(path: Path, signature: Signature, transform: Transform) -> Iterator[tuple[pa.Table, int]]:
    """A file in parts: its rows as the inputs of a model, a cell that is no value for its input as missing; and how
    many rows could not be read at all.

    Raises:
        UserError: As `read_table`.
    """
    location = file_at(path)
    wanted = {each.name: each for each in signature.inputs}
    known = {feature.column: pa.array(feature.known, pa.string()) for feature in transform.categorical}
    for table, rejects in _file_tables(location, wanted):
        yield pa.table(_inputs(table, wanted, known, location.name)[0]), len(rejects)


_LINE, _PLACE = "\0line", "\0place"


def _file_tables(location: Location, wanted: dict[str, Input]) -> Iterator[tuple[pa.Table, list[Reject]]]:
    """The file in parts: its columns among the inputs (text files' as text), row numbers or lines, and what was
    refused."""
    asked = Asked(wanted=frozenset(wanted))
    for member in members(location):
        source = open_files([member], asked, member.name)
        if not source.columns:
            raise UserError("the file is empty", where=member.name, expected="a heading and rows")
        reading = Reading(_present(source.columns, wanted, member), [], csv_read.RANGE_BYTES)
        for part in source.parts:
            for table, rejects in items.tables(part, reading):
                yield lines_read.unmarked(table) if source.format == "jsonl" else table, rejects


def _present(names: list[str], wanted: dict[str, Input], location: Location) -> list[str]:
    lacking = [name for name in wanted if name not in names]
    if lacking:
        near = difflib.get_close_matches(lacking[0], names, n=1)
        raise UserError(
            f"the file lacks the column {lacking[0]!r}",
            where=location.name,
            expected=f"the model's inputs: {', '.join(wanted)}",
            found=", ".join(names[:40]),
            fix=f"rename {near[0]!r}?" if near else "add the column",
        )
    return [name for name in wanted if name in names]


def _inputs(
    table: pa.Table, wanted: dict[str, Input], known: dict[str, pa.Array], where: str
) -> tuple[dict[str, pa.Array], dict[int, tuple[str, str]]]:
    """The inputs' columns, and for each row that can't be used the first column that stands in the way, and why."""
    arrays: dict[str, pa.Array] = {}
    reasons: dict[int, tuple[str, str]] = {}
    rows = table[ROW_ID].to_numpy()
    for name, each in wanted.items():
        if name not in table.column_names:
            arrays[name] = pa.nulls(table.num_rows, _kind(each))
            continue
        stored = arrow_read.stored(table[name], name, rows, False, where)[0]
        if each.type == "number":
            arrays[name], bad = _as_number(stored)
            for row in np.flatnonzero(bad):
                reasons.setdefault(int(row), (name, f"{table[name][int(row)].as_py()!r} is no finite number"))
        elif each.type == "date":
            texts = stored.cast(pa.string()) if pa.types.is_dictionary(stored.type) else canonical_text(stored)
            arrays[name], bad = clean.dates_of(texts)
            for row in np.flatnonzero(bad):
                reasons.setdefault(int(row), (name, f"{texts[int(row)].as_py()!r} is no date"))
        else:
            arrays[name] = _as_category(stored, known.get(name))
        if each.required:
            for row in np.flatnonzero(pc.is_null(arrays[name]).to_numpy(zero_copy_only=False)):
                reasons.setdefault(int(row), (name, "the cell is empty"))
    return arrays, reasons


def _kind(each: Input) -> pa.DataType:
    return pa.float64() if each.type == "number" else pa.string()


def _as_number(stored: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Float64, and which cells are neither missing nor a finite number."""
    if pa.types.is_dictionary(stored.type):
        numbers, bad = columns.as_numbers(stored, whole=False)
    else:
        numbers = pa.array(as_float64(stored), from_pandas=True)
        bad = np.zeros(len(stored), bool)
    return numbers, bad | np.isinf(numbers.to_numpy(zero_copy_only=False))


def _as_category(stored: pa.Array, known: pa.Array | None) -> pa.Array:
    """Canonical texts. A text that training knows is itself; where training knows numbers only, a number in another
    spelling (1.0) is the known one (1) and a missing word is missing."""
    if not pa.types.is_dictionary(stored.type) or known is None:
        return canonical_text(stored.cast(pa.string()) if pa.types.is_dictionary(stored.type) else stored)
    texts = stored.dictionary
    if len(texts) and columns.numbers(known).is_number.all():
        read = columns.numbers(texts)
        canonical = canonical_text(pa.array(read.integers))
        canonical = pc.if_else(pa.array(read.is_integer), canonical, canonical_text(pa.array(read.floats)))
        canonical = pc.if_else(pa.array(read.is_number), canonical, texts)
        is_word = pc.is_in(texts, pa.array(MISSING_WORDS))
        canonical = pc.if_else(is_word, pa.scalar(None, pa.string()), canonical)
        texts = pc.if_else(pc.is_in(texts, known), texts, canonical)
    return texts.take(stored.indices)
