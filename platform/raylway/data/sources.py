"""Looking at a source without Ray: `raylway check` samples one."""

from __future__ import annotations

import functools

import msgspec
import numpy as np
import pyarrow as pa

from raylway.data import assessment, clean, describe, division, items, outcome, report, warnings
from raylway.data.assessment import Found
from raylway.data.clean import Rules
from raylway.data.decide import lost, refuse_infinite
from raylway.data.division import Division
from raylway.data.items import ROW_ID, Piece, Reading
from raylway.data.opening import Source, no_rows, open_source
from raylway.data.outcome import Outcome, Preview
from raylway.data.report import Reported
from raylway.data.roles import Names, check_names
from raylway.features import derive
from raylway.features.signature import Task
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
    how = loaded.job.data.read
    reading = Reading(source.columns, names.numeric, max_bytes, [], how.decimal, how.missing_words)
    pieces, share = _heads(source, reading)
    if not pieces or (share == 1 and not sum(piece.facts.read for piece in pieces)):
        raise no_rows(loaded.location("data.source"), ", ".join(source.files[:5]))
    seen = assessment.merged([piece.facts.seen for piece in pieces])
    types = assessment.types_of(loaded, names, seen, source.places)
    refuse_infinite(seen, types.of, loaded.job.data.clean, set(names.drop), source.places)
    rules = assessment.rules_of(loaded, names, types)
    if again := lost(seen, types.of):
        pieces, share = _heads(source, msgspec.structs.replace(reading, as_text=again))
    order = assessment.ordering_of(loaded, source)
    both = [assessment.found_of(piece, rules, order) for piece in pieces]
    assessed, tables = [found for found, _, _ in both], [table for _, table, _ in both]
    found: Outcome | Preview
    if share == 1:
        columns = assessment.columns_of(assessed)
        every = outcome.Pieces(assessed, columns, tables, functools.partial(_count, assessed, tables))
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
) -> list[assessment.Counted]:
    return [
        assessment.counted(table, each, own, divided, divided.exceptions)
        for table, each, own in zip(tables, found, codes, strict=True)
    ]


def _heads(source: Source, reading: Reading) -> tuple[list[Piece], float]:
    """Pieces from the beginning of the source, together about `piece_bytes`, and which share of it they are."""
    pieces: list[Piece] = []
    covered = 0.0
    left = reading.piece_bytes
    for part in source.parts:
        if left <= 0:
            break
        piece, share = items.read_head(part, msgspec.structs.replace(reading, piece_bytes=left))
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
