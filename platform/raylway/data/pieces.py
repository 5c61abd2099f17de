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

FOLDER = "pieces"
USED = "pieces.json"
"""In a prepared folder: the keys of its pieces."""
VERSION = 5
"""Raise it when a piece of the same text is stored in another way."""
_UNUSED_S = 24 * 3600.0
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


def write_table(folder: Path, name: str, table: pa.Table) -> str:
    """Write a table under its name at once; returns the file's checksum."""
    staged = folder / f".{secrets.token_hex(6)}"
    with _written(staged):
        with pa.OSFile(str(staged), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        with pa.memory_map(str(staged)) as mapped:
            digest = xxhash.xxh3_128_hexdigest(mapped.read_buffer())
        staged.replace(folder / name)
    return digest


@contextmanager
def _written(staged: Path) -> Iterator[None]:
    """What could not be written is told as the user's error, also by a worker of Ray, and leaves nothing behind."""
    with storage.writing(staged.parent):
        try:
            yield
        except OSError:
            staged.unlink(missing_ok=True)
            raise


def write_bytes(folder: Path, name: str, content: bytes) -> str:
    """Write a file under its name at once; returns its checksum."""
    staged = folder / f".{secrets.token_hex(6)}"
    with _written(staged):
        staged.write_bytes(content)
        staged.replace(folder / name)
    return xxhash.xxh3_128_hexdigest(content)


def read_table(folder: Path, name: str) -> pa.Table:
    """Map a table that `write_table` wrote."""
    with pa.memory_map(str(folder / name)) as mapped:
        return pa.ipc.open_file(mapped).read_all()


def write_whole(folder: Path, name: str, record: object, made: dict[str, str]) -> None:
    """Vouch for files: until this is written they do not count."""
    write_bytes(folder, name, msgspec.msgpack.encode(Whole(msgspec.msgpack.encode(record), made)))


def read_whole(folder: Path, name: str, kind: type[Record]) -> Record | None:
    """What `write_whole` wrote; None if it or a file that it vouches for is not there or damaged (a power cut)."""
    try:
        whole = msgspec.msgpack.decode((folder / name).read_bytes(), type=Whole)
        for file, checksum in whole.files.items():
            with pa.memory_map(str(folder / file)) as mapped:
                if xxhash.xxh3_128_hexdigest(mapped.read_buffer()) != checksum:
                    return None
        return msgspec.msgpack.decode(whole.record, type=kind)
    except (OSError, msgspec.DecodeError):
        return None


@contextmanager
def in_use(root: Path) -> Iterator[Path]:
    """The folder of all pieces; nothing in it is removed while any preparation uses it."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield folder


def sweep(root: Path, spent: list[str]) -> None:
    """Remove pieces and what killed processes left half written, unless some preparation runs now (its end
    sweeps them up a day later).

    Args:
        root: The folder of the prepared folders.
        spent: Keys of pieces that nobody will ask for again. Of the others those go that no prepared folder names and
            that were not used for a day.
    """
    folder = root / FOLDER
    with (folder / ".lock").open("w") as lock, suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        named: set[str] = set()
        for listed in root.glob(f"*/{USED}"):
            if (listed.parent / MANIFEST).exists():
                with suppress(msgspec.DecodeError):  # damaged: its pieces are read again when they are asked for
                    named.update(msgspec.json.decode(listed.read_bytes(), type=list[str]))
        for each in folder.iterdir():
            unused = each.is_dir() and each.name not in named
            if unused and (each.name in spent or time.time() - each.stat().st_mtime > _UNUSED_S):
                shutil.rmtree(each, ignore_errors=True)
            for staged in each.glob(".*"):  # of a process that was killed
                staged.unlink(missing_ok=True)


def touch(folder: Path) -> None:
    """Note that a piece is used."""
    os.utime(folder)
