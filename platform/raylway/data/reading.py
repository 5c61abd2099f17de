"""The first pass: from the source's files to pieces on disk, types over the whole data, and rows held to the rules."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from raylway.data import assessment, csv_read, engine, items, passes, pieces
from raylway.data.assessment import Columns
from raylway.data.clean import Rules
from raylway.data.columns import Seen
from raylway.data.csv_text import Scan
from raylway.data.decide import Types, lost, refuse_infinite
from raylway.data.items import Item, Part, Range, Reading, Stream
from raylway.data.opening import Source, no_rows
from raylway.data.passes import ReadItem
from raylway.data.roles import Names
from raylway.errors import UserError
from raylway.features.prepared import Generation
from raylway.job.load import LoadedJob
from raylway.runs.progress import Stage
from raylway.storage import Place

FEW_HERE = 1000
"""So many tasks that take milliseconds each are done in this process: of ranges of a file, 16 GB."""
_EXPECT_BYTES = 1 << 20


@dataclass(frozen=True)
class Found:
    """What the first pass found."""

    items: list[ReadItem]
    """In the order of the rows."""
    rules: Rules
    """What the rows were held to."""
    types: Types
    seen: dict[str, Seen]
    columns: Columns
    """Over all rows that could be read."""
    assessment: str
    """Name of what became of the rows, beside each piece."""
    fresh: int
    """Bytes of the source that were read now; the others were on disk as pieces."""


def read(
    loaded: LoadedJob, source: Source, names: Names, past: list[Generation], kept: Place, stage: Stage, few: int | None
) -> Found:
    """Read and assess the source, whatever of it is not on disk already.

    Rows are assessed as they are read, under the types that the source's first bytes suggest; where the whole data
    decides otherwise, they are assessed again from the pieces.

    Args:
        loaded: The job.
        source: Its source.
        names: Its names.
        past: Generations of files that were prepared before: what they hold is cut as it was then.
        kept: The folder of all pieces.
        stage: Where progress goes.
        few: At most so many items are read by this process (`engine.run`).

    Raises:
        UserError: A file is damaged, a column fits no type, or there is no row.
    """
    todo = _items(cut(source, few), past)
    order = assessment.ordering_of(loaded, source)
    rules = _expected_rules(loaded, source, names)
    how = loaded.job.data.read
    reading = Reading(source.columns, names.numeric, csv_read.RANGE_BYTES, [], how.decimal, how.missing_words)
    fresh: dict[str, int] = {}
    total = sum(part.size for item in todo for part in item.parts) / 1e6

    def over(rules: Rules | None, must_fit: bool) -> tuple[list[ReadItem], Columns]:
        bound = functools.partial(
            passes.read, reading=reading, rules=rules, order=order, folder=str(kept), must_fit=must_fit
        )
        read: list[ReadItem] = []

        def found() -> Iterator[assessment.Found]:
            done = 0.0
            for item in engine.run(bound, [pieces.keyed(item, reading) for item in todo], ReadItem, few):
                done += item.size / 1e6
                stage.update(min(done, total), total, "MB read")
                fresh[item.key] = max(fresh.get(item.key, 0), item.size * item.reads)
                yield from item.found
                read.append(item.slim())

        columns = assessment.columns_of(found())
        return read, columns

    while True:
        read, columns = over(rules, must_fit=False)
        if not sum(facts.read for item in read for facts in item.facts):
            raise no_rows(loaded.location("data.source"), source)
        seen = assessment.merged([facts.seen for item in read for facts in item.facts])
        types = assessment.types_of(loaded, names, seen, source.places)
        decided = assessment.rules_of(loaded, names, types)
        if again := lost(seen, types.of):
            # a late word made text of a column whose earlier pieces kept numbers only: their text is read again
            reading, rules = msgspec.structs.replace(reading, as_text=again), decided
            continue
        refuse_infinite(seen, types.of, loaded.job.data.clean, set(names.drop), source.places)
        if decided != rules or not all(item.is_assessed for item in read):
            read, columns = over(decided, must_fit=True)
        return Found(read, decided, types, seen, columns, passes.assessment_of(decided, order), sum(fresh.values()))


def _expected_rules(loaded: LoadedJob, source: Source, names: Names) -> Rules | None:
    """The rules under the types that the source's first bytes suggest; None where they suggest none."""
    how = loaded.job.data.read
    reading = Reading(source.columns, names.numeric, _EXPECT_BYTES, [], how.decimal, how.missing_words)
    piece, _ = items.read_head(source.parts[0], reading)
    try:
        types = assessment.types_of(loaded, names, piece.facts.seen, source.places)
        return assessment.rules_of(loaded, names, types)
    except UserError:  # the whole data may be right where its beginning is not
        return None


def _items(parts: list[Part], past: list[Generation]) -> list[Item]:
    """The items, those of each generation on their own: more files do not change how the earlier ones are grouped."""
    ends = np.cumsum([each.files for each in past])
    result: list[Item] = []
    by_generation = itertools.groupby(parts, key=lambda part: int(np.searchsorted(ends, part.file, side="right")))
    for _, some in by_generation:
        for item in items.grouped(list(some), csv_read.RANGE_BYTES):
            result.append(msgspec.structs.replace(item, index=len(result)))
    return result


def cut(source: Source, few: int | None = None) -> list[Part]:
    """The source's parts, large plain CSV files cut into ranges if their quotes are regular; `few` as in `read`."""
    step = csv_read.RANGE_BYTES
    uncut = {
        index: [
            Range(part.file, part.location, part.heading, start, end, False, 0)
            for start, end in items.ranges(part, step)
        ]
        for index, part in enumerate(source.parts)
        if isinstance(part, Stream) and part.is_cut and part.size - part.heading.offset > step
    }
    if not uncut:
        return source.parts
    every = [part for parts in uncut.values() for part in parts]
    scans = engine.run(items.scan, every, Scan, max(FEW_HERE, few or 0))
    cut: list[Part] = []
    for index, part in enumerate(source.parts):
        pieces = [(piece, next(scans)) for piece in uncut.get(index, [])]
        cut += items.placed(pieces) or [part]
    return cut
