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

from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa

from raylway import storage
from raylway.errors import RunFailed, UserError
from raylway.features.profile import Profile
from raylway.features.signature import Signature
from raylway.features.transform import Transform

FORMAT = 3
MANIFEST = "manifest.json"
QUARANTINE = "quarantine/rows.jsonl"
DUPLICATES = "quarantine/duplicates.arrow"
PROFILE = "profile.json"
LINE_BITS = 40
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


class Rows:
    """The rows of one split, memory-mapped; nothing is copied until rows are taken.

    Args:
        folder: The prepared folder.
        shards: Shards of one split, in order; none for a split without rows.
        schema: Of the shards.
        verify: Compare a shard's checksum when rows of it are first taken.

    Raises:
        RunFailed: A shard is missing or damaged.
    """

    def __init__(self, folder: Path, shards: list[Shard], schema: pa.Schema, verify: bool = False) -> None:
        for shard in shards:
            _check_size(folder / shard.file, shard)
        self._unverified = {index: (folder / shard.file, shard) for index, shard in enumerate(shards)} if verify else {}
        tables = [pa.ipc.open_file(pa.memory_map(str(folder / shard.file))).read_all() for shard in shards]
        tables = tables or [schema.empty_table()]
        self._numeric = [_matrix(table["numeric"], np.float32) for table in tables]
        self._categorical = [_matrix(table["categorical"], np.int32) for table in tables]
        self._target = [table["target"].combine_chunks().to_numpy() for table in tables]
        self._row_id = [table["row_id"].combine_chunks().to_numpy() for table in tables]
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Copy rows by position (int64 [n], in any order).

        Returns:
            numeric float32 [n, D], categorical int32 [n, C], target [n], row_id uint64 [n].

        Raises:
            RunFailed: A shard that is read for the first time is damaged.
        """
        if self._unverified:
            self._verify(positions)
        return (
            self._gather(self._numeric, positions),
            self._gather(self._categorical, positions),
            self._gather(self._target, positions),
            self._gather(self._row_id, positions),
        )

    def targets(self) -> np.ndarray:
        """The target of every row [N], in the order of the shards: one read of all shards (4 or 8 bytes a row)."""
        self._verify(self._starts[:-1])
        return np.concatenate(self._target)

    def _verify(self, positions: np.ndarray) -> None:
        for index in np.unique(np.searchsorted(self._starts, positions, side="right") - 1):
            if (found := self._unverified.pop(int(index), None)) is not None:
                _check_content(*found)

    def _gather(self, parts: list[np.ndarray], positions: np.ndarray) -> np.ndarray:
        if len(parts) == 1:
            return parts[0][positions]
        result = np.empty((len(positions), *parts[0].shape[1:]), parts[0].dtype)
        owner = np.searchsorted(self._starts, positions, side="right") - 1
        for index in np.unique(owner):
            mine = owner == index
            result[mine] = parts[index][positions[mine] - self._starts[index]]
        return result


class Prepared:
    """An open prepared folder.

    Raises:
        UserError: The manifest is damaged or of another format version.
        FileNotFoundError: The folder is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = storage.read_record(folder / MANIFEST, Manifest)

    def set_aside(self, name: str) -> Path:
        """The path of `QUARANTINE` or `DUPLICATES`; reads it once.

        Raises:
            UserError: It is missing, or not what was written.
        """
        path = self.folder / name
        if not path.is_file():
            raise damaged(path, "no such file")
        if self.manifest.set_aside.get(name) not in (None, storage.checksum(path)):
            raise damaged(path, "other contents than those of its checksum")
        return path

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


def damaged(path: Path, found: str) -> UserError:
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


def _matrix(column: pa.ChunkedArray, dtype: type) -> np.ndarray:
    array = column.combine_chunks()
    return array.flatten().to_numpy().astype(dtype, copy=False).reshape(len(array), array.type.list_size)


def _check_size(path: Path, shard: Shard) -> None:
    if (path.stat().st_size if path.exists() else -1) != shard.bytes:
        raise RunFailed(f"{path}: the shard is missing or damaged; remove {path.parent} and run the job again")


def _check_content(path: Path, shard: Shard) -> None:
    if storage.checksum(path) != shard.checksum:
        raise RunFailed(f"{path}: the shard is damaged; remove {path.parent} and run the job again")
