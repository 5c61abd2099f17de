"""Prepared data on disk, `<storage>/prepared/<fingerprint>/`: what `data` writes and what training and evaluation read.

    manifest.json            written last; without it the folder does not exist
    <split>-<number>.arrow   Arrow IPC files, memory-mapped
    quarantine/rows.jsonl    one invalid row a line: row_id, file, line, row_group, row, column, reason, cell
    quarantine/duplicates.arrow   row_id of every row that is left out as a duplicate, and first_row_id that it repeats
    profile.json             columns as they were found and what was decided about them

A shard's columns: `numeric` fixed-size list of float32, `categorical` fixed-size list of int32 (0 = unknown), `target`
(int32 class code, or float64 raw value), `row_id` uint64 (file index * 2**40 + line where the record starts; for
Parquet and python sources the row's number from 1).
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pyarrow as pa

from raylway import storage
from raylway.errors import RunFailed
from raylway.features.profile import Profile
from raylway.features.signature import Signature
from raylway.features.transform import Transform
from raylway.storage import Place, cache

FORMAT = 3
MANIFEST = "manifest.json"
DUPLICATES = "quarantine/duplicates.arrow"
LINE_BITS = 40
_AT_ONCE = 4
_TOUCH_EVERY_S = 30.0
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    split: SplitName
    file: str
    rows: int
    bytes: int
    checksum: str
    """XXH3-128 of the file."""


class Account(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where every row went: read = kept + missing + duplicates + quarantined; kept = train + validation + test."""

    read: int
    kept: int
    missing: int
    duplicates: int
    quarantined: int
    train: int
    validation: int
    test: int


class LeakTest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands on two sides of the split, counted on the written shards; 0 everywhere is a pass."""

    rows: int
    """Kept rows; the row id of each was looked for in every shard."""
    compared: int
    """Rows whose content was compared: all, or of very large data a fixed part."""
    unplaced: int
    """Kept rows that no shard holds."""
    row_ids_on_two_sides: int
    equal_rows_on_two_sides: int
    """Different contents on more than one side."""
    groups_on_two_sides: int | None = None
    """For a split by group."""
    out_of_order: int | None = None
    """For a split by time: sides that begin before an earlier one ends."""
    foreign: int = 0
    """Rows of the shards that are no kept row, or one that stands in its shard already."""

    @property
    def passed(self) -> bool:
        found = self.unplaced, self.foreign, self.row_ids_on_two_sides, self.equal_rows_on_two_sides
        return not any((*found, self.groups_on_two_sides, self.out_of_order))


class Cut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where in the order of the split test and validation end: the words of the last row, in hex; empty for no row."""

    test: str
    validation: str


class Generation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files that came together, and how their rows were divided."""

    files: int
    """How many; they follow those of the generation before in `Manifest.files`."""
    cuts: dict[str, Cut]
    """By stratum: the class, or an empty name."""


class Lineage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What prepared data of more files must know to leave the sides of these rows as they are."""

    section: str = ""
    """Hash of what the job says of the data, the seed and our code."""
    sources: list[tuple[str, str]] = []
    """Name and checksum of each file or archive, in the order of the row ids."""
    base: str = ""
    """Fingerprint of the prepared data that this one continues; empty for none."""
    types: dict[str, str] = {}
    task: str = ""
    generations: list[Generation] = []


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    fingerprint: str
    account: Account
    classes: dict[SplitName, list[int]]
    """Rows of each class by split, in the order of the classes; empty lists for regression."""
    signature: Signature
    transform: Transform
    files: list[str]
    """Source files; the position is the file index of the row ids."""
    shards: list[Shard]
    decisions: list[str]
    """What was decided about the data, one sentence each (types, columns left out)."""
    warnings: list[str] = []
    """What in the data may ruin the model, one sentence each with what to do."""
    profile: Profile | None = None
    """Of a sample of the training rows."""
    leak_test: LeakTest | None = None
    lineage: Lineage = Lineage()


