"""The leak test: proved on the written shards, not on the decisions that led to them.

The sides are read back from the shards' row ids; what the rows hold comes from the pieces of the source. Rows are
compared by their 128-bit hash, so equal rows can't be missed. Memory stays flat: of more than `_MOST` rows only those
whose hash falls below a bound are compared, a fixed part of all contents, and the record says how many.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from raylway import storage
from raylway.data import engine
from raylway.data.rowhash import mix
from raylway.features.prepared import SPLITS, LeakTest, Shard
from raylway.storage import Place

_MOST = 1 << 20


@dataclass(frozen=True)
class Contents:
    """What some kept rows of the source hold: ids uint64 [n], hashes uint64 [n, 2], in ascending order of the ids.

    `group` (uint64 [n], a hash of the group) and `instant` (float64 or int64 [n]) only for such a split.
    """

    row_ids: np.ndarray
    hashes: np.ndarray
    group: np.ndarray | None = None
    instant: np.ndarray | None = None


def leak_test(folder: Place, shards: list[Shard], rows: int, parts: Sequence[Callable[[], Contents]]) -> LeakTest:
    """Look for anything that stands on two sides of the split.

    Args:
        folder: The prepared folder with its shards written.
        shards: All of them.
        rows: Kept rows.
        parts: Each gives some kept rows of the source; together all of them.
    """
    sides = _Sides(folder, shards)
    bound = np.uint64(min(2**64 - 1, int(_MOST / max(1, rows) * 2.0**64))) if rows > _MOST else np.uint64(2**64 - 1)

    def placed(part: Callable[[], Contents]) -> _Placed:
        return _placed(part(), sides, bound)

    each = list(engine.side_by_side(placed, parts))
    groups = [part.groups for part in each if part.groups is not None]
    spans: dict[int, list[float]] = {}
    for part in each:
        for number, (low, high) in part.spans.items():
            known = spans.setdefault(number, [low, high])
            spans[number] = [min(known[0], low), max(known[1], high)]
    return LeakTest(
        rows=rows,
        compared=sum(len(part.sides) for part in each),
        unplaced=sum(part.unplaced for part in each),
        foreign=sides.rows - sum(part.found for part in each),
        row_ids_on_two_sides=sum(part.twice for part in each),
        equal_rows_on_two_sides=_on_two_sides([part.hashes for part in each], [part.sides for part in each]),
        groups_on_two_sides=_groups_on_two_sides(groups) if groups else None,
        out_of_order=_out_of_order(spans) if spans else None,
    )


@dataclass(frozen=True)
class _Placed:
    """Where some kept rows are: the hashes that are compared, with their sides, and what else is known of all."""

    hashes: np.ndarray
    sides: np.ndarray
    unplaced: int
    twice: int
    found: int
    """How often the shards hold one of all rows."""
    groups: np.ndarray | None
    """Different pairs of group and side."""
    spans: dict[int, tuple[float, float]]
    """First and last instant by side."""


def _placed(part: Contents, sides: _Sides, bound: np.uint64) -> _Placed:
    side, twice, found = sides.of(part.row_ids)
    chosen = mix(part.hashes[:, 0].copy()) <= bound
    groups, spans = None, {}
    if part.group is not None:
        groups = np.unique(np.stack([part.group, side.astype(np.uint64)], axis=1), axis=0)
    if part.instant is not None:
        for number in np.unique(side):
            mine = part.instant[side == number]
            spans[int(number)] = float(mine.min()), float(mine.max())
    return _Placed(part.hashes[chosen], side[chosen], int((side == 0).sum()), twice, found, groups, spans)


class _Sides:
    """The side of a row as the shards have it; of their row ids only the first and the last are held."""

    def __init__(self, folder: Place, shards: list[Shard]) -> None:
        self._parts = []
        self.rows = 0
        for shard in shards:
            path = storage.local(folder / shard.file, shard.bytes, shard.checksum)
            ids = _row_ids(path)
            self.rows += len(ids)
            if len(ids):
                # ascending as they were written; the test does not rely on it
                held = None if (ids[1:] > ids[:-1]).all() else np.sort(ids)
                ends = (ids if held is None else held)[[0, -1]]
                self._parts.append((SPLITS.index(shard.split) + 1, path, ends, held))

    def of(self, row_ids: np.ndarray) -> tuple[np.ndarray, int, int]:
        """int8 [n], 0 where no shard has the row; how many rows stand on more than one side; and how often the shards
        hold one of them, each counted once a shard."""
        side = np.zeros(len(row_ids), np.int8)
        twice = np.zeros(len(row_ids), bool)
        found = 0
        if not len(row_ids):
            return side, 0, 0
        for number, path, ends, held in self._parts:
            if ends[1] < row_ids[0] or ends[0] > row_ids[-1]:
                continue
            ids = _row_ids(path) if held is None else held
            at = np.minimum(np.searchsorted(ids, row_ids), len(ids) - 1)
            here = ids[at] == row_ids
            twice |= here & (side != 0) & (side != number)
            side[here] = number
            found += int(here.sum())
        return side, int(twice.sum()), found


def _row_ids(path: Path) -> np.ndarray:
    """uint64; mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()["row_id"].combine_chunks().to_numpy()


def _on_two_sides(hashes: list[np.ndarray], held: list[np.ndarray]) -> int:
    """How many different contents stand on more than one side."""
    if not hashes:
        return 0
    every, side = np.concatenate(hashes), np.concatenate(held)
    order = np.lexsort((side, every[:, 1], every[:, 0]))
    every, side = every[order], side[order]
    same = (every[1:] == every[:-1]).all(axis=1)
    return int((same & (side[1:] != side[:-1])).sum())


def _groups_on_two_sides(parts: list[np.ndarray]) -> int:
    pairs = np.unique(np.concatenate(parts), axis=0)
    _, counts = np.unique(pairs[:, 0], return_counts=True)
    return int((counts > 1).sum())


def _out_of_order(spans: dict[int, list[float]]) -> int:
    """Sides that begin before an earlier one ends."""
    ordered = [spans[number] for number in sorted(spans) if number]
    return sum(later[0] < earlier[1] for earlier, later in itertools.pairwise(ordered))
