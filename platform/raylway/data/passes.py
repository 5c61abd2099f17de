"""What the passes do to one item or piece, in whatever process: read and assess, measure, write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import xxhash

from raylway import storage
from raylway.data import division, items, pieces, shards
from raylway.data.assessment import Counted, Found, counted, found_of
from raylway.data.clean import Rules
from raylway.data.csv_read import Reject
from raylway.data.division import Division, Exceptions
from raylway.data.items import Facts, Piece, Reading
from raylway.data.ordering import Ordering
from raylway.data.pieces import Keyed
from raylway.data.shards import Measured, To, Use, Written
from raylway.errors import UserError
from raylway.features.fit import Question
from raylway.features.transform import Transform
from raylway.storage import Place

_FACTS = "facts"
# Where threads are the first to decode a type, msgspec 0.22 ends the process: what one has half looked up, another
# takes for whole. These are looked up here.
msgspec.msgpack.Decoder(tuple[pieces.Whole, list[Facts], list[Found]])


class ReadItem(msgspec.Struct, frozen=True):
    """What the first pass found in one item."""

    name: str
    key: str
    size: int
    """Bytes of the source."""
    facts: list[Facts]
    """By piece."""
    found: list[Found]
    """By piece; nothing if the rules did not fit."""
    reads: int
    """1 if the item was read, 0 if it was on disk already."""

    @property
    def is_assessed(self) -> bool:
        return len(self.found) == len(self.facts)

    def slim(self) -> ReadItem:
        """Without what is merged over all items (`assessment.columns_of`)."""
        return msgspec.structs.replace(self, found=[each.slim() for each in self.found])


class PieceTask(msgspec.Struct, frozen=True):
    """One piece whose rows have sides."""

    name: str
    """Of its item."""
    key: str
    facts: Facts
    found: Found
    codes: list[int]
    """Its class codes in terms of all classes."""
    exceptions: Exceptions
    """Of its rows."""


def read(keyed: Keyed, reading: Reading, rules: Rules | None, order: Ordering, folder: str, must_fit: bool) -> ReadItem:
    """Read an item into pieces and hold their rows to the rules, whatever of it is not on disk already.

    Args:
        keyed: The item.
        reading: How it is read.
        rules: What its rows are held to; None to read only.
        order: What decides the side of a row.
        folder: Of all pieces.
        must_fit: Whether an expression that does not fit its columns is an error; else the rows stay unassessed.

    Raises:
        UserError: The file is damaged, or an expression does not fit.
    """
    place = storage.place(folder) / keyed.key
    pieces.touch(place)
    facts = pieces.read_whole(place, _FACTS, list[Facts])
    reads = int(facts is None)
    if facts is None:
        facts, made = [], {}
        for piece in items.read(keyed.item, reading):
            name = f"{piece.facts.number}.arrow"
            made[name] = pieces.write_table(place, name, piece.table)
            facts.append(piece.facts)
        pieces.write_whole(place, _FACTS, facts, made)
    facts = [msgspec.structs.replace(fact, item=keyed.item.index) for fact in facts]
    # what they reject is kept with the assessment
    found = _found(place, facts, rules, order, must_fit) if rules else []
    facts = [msgspec.structs.replace(fact, rejects=[]) for fact in facts]
    return ReadItem(keyed.name, keyed.key, sum(part.size for part in keyed.item.parts), facts, found, reads)


def count(task: PieceTask, folder: str, assessment: str, divided: Division) -> Counted:
    """Rows of a piece by side and class."""
    table = rows(storage.place(folder), task.key, task.facts.number, assessment)
    return counted(table, task.found, task.codes, divided, task.exceptions)


def measure(
    task: PieceTask, folder: str, assessment: str, divided: Division, use: Use, question: Question, rate: float
) -> Measured:
    """`shards.measure` of a piece on disk."""
    return shards.measure(*_with_sides(task, folder, assessment, divided), use, question, rate)


def write(
    task: PieceTask, folder: str, assessment: str, divided: Division, use: Use, transform: Transform, to: To
) -> Written:
    """`shards.write` of a piece on disk."""
    return shards.write(*_with_sides(task, folder, assessment, divided), use, transform, to)


def rejects(folder: Place, key: str, number: int, assessment: str) -> list[Reject]:
    """The invalid rows of a piece."""
    return msgspec.msgpack.decode((folder / key / f"{assessment}-{number}.rejects").read_bytes(), type=list[Reject])


def rows(folder: Place, key: str, number: int, assessment: str) -> pa.Table:
    """The usable rows of a piece in order (`ordering.ordered`), memory-mapped."""
    return pieces.read_table(folder / key, _rows_name(assessment, number), assessment)


@dataclass(frozen=True)
class Tables(Sequence[pa.Table]):
    """The usable rows of all pieces, each mapped only as long as it is looked at: memory does not grow with the data.

    Args:
        folder: Of all pieces.
        assessment: What became of their rows.
        places: Key and number of each piece.
    """

    folder: Place
    assessment: str
    places: list[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> pa.Table:
        key, number = self.places[index]
        return rows(self.folder, key, number, self.assessment)


def assessment_of(rules: Rules, order: Ordering) -> str:
    """The name of what becomes of rows under these rules."""
    return f"rules-{xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode([pieces.VERSION, rules, order]))[:16]}"


def _found(place: Place, facts: list[Facts], rules: Rules, order: Ordering, must_fit: bool) -> list[Found]:
    assessment = assessment_of(rules, order)
    found = pieces.read_whole(place, assessment, list[Found])
    if found is None:
        found, made = [], {}
        try:
            for fact in facts:
                one, table, invalid = found_of(_opened(place, fact), rules, order)
                name = _rows_name(assessment, fact.number)
                made[name] = pieces.write_table(place, name, table)
                name = f"{assessment}-{fact.number}.rejects"
                made[name] = pieces.write_bytes(place, name, msgspec.msgpack.encode(invalid))
                found.append(one)
        except UserError:
            if must_fit:
                raise
            return []
        pieces.write_whole(place, assessment, found, made)
    return found


def _rows_name(assessment: str, number: int) -> str:
    return f"{assessment}-{number}.arrow"


def _with_sides(task: PieceTask, folder: str, assessment: str, divided: Division) -> tuple[Piece, np.ndarray]:
    """A piece, and the side of each of its rows: int8 (`split`)."""
    place = storage.place(folder) / task.key
    table = pieces.read_table(place, _rows_name(assessment, task.facts.number), assessment)
    sides = np.zeros(task.facts.rows, np.int8)
    own = division.sides(table, np.array(task.codes, np.int32), divided, task.exceptions)
    sides[table["position"].to_numpy()] = own
    return _opened(place, task.facts), sides


def _opened(place: Place, facts: Facts) -> Piece:
    return Piece(pieces.read_table(place, f"{facts.number}.arrow", _FACTS), facts)