class Rows:
    """The rows of one split, memory-mapped: a shard is opened when rows of it are first taken; one of a bucket is
    fetched then, if `ahead` has not done so.

    Args:
        folder: The prepared folder.
        shards: Shards of one split, in order; none for a split without rows.
        schema: Of the shards.
        verify: Compare a shard's checksum when it is opened; what comes from a bucket always is.

    Raises:
        RunFailed: A shard is missing or damaged.
    """

    def __init__(self, folder: Place, shards: list[Shard], schema: pa.Schema, verify: bool = False) -> None:
        self._folder, self._shards, self._verify = folder, shards, verify
        if isinstance(folder, Path):
            for shard in shards:
                _check_size(folder / shard.file, shard)
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        self._none = _Opened.of(schema.empty_table())
        self._open: dict[int, _Opened] = {}
        self._fetcher: ThreadPoolExecutor | None = None
        self._asked: set[int] = set()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Copy rows by position (int64 [n], in any order).

        Returns:
            numeric float32 [n, D], categorical int32 [n, C], target [n], row_id uint64 [n].

        Raises:
            RunFailed: A shard that is read for the first time is damaged.
        """
        owner = self._owner(positions)
        some = np.unique(owner)
        if len(some) == 1:
            opened = self._opened(int(some[0]))
            inside = positions - self._starts[some[0]]
            return opened.numeric[inside], opened.categorical[inside], opened.target[inside], opened.row_id[inside]
        taken = self._none.of_rows(len(positions))
        for index in some:
            mine = owner == index
            inside = positions[mine] - self._starts[index]
            opened = self._opened(int(index))
            taken.numeric[mine] = opened.numeric[inside]
            taken.categorical[mine] = opened.categorical[inside]
            taken.target[mine] = opened.target[inside]
            taken.row_id[mine] = opened.row_id[inside]
        return taken.numeric, taken.categorical, taken.target, taken.row_id

    def targets(self) -> np.ndarray:
        """The target of every row [N], in the order of the shards: one read of all shards (4 or 8 bytes a row)."""
        every = [self._opened(index).target for index in range(len(self._shards))]
        return np.concatenate([*every, self._none.target])

    def ahead(self, positions: np.ndarray) -> None:
        """Fetch in the background what `take` of these positions will need from a bucket. Returns at once."""
        if isinstance(self._folder, Path):
            return
        self._fetcher = self._fetcher or ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="shards")
        for index in set(np.unique(self._owner(positions)).tolist()) - self._asked - self._open.keys():
            self._asked.add(index)
            self._fetcher.submit(self._local, index)

    def _owner(self, positions: np.ndarray) -> np.ndarray:
        """The shard of each position."""
        return np.searchsorted(self._starts, positions, side="right") - 1

    def _opened(self, index: int) -> _Opened:
        if (found := self._open.get(index)) is None:
            path = self._local(index)
            if self._verify and isinstance(self._folder, Path):
                _check_content(path, self._shards[index])
            found = self._open[index] = _Opened.of(pa.ipc.open_file(pa.memory_map(str(path))).read_all(), path)
            # What the cache has removed would keep its room on the disk while it is mapped here.
            self._open = {at: each for at, each in self._open.items() if at == index or each.is_there}
            self._asked.discard(index)
        found.touch()
        return found

    def _local(self, index: int) -> Path:
        shard = self._shards[index]
        try:
            return storage.local(self._folder / shard.file, shard.bytes, shard.checksum)
        except FileNotFoundError:
            raise _missing(self._folder / shard.file) from None


class _Opened:
    """The columns of a mapped shard."""

    def __init__(self, columns: list[np.ndarray], path: Path | None) -> None:
        self.numeric, self.categorical, self.target, self.row_id = columns
        self._path = path
        self._touched_at = time.monotonic()

    @classmethod
    def of(cls, table: pa.Table, path: Path | None = None) -> _Opened:
        matrices = [_matrix(table["numeric"], np.float32), _matrix(table["categorical"], np.int32)]
        return cls([*matrices, *(table[name].combine_chunks().to_numpy() for name in ("target", "row_id"))], path)

    def of_rows(self, count: int) -> _Opened:
        """Room for so many rows of its kind."""
        columns = (self.numeric, self.categorical, self.target, self.row_id)
        return _Opened([np.empty((count, *each.shape[1:]), each.dtype) for each in columns], None)

    @property
    def is_there(self) -> bool:
        return self._path is not None and self._path.exists()

    def touch(self) -> None:
        """Tell the cache now and then that the shard is in use."""
        if self._path is not None and time.monotonic() - self._touched_at > _TOUCH_EVERY_S:
            self._touched_at = time.monotonic()
            cache.touch(self._path)


class Prepared:
    """An open prepared folder, or one of a bucket.

    Raises:
        UserError: The manifest is damaged or of another format version.
        FileNotFoundError: The folder is not whole.
    """

    def __init__(self, folder: Place) -> None:
        self.folder = folder
        self.manifest = storage.read_record(folder / MANIFEST, Manifest)

    def shards(self, split: SplitName) -> list[Shard]:
        return [shard for shard in self.manifest.shards if shard.split == split]

    def rows(self, split: SplitName, verify: bool = False) -> Rows:
        transform = self.manifest.transform
        target = pa.int32() if transform.target.task == "classification" else pa.float64()
        schema = shard_schema(transform.num_numeric, len(transform.category_counts), target)
        return Rows(self.folder, self.shards(split), schema, verify)


def shard_schema(num_numeric: int, num_categorical: int, target: pa.DataType) -> pa.Schema:
    return pa.schema(
        {
            "numeric": pa.list_(pa.float32(), num_numeric),
            "categorical": pa.list_(pa.int32(), num_categorical),
            "target": target,
            "row_id": pa.uint64(),
        }
    )


def _matrix(column: pa.ChunkedArray, dtype: type) -> np.ndarray:
    array = column.combine_chunks()
    return array.flatten().to_numpy().astype(dtype, copy=False).reshape(len(array), array.type.list_size)


def _check_size(path: Path, shard: Shard) -> None:
    if storage.size(path) != shard.bytes:
        raise _missing(path)


def _missing(place: Place) -> RunFailed:
    return RunFailed(f"{place}: the shard is missing or damaged; remove {place.parent} and run the job again")


def _check_content(path: Path, shard: Shard) -> None:
    if storage.checksum(path) != shard.checksum:
        raise RunFailed(f"{path}: the shard is damaged; remove {path.parent} and run the job again")
