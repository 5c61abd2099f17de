"""Pieces of the data on disk, `<storage>/prepared/pieces/<key>/`: what the first pass leaves for the later ones.

    <number>.arrow              the columns of one piece (`items`), memory-mapped by whoever needs them
    facts                       written last: only then is the item whole
    <rules>-<number>.arrow      the usable rows of the piece in the order of the split (`ordering`)
    <rules>-<number>.rejects    its invalid rows
    <rules>                     what became of the item's rows under these rules; written last

The key is a hash of what the item holds (checksum of each file, which part of it), how it is read and our code's
version; `<rules>` of what rows are held to. So a killed preparation goes on with the items that are whole, and other
jobs over the same files find them.

Pieces stay as long as a prepared folder names them (the next preparation removes those that none names and that were
not used for a day); where the job names one file, to which none can be added, they go when its preparation is whole.
Removing the folder loses nothing but time.
"""

from __future__ import annotations

import fcntl
import functools
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import pyarrow as pa
import xxhash

from raylway import storage
from raylway.data import files
from raylway.data.items import Item, Reading
from raylway.features.prepared import MANIFEST
from raylway.storage import Address, Place, buckets

FOLDER = "pieces"
USED = "pieces.json"
"""In a prepared folder: the keys of its pieces."""
VERSION = 5
"""Raise it when a piece of the same text is stored in another way."""
_UNUSED_S = 24 * 3600.0
_UNUSED_IN_BUCKET_S = 7 * _UNUSED_S
"""Longer than a preparation lasts: nobody can lock a bucket."""
Record = TypeVar("Record")


class Whole(msgspec.Struct, frozen=True):
    """A record and the checksums of the files that it vouches for."""

    record: bytes
    files: dict[str, str]


class Keyed(msgspec.Struct, frozen=True):
    """An item and its key."""

    item: Item
    key: str

    @property
    def name(self) -> str:
        return self.item.name


def keyed(item: Item, reading: Reading) -> Keyed:
    """The item with its key."""
    digest = xxhash.xxh3_128(msgspec.msgpack.encode([VERSION, reading]))
    for part in item.parts:
        where = part.location
        content = msgspec.structs.replace(where, name="", path=files.checksum(where), stamp="")
        same = msgspec.structs.replace(part, location=content)
        digest.update(msgspec.msgpack.encode([where.format, where.compression, where.partitions, same]))
    return Keyed(item, digest.hexdigest()[:24])


