"""Encoded rows as Arrow IPC files, cut by constants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import xxhash

from raylway import storage
from raylway.data import clean
from raylway.data.clean import Rules
from raylway.data.describe import chosen, sample
from raylway.data.items import ROW_ID, Piece
from raylway.data.roles import Names
from raylway.data.split import TRAIN
from raylway.features import fit
from raylway.features.derive import derived, parsed
from raylway.features.fit import Part, Question
from raylway.features.plan import FitPlan
from raylway.features.prepared import SPLITS, Shard, SplitName, shard_schema
from raylway.features.transform import Transform
from raylway.storage import Place

SHARD_ROWS = 1 << 18
SHARD_BYTES = 64 << 20


class Use(msgspec.Struct, frozen=True):
    """What fitting and encoding need of a piece."""

    rules: Rules
    columns: list[str]
    """Source columns behind the features and the target."""
    plan: FitPlan

    @classmethod
    def of(cls, rules: Rules, names: Names, plan: FitPlan) -> Use:
        used = [*plan.numeric, *plan.categorical, *plan.date, plan.target]
        read = frozenset().union(*map(names.reads, used))
        return cls(rules, [name for name in names.columns if name in read], plan)


class Measured(msgspec.Struct, frozen=True):
    """What one round of fitting found in the training rows of one piece."""

    rows: int
    """Of the piece."""
    part: Part
    sample: bytes
    """In the first round some kept rows (`describe.sample`)."""


class Written(msgspec.Struct, frozen=True):
    """The shards of one piece."""

    rows: int
    """Of the piece."""
    shards: list[Shard]


def measure(piece: Piece, sides: np.ndarray, use: Use, question: Question, rate: float) -> Measured:
    """Measure the training rows of a piece; `sides` is int8 [rows] (`split`), `rate` the share of rows to sample."""
    part = fit.measure(_rows(piece, np.flatnonzero(sides == TRAIN), use), use.plan, question)
    if question.known is not None:
        return Measured(len(sides), part, b"")
    some = chosen(piece.table[ROW_ID].combine_chunks().to_numpy(), sides, rate)
    rows = clean.typed_rows(piece, some, list(use.rules.types), use.rules)
    return Measured(len(sides), part, sample(rows, sides[some], 1.0))


def rows_per_shard(transform: Transform) -> int:
    """At most `SHARD_ROWS`, fewer if a row is so wide that they would be more than `SHARD_BYTES`."""
    row_bytes = 4 * (transform.num_numeric + len(transform.category_counts)) + 16
    return max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))


def numbering(per_piece: list[np.ndarray], each: int) -> list[dict[SplitName, int]]:
    """The number of each piece's first shard, by side; from the rows of each piece by side (and class)."""
    at: dict[SplitName, int] = dict.fromkeys(SPLITS, 0)
    first = []
    for piece in per_piece:
        first.append(dict(at))
        for side, name in enumerate(SPLITS, 1):
            at[name] += -(-int(piece[side].sum()) // each)
    return first


def write(piece: Piece, sides: np.ndarray, use: Use, transform: Transform, to: To) -> Written:
    """Encode the rows of a piece and write a shard or more for each side that has rows.

    Args:
        piece: The piece.
        sides: int8 [rows], the side of each row (`split`).
        use: What is needed of it.
        transform: The fitted transform.
        to: Where the shards go.
    """
    shards: list[Shard] = []
    for side, name in enumerate(SPLITS, 1):
        rows = np.flatnonzero(sides == side)
        number = to.first[piece.facts.item, piece.facts.number][name]
        for start in range(0, len(rows), to.rows):
            some = rows[start : start + to.rows]
            content = _shard(_rows(piece, some, use), transform)
            file = f"{name}-{number + start // to.rows:05d}.arrow"
            shard = Shard(name, file, len(some), content.size, xxhash.xxh3_128_hexdigest(content))
            _placed(content, storage.place(to.folder) / file, shard.checksum)
            shards.append(shard)
    return Written(len(sides), shards)


def _placed(content: pa.Buffer, place: Place, checksum: str) -> None:
    """A shard under its name; of a bucket a copy stays here for the leak test, and for training."""
    if isinstance(place, Path):
        with storage.writing(place.parent.parent):
            storage.write_bytes(place, content)
        return
    with storage.scratch(place.parent, place.name) as scratch:
        (scratch / place.name).write_bytes(content)
        storage.move(scratch / place.name, place, checksum)


@dataclass(frozen=True)
class To:
    """Where shards go."""

    folder: str
    first: dict[tuple[int, int], dict[SplitName, int]]
    """By piece (item and number): the number of its first shard of each side."""
    rows: int
    """Most rows in one shard."""


def _rows(piece: Piece, rows: np.ndarray, use: Use) -> pa.Table:
    return derived(clean.typed_rows(piece, rows, use.columns, use.rules), parsed(use.plan.derive))


def _shard(table: pa.Table, transform: Transform) -> pa.Buffer:
    encoded = transform.encode(table)
    target = transform.encode_target(table[transform.target.name])
    schema = shard_schema(transform.num_numeric, len(transform.category_counts), pa.from_numpy_dtype(target.dtype))
    columns = [
        _fixed(encoded.numeric, schema.field("numeric").type),
        _fixed(encoded.categorical, schema.field("categorical").type),
        pa.array(target),
        table[ROW_ID].combine_chunks(),
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return sink.getvalue()


def _fixed(matrix: np.ndarray, kind: pa.DataType) -> pa.Array:
    values = pa.array(np.ascontiguousarray(matrix).reshape(-1))
    return pa.Array.from_buffers(kind, len(matrix), [None], children=[values])
