"""The leak test: proved on the written shards, not on the decisions that led to them.

The sides are read back from the shards' row ids; what the rows hold comes from the pieces of the source. Rows are
compared by their 128-bit hash, so equal rows can't be missed. Memory stays flat: of more than `_MOST` rows only those
whose hash falls below a bound are compared, a fixed part of all contents, and the record says how many.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from raylway.data.rowhash import mix
from raylway.features.prepared import SPLITS, LeakTest, Shard

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


def leak_test(folder: Path, shards: list[Shard], rows: int, parts: Iterable[Contents]) -> LeakTest:
    """Look for anything that stands on two sides of the split.

    Args:
        folder: The prepared folder with its shards written.
        shards: All of them.
        rows: Kept rows.
        parts: The kept rows of the source in ascending order of their ids.
    """
    sides = _Sides(folder, shards)
    bound = np.uint64(min(2**64 - 1, int(_MOST / max(1, rows) * 2.0**64))) if rows > _MOST else np.uint64(2**64 - 1)
    hashes, held, groups = [], [], []
    unplaced = ids_twice = compared = placed = 0
    spans: dict[int, list[float]] = {}
    for part in parts:
        side, twice, found = sides.of(part.row_ids)
        ids_twice += twice
        unplaced += int((side == 0).sum())
        placed += found
        chosen = mix(part.hashes[:, 0].copy()) <= bound
        compared += int(chosen.sum())
        hashes.append(part.hashes[chosen])
        held.append(side[chosen])
        if part.group is not None:
            groups.append(np.unique(np.stack([part.group, side.astype(np.uint64)], axis=1), axis=0))
        if part.instant is not None:
            for number in np.unique(side):
                mine = part.instant[side == number]
                low, high = spans.get(int(number), [np.inf, -np.inf])
                spans[int(number)] = [min(low, float(mine.min())), max(high, float(mine.max()))]
    return LeakTest(
        rows=rows,
        compared=compared,
        unplaced=unplaced,
        foreign=sides.rows - placed,
        row_ids_on_two_sides=ids_twice,
        equal_rows_on_two_sides=_on_two_sides(hashes, held),
        groups_on_two_sides=_groups_on_two_sides(groups) if groups else None,
        out_of_order=_out_of_order(spans) if spans else None,
    )


class _Sides:
    """The side of a row as the shards have it; their row ids are mapped, not loaded."""

    def __init__(self, folder: Path, shards: list[Shard]) -> None:
        self._parts = []
        self.rows = 0
        for shard in shards:
            table = pa.ipc.open_file(pa.memory_map(str(folder / shard.file))).read_all()
            self.rows += table.num_rows
            if table.num_rows:
                ids = table["row_id"].combine_chunks().to_numpy()
                is_sorted = (ids[1:] > ids[:-1]).all()  # as they were written; the test does not rely on it
                self._parts.append((SPLITS.index(shard.split) + 1, ids if is_sorted else np.sort(ids)))

    def of(self, row_ids: np.ndarray) -> tuple[np.ndarray, int, int]:
        """int8 [n], 0 where no shard has the row; how many rows stand on more than one side; and how often the shards
        hold one of them, each counted once a shard."""
        side = np.zeros(len(row_ids), np.int8)
        twice = np.zeros(len(row_ids), bool)
        found = 0
        if not len(row_ids):
            return side, 0, 0
        for number, ids in self._parts:
            if ids[-1] < row_ids[0] or ids[0] > row_ids[-1]:
                continue
            at = np.minimum(np.searchsorted(ids, row_ids), len(ids) - 1)
            here = ids[at] == row_ids
            twice |= here & (side != 0) & (side != number)
            side[here] = number
            found += int(here.sum())
        return side, int(twice.sum()), found


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
