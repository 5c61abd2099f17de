"""The leak test: proved on the written shards, not on the decisions that led to them.

The sides are read back from the shards' row ids; what the rows hold comes from the pieces of the source. All rows are
compared, by their 128-bit hash, so equal rows can't be missed: one range of keys after the other, as they were divided.
Memory stays flat but for a byte a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from raylway import storage
from raylway.data import division, engine
from raylway.features.prepared import SPLITS, LeakTest, Shard
from raylway.storage import Place


@dataclass(frozen=True)
class Contents:
    """The kept rows of a piece: ids uint64 [n], ascending, and their places in its table (`ordering`), int64 [n].

    `group` (uint64 [n], a hash of the group) and `instant` (float64 or int64 [n]) only for such a split.
    """

    row_ids: np.ndarray
    places: np.ndarray
    group: np.ndarray | None = None
    instant: np.ndarray | None = None


def leak_test(
    folder: Place,
    shards: list[Shard],
    rows: int,
    parts: Sequence[Callable[[], Contents]],
    tables: Sequence[pa.Table],
) -> LeakTest:
    """Look for anything that stands on two sides of the split.

    Args:
        folder: The prepared folder with its shards written.
        shards: All of them.
        rows: Kept rows.
        parts: By piece: its kept rows.
        tables: By piece: its usable rows (`ordering.ordered`).
    """
    sides = _Sides(folder, shards)
    each = list(engine.side_by_side(lambda part: _placed(part(), sides), parts))
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
        equal_rows_on_two_sides=_contents_on_two_sides(tables, each),
        groups_on_two_sides=_groups_on_two_sides(groups) if groups else None,
        out_of_order=_out_of_order(spans) if spans else None,
    )


@dataclass(frozen=True)
class _Placed:
    """Where the kept rows of a piece are."""

    places: np.ndarray
    """In its table."""
    sides: np.ndarray
    """int8 [n]; 0 where no shard has the row."""
    unplaced: int
    twice: int
    found: int
    """How often the shards hold one of all rows."""
    groups: np.ndarray | None
    """Different pairs of group and side."""
    spans: dict[int, tuple[float, float]]
    """First and last instant by side."""


def _placed(part: Contents, sides: _Sides) -> _Placed:
    side, twice, found = sides.of(part.row_ids)
    groups, spans = None, {}
    if part.group is not None:
        groups = np.unique(np.stack([part.group, side.astype(np.uint64)], axis=1), axis=0)
    if part.instant is not None:
        for number in np.unique(side):
            mine = part.instant[side == number]
            spans[int(number)] = float(mine.min()), float(mine.max())
    return _Placed(part.places, side, int((side == 0).sum()), twice, found, groups, spans)


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


def _contents_on_two_sides(tables: Sequence[pa.Table], placed: list[_Placed]) -> int:
    """How many different contents stand on more than one side."""
    edges = division.key_ranges(tables)
    held = []
    for table, each in zip(tables, placed, strict=True):
        sides = np.full(table.num_rows, -1, np.int8)
        sides[each.places] = each.sides
        held.append(sides)

    def words(number: int) -> list[np.ndarray]:
        """The hashes and the side of the rows of a range, copied: what is mapped stays in memory while it is held."""
        parts = []
        for table, own, sides in zip(tables, edges, held, strict=True):
            some = table.slice(own[number], own[number + 1] - own[number])
            mapped = [some[name].to_numpy() for name in ("key", "identity", "rest") if name in table.column_names]
            parts.append([*mapped, sides[own[number] : own[number + 1]]])
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def counted(number: int) -> int:
        *hashes, side = words(number)
        kept = side >= 0
        return _on_two_sides([word[kept] for word in hashes], side[kept])

    return sum(engine.side_by_side(counted, range(len(edges[0]) - 1))) if edges else 0


def _on_two_sides(words: list[np.ndarray], side: np.ndarray) -> int:
    """Of rows with their words, of which the first alone tells nearly all apart."""
    order = np.argsort(words[0], kind="stable")
    key = words[0][order]
    begins = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: len(key)])
    if not len(begins):
        return 0
    mixed = np.minimum.reduceat(side[order], begins) != np.maximum.reduceat(side[order], begins)
    rows = order[np.repeat(mixed, np.diff(np.append(begins, len(order))))]
    rows = rows[np.lexsort((side[rows], *(word[rows] for word in words)))]
    same = np.logical_and.reduce([word[rows][1:] == word[rows][:-1] for word in words])
    return int((same & (side[rows][1:] != side[rows][:-1])).sum())


def _groups_on_two_sides(parts: list[np.ndarray]) -> int:
    pairs = np.unique(np.concatenate(parts), axis=0)
    _, counts = np.unique(pairs[:, 0], return_counts=True)
    return int((counts > 1).sum())


def _out_of_order(spans: dict[int, list[float]]) -> int:
    """Sides that begin before an earlier one ends."""
    ordered = [spans[number] for number in sorted(spans) if number]
    return sum(later[0] < earlier[1] for earlier, later in itertools.pairwise(ordered))
