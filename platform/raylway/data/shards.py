"""Encoded rows as Arrow IPC files, cut by constants."""

from __future__ import annotations

from collections import Counter
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
from raylway.data.roles import Names, Roles
from raylway.data.split import TRAIN
from raylway.errors import UserError
from raylway.features.prepared import SPLITS, Shard, SplitName, shard_schema
from raylway.features.signature import Task
from raylway.features.transform import Moments, Statistics, Target, Transform, derived, fit

SHARD_ROWS = 1 << 18
SHARD_BYTES = 64 << 20


class Use(msgspec.Struct, frozen=True):
    """What fitting and encoding need of a piece."""

    rules: Rules
    columns: list[str]
    """Source columns behind the features and the target."""
    derive: dict[str, str]
    """What the features and the target need, in order."""
    numeric: list[str]
    categorical: list[str]
    target: str

    @classmethod
    def of(cls, rules: Rules, names: Names, roles: Roles) -> Use:
        used = [*roles.numeric, *roles.categorical, names.target]
        read = frozenset().union(*map(names.reads, used))
        computed = frozenset().union(*map(names.derives, used))
        return cls(
            rules,
            [name for name in names.columns if name in read],
            {name: text for name, text in names.derive.items() if name in computed},
            roles.numeric,
            roles.categorical,
            names.target,
        )


class Measured(msgspec.Struct, frozen=True):
    """`features.transform.Statistics` of the training rows of one piece, the target among the numbers if it is one."""

    rows: int
    """Of the piece."""
    numeric: dict[str, Moments]
    categorical: dict[str, dict[str, int]]
    sample: bytes
    """Some kept rows (`describe.sample`)."""


class Written(msgspec.Struct, frozen=True):
    """The shards of one piece."""

    rows: int
    """Of the piece."""
    shards: list[Shard]


def measure(piece: Piece, sides: np.ndarray, use: Use, target_is_number: bool, rate: float) -> Measured:
    """Measure the training rows of a piece; `sides` is int8 [rows] (`split`), `rate` the share of rows to sample."""
    table = _rows(piece, np.flatnonzero(sides == TRAIN), use)
    statistics = Statistics.of(table, [*use.numeric, *[use.target] * target_is_number], use.categorical)
    counts = {name: dict(each) for name, each in statistics.categorical.items()}
    some = chosen(piece.table[ROW_ID].combine_chunks().to_numpy(), sides, rate)
    rows = clean.typed_rows(piece, some, list(use.rules.types), use.rules)
    return Measured(len(sides), statistics.numeric, counts, sample(rows, sides[some], 1.0))


def fitted(parts: list[Measured], task: Task, classes: list[str], roles: Roles, target: str) -> Transform:
    """The transform of all training rows, from the parts in the order of the rows.

    Raises:
        UserError: A column's numbers are too large to be standardised.
    """
    total = Statistics()
    for part in parts:
        total = total.merged(Statistics(part.numeric, {name: Counter(c) for name, c in part.categorical.items()}))
    for name, moments in total.numeric.items():
        if not np.isfinite(moments.mean) or not np.isfinite(moments.spread):
            raise UserError(
                f"the numbers of column {name!r} are too large to be standardised",
                where=name,
                expected="squares within the range of a double, below 1e308",
                found=f"values from {moments.minimum:g} to {moments.maximum:g}",
                fix="rescale the column, or list it under data.features.drop",
            )
    if task == "classification":
        return fit(total, roles.derive, Target(target, task, classes, 0.0, 1.0))
    moments = total.numeric.pop(target)
    return fit(total, roles.derive, Target(target, task, [], moments.mean, moments.spread or 1.0))


def rows_per_shard(use: Use) -> int:
    """At most `SHARD_ROWS`, fewer if a row is so wide that they would be more than `SHARD_BYTES`."""
    row_bytes = 4 * (len(use.numeric) + len(use.categorical)) + 16
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
            storage.write_bytes(Path(to.folder) / file, content)
            shards.append(Shard(name, file, len(some), content.size, xxhash.xxh3_128_hexdigest(content)))
    return Written(len(sides), shards)


@dataclass(frozen=True)
class To:
    """Where shards go."""

    folder: str
    first: dict[tuple[int, int], dict[SplitName, int]]
    """By piece (item and number): the number of its first shard of each side."""
    rows: int
    """Most rows in one shard."""


def _rows(piece: Piece, rows: np.ndarray, use: Use) -> pa.Table:
    return derived(clean.typed_rows(piece, rows, use.columns, use.rules), use.derive)


def _shard(table: pa.Table, transform: Transform) -> pa.Buffer:
    encoded = transform.encode(table)
    target = transform.encode_target(table[transform.target.name])
    schema = shard_schema(len(transform.numeric), len(transform.categorical), pa.from_numpy_dtype(target.dtype))
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
