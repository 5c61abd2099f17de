"""What the passes do to one item or piece, in whatever process: read and assess, measure, write."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import xxhash

from raylway.data import clean, items, pieces, shards
from raylway.data.clean import Assessed, Rules
from raylway.data.items import Facts, Piece, Reading
from raylway.data.pieces import Keyed
from raylway.data.shards import Measured, To, Use, Written
from raylway.errors import UserError
from raylway.features.transform import Transform

_FACTS = "facts"


class ReadItem(msgspec.Struct, frozen=True):
    """What the first pass found in one item."""

    key: str
    size: int
    """Bytes of the source."""
    facts: list[Facts]
    """By piece."""
    assessed: list[Assessed]
    """By piece; nothing if the rules did not fit."""

    @property
    def is_assessed(self) -> bool:
        return len(self.assessed) == len(self.facts)


class PieceTask(msgspec.Struct, frozen=True):
    """One piece, and the side of each of its rows (int8, `split`)."""

    key: str
    facts: Facts
    sides: bytes


def read(keyed: Keyed, reading: Reading, rules: Rules | None, folder: str, must_fit: bool) -> ReadItem:
    """Read an item into pieces and hold their rows to the rules, whatever of it is not on disk already.

    Args:
        keyed: The item.
        reading: How it is read.
        rules: What its rows are held to; None to read only.
        folder: Of all pieces.
        must_fit: Whether an expression that does not fit its columns is an error; else the rows stay unassessed.

    Raises:
        UserError: The file is damaged, or an expression does not fit.
    """
    place = Path(folder) / keyed.key
    place.mkdir(parents=True, exist_ok=True)
    pieces.touch(place)
    facts = pieces.read_whole(place, _FACTS, list[Facts])
    if facts is None:
        facts, made = [], {}
        for piece in items.read(keyed.item, reading):
            name = f"{piece.facts.number}.arrow"
            made[name] = pieces.write_table(place, name, piece.table)
            facts.append(piece.facts)
        pieces.write_whole(place, _FACTS, facts, made)
    facts = [msgspec.structs.replace(fact, item=keyed.item.index) for fact in facts]
    assessed = _assessed(place, facts, rules, must_fit) if rules else []
    return ReadItem(keyed.key, sum(part.size for part in keyed.item.parts), facts, assessed)


def _assessed(place: Path, facts: list[Facts], rules: Rules, must_fit: bool) -> list[Assessed]:
    name = f"rules-{xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode([pieces.VERSION, rules]))[:16]}"
    found = pieces.read_whole(place, name, list[Assessed])
    if found is None:
        try:
            found = [clean.assess(_opened(place, each), rules) for each in facts]
        except UserError:
            if must_fit:
                raise
            return []
        pieces.write_whole(place, name, found, {})
    return [msgspec.structs.replace(each, item=fact.item) for each, fact in zip(found, facts, strict=True)]


def measure(task: PieceTask, folder: str, use: Use, target_is_number: bool) -> Measured:
    """`shards.measure` of a piece on disk."""
    return shards.measure(*_piece(task, folder), use, target_is_number)


def write(task: PieceTask, folder: str, use: Use, transform: Transform, to: To) -> Written:
    """`shards.write` of a piece on disk."""
    return shards.write(*_piece(task, folder), use, transform, to)


def _piece(task: PieceTask, folder: str) -> tuple[Piece, np.ndarray]:
    return _opened(Path(folder) / task.key, task.facts), np.frombuffer(task.sides, np.int8)


def _opened(place: Path, facts: Facts) -> Piece:
    return Piece(pieces.read_table(place, f"{facts.number}.arrow"), facts)
