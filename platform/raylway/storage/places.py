"""What can be done to a place, be it of a folder or of a bucket."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import msgspec
import xxhash

from raylway.errors import UserError
from raylway.storage import buckets, cache, folders
from raylway.storage.buckets import Address
from raylway.storage.credentials import refuse_credentials

Place = Path | Address
Record = TypeVar("Record")
_END = b"\n}\n"
"""Of a JSON object as it is written."""
_SEAL = re.compile(rb',\n "checksum": "[0-9a-f]{32}"\n}\n')
_SEAL_BYTES = 52
_READ_BYTES = 32 << 20


def place(text: str, where: str = "storage") -> Place:
    """The place that a text names, absolute: `s3://bucket/path`, `gs://bucket/path`, else a path of this machine.

    Args:
        text: As a person wrote it.
        where: Who wrote it where, for messages.

    Raises:
        UserError: It is an address of something else, or one with credentials; those are not shown.
    """
    refuse_credentials(text, where)
    if (address := buckets.parsed(text)) is not None:
        return address
    if "://" in text:
        raise UserError(
            "it must be a folder or a bucket",
            where=where,
            expected="a path without ://, s3://bucket/path or gs://bucket/path",
            found=text,
            fix="name a folder that every node of the cluster sees, such as /shared/runs, or a bucket",
        )
    return Path(os.path.expanduser(text)).absolute()  # noqa: PTH111 - takes the name of no user too


def prepare_root(storage: str) -> Place:
    """The place of the job's key `storage`, after it was proved that it can be written; a folder is made.

    Raises:
        UserError: It can't, or is no place.
    """
    root = existing_root(storage)
    if isinstance(root, Address):
        buckets.require_writable(root, "storage")
    else:
        folders.require_writable(root)
    return root


def existing_root(storage: str) -> Place:
    """The place where runs are looked for; nothing is made.

    Raises:
        UserError: It is no place, or its bucket is not there or does not let us in.
    """
    root = place(storage)
    if isinstance(root, Address):
        buckets.require(root, "storage")
    return root


def size(where: Place) -> int | None:
    """Bytes of a file; None if there is none."""
    if isinstance(where, Address):
        return where.size()
    return where.stat().st_size if where.is_file() else None


def children(where: Place) -> list[Place]:
    """Files and folders directly below, by name; nothing if there is no such folder."""
    if isinstance(where, Path) and not where.is_dir():
        return []
    return sorted(where.iterdir(), key=lambda each: each.name)


def read_range(where: Place, start: int, stop: int) -> bytes:
    """The bytes of a file from `start` up to `stop`, fewer at its end.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if isinstance(where, Address):
        return buckets.read_range(where, start, stop)
    with where.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def checksum(where: Place) -> str:
    """The XXH3-128 checksum of a file's content, in hex (`folders.checksum`); of a bucket it is read for that.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if isinstance(where, Path):
        return folders.checksum(where)
    digest, start = xxhash.xxh3_128(), 0
    while piece := read_range(where, start, start + _READ_BYTES):
        digest.update(piece)
        start += len(piece)
    return digest.hexdigest()


def write_bytes(where: Place, content: bytes) -> None:
    """Write a file so that its name only ever shows the whole content; another of this name is replaced."""
    if isinstance(where, Address):
        buckets.write(where, content)
    else:
        folders.write_bytes(where, content)


def write_record(where: Place, record: object) -> None:
    """Write a msgspec record (or plain JSON value) as indented JSON, atomically."""
    write_bytes(where, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def write_sealed(where: Place, record: object) -> None:
    """As `write_record`, of a JSON object; its last key is a checksum of all else, by which `read_record` finds any
    damage."""
    content = msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"
    write_bytes(where, content.removesuffix(_END) + _seal(content))


def _seal(content: bytes) -> bytes:
    return b',\n "checksum": "%s"' % xxhash.xxh3_128_hexdigest(content).encode() + _END


def read_record(where: Place, kind: type[Record]) -> Record:
    """Read what `write_record` or `write_sealed` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: The file is not a record of this kind.
    """
    content = where.read_bytes()
    if _SEAL.fullmatch(seal := content[-_SEAL_BYTES:]):
        content = content[:-_SEAL_BYTES] + _END
    try:
        if _SEAL.fullmatch(seal) and seal != _seal(content):
            raise msgspec.DecodeError("other contents than those of its checksum")
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(
            "the file is damaged or of another version",
            where=str(where),
            expected=f"a {kind.__name__} record",
            found=str(error),
            fix="remove the folder that holds it and run the job again",
        ) from None


def move(source: Path, target: Place, checksum: str = "") -> None:
    """Move a file of this machine to a place, where it appears whole; another of this name is replaced.

    Args:
        source: In the `scratch` of the place, so that moving it into a folder is a rename. It is gone afterwards.
        target: Its folder is made.
        checksum: Of the content, if it will be read on this machine soon (`local`).
    """
    if isinstance(target, Address):
        buckets.upload(source, target)
        if checksum:
            cache.keep(source, checksum)
        else:
            source.unlink()
        return
    with source.open("rb") as file:
        os.fsync(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    folders.sync_folder(target.parent)


def local(where: Place, bytes_: int | None, checksum: str) -> Path:
    """A path of this machine with the file's content: the file of a folder itself, of a bucket a copy in the cache.

    Args:
        where: The file.
        bytes_: Its size; None where only the checksum is known.
        checksum: Of its content.

    Raises:
        FileNotFoundError: There is no such object.
        RunFailed: The object's content is another. A file of a folder is not read.
    """
    return cache.fetched(where, bytes_, checksum) if isinstance(where, Address) else where


@contextmanager
def written(where: Place) -> Iterator[Path]:
    """Yield a path of this machine to write a file at, and move the file to its place at the end, whole or not at all.
    Its folder is made."""
    with scratch(where.parent, where.name) as folder:
        yield folder / where.name
        move(folder / where.name, where)


def scratch(folder: Place, name: str) -> AbstractContextManager[Path]:
    """A fresh folder of this machine for what will be moved to the place, removed at the end (`scratch_folder`)."""
    return cache.scratch(name) if isinstance(folder, Address) else folders.scratch_folder(folder, name)


@contextmanager
def here(where: Place) -> Iterator[Path]:
    """Yield a path of this machine with a file's content, of a bucket a copy that is there as long as the body runs.

    Raises:
        FileNotFoundError: There is no such object.
    """
    if isinstance(where, Path):
        yield where
        return
    with scratch(where.parent, where.name) as folder:
        buckets.download(where, folder / where.name)
        yield folder / where.name


def made(final: Place) -> AbstractContextManager[Place]:
    """A folder to write into, which is there as `final` at the end and not before, or not at all on an error
    (`staged_folder`). In a bucket, which can't rename, it is `final` itself: it is there as far as the file is that is
    written last."""
    return nullcontext(final) if isinstance(final, Address) else folders.staged_folder(final)


def remove(where: Place) -> None:
    """Remove a file, or a folder with all that is in it; nothing there is fine.

    A folder goes file by file: remove the one first that says that the folder is whole.
    """
    if isinstance(where, Address):
        buckets.remove(where)
    elif where.is_dir() and not where.is_symlink():
        shutil.rmtree(where, ignore_errors=True)
    else:
        where.unlink(missing_ok=True)