def write_table(folder: Place, name: str, table: pa.Table) -> str:
    """Write a table under its name at once; returns the file's checksum."""
    with _staged(folder) as staged:
        with pa.OSFile(str(staged), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        with pa.memory_map(str(staged)) as mapped:
            digest = xxhash.xxh3_128_hexdigest(mapped.read_buffer())
        _placed(staged, folder / name, digest)
    return digest


@contextmanager
def _staged(folder: Place) -> Iterator[Path]:
    """Where to write a file first. What could not be written is told as the user's error, also by a worker of Ray, and
    leaves nothing behind. Of a folder the file is beside its place and not synced: it has a checksum, and can be made
    again."""
    if isinstance(folder, Address):
        with storage.scratch(folder, "piece") as scratch:
            yield scratch / "piece"
        return
    staged = folder / f".{secrets.token_hex(6)}"
    with storage.writing(folder):
        try:
            yield staged
        except OSError:
            staged.unlink(missing_ok=True)
            raise


def _placed(staged: Path, place: Place, checksum: str) -> None:
    if isinstance(place, Address):
        storage.move(staged, place, checksum)
    else:
        staged.replace(place)


def write_bytes(folder: Place, name: str, content: bytes) -> str:
    """Write a file under its name at once; returns its checksum."""
    if isinstance(folder, Address):
        storage.write_bytes(folder / name, content)
    else:
        with _staged(folder) as staged:
            staged.write_bytes(content)
            staged.replace(folder / name)
    return xxhash.xxh3_128_hexdigest(content)


def read_table(folder: Place, name: str, vouched_by: str) -> pa.Table:
    """Map a table that `write_table` wrote.

    Args:
        folder: Of the item.
        name: Of the table.
        vouched_by: The record that has its checksum.
    """
    checksum = _checksums(folder, vouched_by)[name] if isinstance(folder, Address) else ""
    path = storage.local(folder / name, None, checksum)
    with pa.memory_map(str(path)) as mapped:
        return pa.ipc.open_file(mapped).read_all()


@functools.lru_cache(1024)
def _checksums(folder: Place, name: str) -> dict[str, str]:
    """Of the files that a record vouches for; it never changes."""
    return msgspec.msgpack.decode((folder / name).read_bytes(), type=Whole).files


def write_whole(folder: Place, name: str, record: object, made: dict[str, str]) -> None:
    """Vouch for files: until this is written they do not count."""
    write_bytes(folder, name, msgspec.msgpack.encode(Whole(msgspec.msgpack.encode(record), made)))


def read_whole(folder: Place, name: str, kind: type[Record]) -> Record | None:
    """What `write_whole` wrote; None if it or a file that it vouches for is not there or damaged (a power cut). In a
    bucket there is no half a file; contents are compared when they are fetched."""
    try:
        whole = msgspec.msgpack.decode((folder / name).read_bytes(), type=Whole)
        if isinstance(folder, Address):
            if not {each.name for each in folder.iterdir()}.issuperset(whole.files):
                return None
            return msgspec.msgpack.decode(whole.record, type=kind)
        for file, checksum in whole.files.items():
            with pa.memory_map(str(folder / file)) as mapped:
                if xxhash.xxh3_128_hexdigest(mapped.read_buffer()) != checksum:
                    return None
        return msgspec.msgpack.decode(whole.record, type=kind)
    except (OSError, msgspec.DecodeError):
        return None


@contextmanager
def in_use(root: Place) -> Iterator[Place]:
    """The folder of all pieces; nothing in it is removed while any preparation uses it."""
    folder = root / FOLDER
    if isinstance(folder, Address):
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield folder


def sweep(root: Place, spent: list[str]) -> None:
    """Remove pieces and what killed processes left half written, unless some preparation runs now (its end
    sweeps them up a day later).

    Args:
        root: The folder of the prepared folders.
        spent: Keys of pieces that nobody will ask for again. Of the others those go that no prepared folder names and
            that were not used for a day.
    """
    folder = root / FOLDER
    if isinstance(folder, Address):
        _sweep_bucket(folder)
        return
    with (folder / ".lock").open("w") as lock, suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        named = _named(root)
        for each in folder.iterdir():
            unused = each.is_dir() and each.name not in named
            if unused and (each.name in spent or time.time() - each.stat().st_mtime > _UNUSED_S):
                shutil.rmtree(each, ignore_errors=True)
            for staged in each.glob(".*"):  # of a process that was killed
                staged.unlink(missing_ok=True)


def _named(root: Place) -> set[str]:
    """The keys that prepared folders name."""
    named: set[str] = set()
    for each in storage.children(root):
        if each.name != FOLDER and (each / MANIFEST).exists():
            with suppress(FileNotFoundError, msgspec.DecodeError):  # damaged: its pieces are read again when asked for
                named.update(msgspec.json.decode((each / USED).read_bytes(), type=list[str]))
    return named


def _sweep_bucket(folder: Address) -> None:
    """What may still be in use stays, spent or not."""
    old = [name for name, age in buckets.ages(folder).items() if age > _UNUSED_IN_BUCKET_S]
    named = _named(folder.parent) if old else set()
    for name in old:
        if name not in named:
            storage.remove(folder / name)


def touch(folder: Place) -> None:
    """Note that a piece is used."""
    if isinstance(folder, Address):
        storage.write_bytes(folder / "used", b"")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
