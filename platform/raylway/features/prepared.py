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

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from raylway import storage
from raylway.errors import RunFailed, UserError
from raylway.features.profile import Profile
from raylway.features.signature import Signature
from raylway.features.transform import Transform
from raylway.storage import Place

FORMAT = 3
MANIFEST = "manifest.json"
QUARANTINE = "quarantine/rows.jsonl"
DUPLICATES = "quarantine/duplicates.arrow"
PROFILE = "profile.json"
LINE_BITS = 40
MOST_OPEN = 4_096
"""Shards of a split: each is a mapping of memory, of which a process may have some ten thousands."""
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
    """Rows whose content was compared: all, or as an earlier version had it a fixed part."""
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
    set_aside: dict[str, str] = {}
    """XXH3-128 of `QUARANTINE` and `DUPLICATES`; empty of an earlier version."""


class ColumnReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`PROFILE`."""

    columns: list[dict[str, Any]]
    """Each column as it was found, what it is used as and why (`data.report`)."""
    warnings: list[str] = []


class _Columns(NamedTuple):
    """Of one shard, memory-mapped."""

    numeric: np.ndarray
    """float32 [n, D]"""
    categorical: np.ndarray
    """int32 [n, C]"""
    target: np.ndarray
    row_id: np.ndarray
    """uint64 [n]"""


class Rows:
    """The rows of one split, memory-mapped. A shard is opened when rows of it are first taken; the newest stay open.
    One of a bucket is fetched then, and stays open as long as the cache of this machine keeps it.

    Several threads may use it at once.

    Args:
        folder: The prepared folder.
        shards: Shards of one split, in order; none for a split without rows.
        schema: Of the shards.
        verify: Compare a shard's checksum when rows of it are first taken; what is fetched always is.
    """

    def __init__(self, folder: Place, shards: list[Shard], schema: pa.Schema, verify: bool = False) -> None:
        self._folder, self._shards = folder, shards
        self._empty = _columns(schema.empty_table())
        self._unverified = set(range(len(shards))) if verify else set()
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        self._open: dict[int, tuple[_Columns, Path]] = {}
        self._locks: dict[int, threading.Lock] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Copy rows by position (int64 [n], in any order).

        Returns:
            numeric float32 [n, D], categorical int32 [n, C], target [n], row_id uint64 [n].

        Raises:
            RunFailed: A shard is missing or damaged.
        """
        if not len(positions):
            return tuple(part[positions] for part in self._empty)
        if len(self._shards) == 1:
            numeric, categorical, target, row_id = self._shard(0)
            return numeric[positions], categorical[positions], target[positions], row_id[positions]
        found = tuple(np.empty((len(positions), *part.shape[1:]), part.dtype) for part in self._empty)
        owner = np.searchsorted(self._starts, positions, side="right") - 1
        by_shard = np.argsort(owner, kind="stable")
        shards, begins = np.unique(owner[by_shard], return_index=True)
        for shard, places in zip(shards.tolist(), np.split(by_shard, begins[1:]), strict=True):
            inside = positions[places] - self._starts[shard]
            for column, part in zip(found, self._shard(shard), strict=True):
                column[places] = part[inside]
        return found[0], found[1], found[2], found[3]

    def open(self, spans: np.ndarray) -> None:
        """Open, and read once to compare the checksums, the shards that hold some rows, before they are taken.

        Args:
            spans: int64 [S, 2], first position and count, each within one shard.

        Raises:
            RunFailed: A shard is missing or damaged.
        """
        for shard in np.unique(np.searchsorted(self._starts, spans[:, 0], side="right") - 1).tolist():
            self._shard(shard)

    @property
    def opened(self) -> list[str]:
        """Files of the shards that are open."""
        return sorted(self._shards[shard].file for shard in self._open)

    def targets(self) -> np.ndarray:
        """The target of every row [N], in the order of the shards: one read of all shards (4 or 8 bytes a row)."""
        return np.concatenate([self._empty.target, *(self._shard(index).target for index in range(len(self._shards)))])

    def _shard(self, index: int) -> _Columns:
        found = self._open.get(index)
        if found is None:
            with self._locks.setdefault(index, threading.Lock()):
                found = self._open.get(index)
                return self._mapped(index) if found is None else found[0]
        return found[0]

    def _mapped(self, index: int) -> _Columns:
        shard = self._shards[index]
        path = self._local(shard)
        if index in self._unverified and isinstance(self._folder, Path):
            _check_content(path, shard)
            self._unverified.remove(index)
        for other in [other for other, (_, file) in list(self._open.items()) if not file.exists()]:
            self._open.pop(other, None)  # it has left the cache, and would keep its room on the disk while it is mapped
        if len(self._open) >= MOST_OPEN:
            self._open.pop(next(iter(self._open)), None)
        found = _columns(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
        self._open[index] = found, path
        return found

    def _local(self, shard: Shard) -> Path:
        place = self._folder / shard.file
        if isinstance(place, Path):
            _check_size(place, shard)
            return place
        try:
            return storage.local(place, shard.bytes, shard.checksum)
        except FileNotFoundError:
            raise _missing(place) from None


class Prepared:
    """An open prepared folder, or one of a bucket.

    Raises:
        UserError: The manifest is damaged or of another format version.
        FileNotFoundError: The folder is not whole.
    """

    def __init__(self, folder: Place) -> None:
        self.folder = folder
        self.manifest = storage.read_record(folder / MANIFEST, Manifest)

    @contextmanager
    def set_aside(self, name: str) -> Iterator[Path]:
        """A path of this machine with the content of `QUARANTINE` or `DUPLICATES`, as long as the body runs.

        Raises:
            UserError: It is missing, or not what was written.
        """
        place = self.folder / name
        if not place.exists():
            raise damaged(place, "no such file")
        with storage.here(place) as path:
            if self.manifest.set_aside.get(name) not in (None, storage.checksum(path)):
                raise damaged(place, "other contents than those of its checksum")
            yield path

    def profile(self) -> list[dict[str, Any]]:
        """The columns of the column report.

        Raises:
            UserError: It is missing, or not what was written.
        """
        try:
            return storage.read_record(self.folder / PROFILE, ColumnReport).columns
        except FileNotFoundError:
            raise damaged(self.folder / PROFILE, "no such file") from None

    def shards(self, split: SplitName) -> list[Shard]:
        return [shard for shard in self.manifest.shards if shard.split == split]

    def rows(self, split: SplitName, verify: bool = False) -> Rows:
        transform = self.manifest.transform
        target = pa.int32() if transform.target.task == "classification" else pa.float64()
        schema = shard_schema(transform.num_numeric, len(transform.category_counts), target)
        return Rows(self.folder, self.shards(split), schema, verify)


def damaged(path: Place, found: str) -> UserError:
    """A file of prepared data is not what was written."""
    return UserError(
        "the prepared data is damaged",
        where=str(path),
        expected="the file that preparation wrote",
        found=found,
        fix="remove the folder that holds it, and run the job again to make it anew",
    )


def shard_schema(num_numeric: int, num_categorical: int, target: pa.DataType) -> pa.Schema:
    return pa.schema(
        {
            "numeric": pa.list_(pa.float32(), num_numeric),
            "categorical": pa.list_(pa.int32(), num_categorical),
            "target": target,
            "row_id": pa.uint64(),
        }
    )


def _columns(table: pa.Table) -> _Columns:
    return _Columns(
        _matrix(table["numeric"], np.float32),
        _matrix(table["categorical"], np.int32),
        table["target"].combine_chunks().to_numpy(),
        table["row_id"].combine_chunks().to_numpy(),
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
