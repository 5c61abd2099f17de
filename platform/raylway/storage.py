"""Files that are whole or absent: atomic writes, typed records, checksums. Local folders.

Everything that Raylway keeps goes through here, so that a process killed between any two instructions never leaves a
half-written file under its final name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import xxhash

from raylway.errors import UserError

Record = TypeVar("Record")
_CHUNK_BYTES = 1 << 22
_END = b"\n}\n"
"""Of a JSON object as it is written."""
_SEAL = re.compile(rb',\n "checksum": "[0-9a-f]{32}"\n}\n')
_SEAL_BYTES = 52
_STAGING_PREFIX = ".staging-"
_JUST_MADE_S = 60.0
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""What the operating system says where nothing more can be written."""


def prepare_root(storage: str) -> Path:
    """Create the storage folder and prove that it can be written; return it absolute.

    Raises:
        UserError: The folder is a bucket address, is a file, or can't be written.
    """
    if "://" in storage:
        raise UserError(
            "storage must be a folder",
            where="storage",
            expected="a path without ://",
            found=storage,
            fix="name a folder that every node of the cluster sees, such as /shared/runs",
        )
    root = Path(os.path.expanduser(storage)).absolute()  # noqa: PTH111 - takes the name of no user too
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f"{_STAGING_PREFIX}{secrets.token_hex(6)}"
        probe.write_bytes(b"")
        probe.unlink()
    except (OSError, ValueError) as error:  # the latter for a name with a NUL
        raise _unwritable("storage", f"{root}: {getattr(error, 'strerror', None) or error}") from None
    return root


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make a message of the operating system's refusal to write in the storage folder.

    Raises:
        UserError: The disk is full, or the folder may not be written any more.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise _unwritable(str(folder), os.strerror(error.errno)) from None


def _unwritable(where: str, found: str) -> UserError:
    return UserError(
        "the storage folder can't be written",
        where=where,
        expected="a folder that this user may create and write, on a disk with room",
        found=found,
        fix="make room there, or name another folder in the job file, or with --set storage=FOLDER",
    )


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that its name only ever shows the whole content, also after a power cut."""
    staged = path.with_name(f"{_STAGING_PREFIX}{secrets.token_hex(6)}-{path.name}")
    try:
        with staged.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_record(path: Path, record: object) -> None:
    """Write a msgspec record (or plain JSON value) as indented JSON, atomically."""
    write_bytes(path, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def write_sealed(path: Path, record: object) -> None:
    """As `write_record`, of a JSON object; its last key is a checksum of all else, by which `read_record` finds any
    damage."""
    content = msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"
    write_bytes(path, content.removesuffix(_END) + _seal(content))


def _seal(content: bytes) -> bytes:
    return b',\n "checksum": "%s"' % xxhash.xxh3_128_hexdigest(content).encode() + _END


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read what `write_record` or `write_sealed` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: The file is not a record of this kind.
    """
    content = path.read_bytes()
    if _SEAL.fullmatch(seal := content[-_SEAL_BYTES:]):
        content = content[:-_SEAL_BYTES] + _END
    try:
        if _SEAL.fullmatch(seal) and seal != _seal(content):
            raise msgspec.DecodeError("other contents than those of its checksum")
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(
            "the file is damaged or of another version",
            where=str(path),
            expected=f"a {kind.__name__} record",
            found=str(error),
            fix="remove the folder that holds it and run the job again",
        ) from None


def sync_folder(folder: Path) -> None:
    """Make renames inside the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """The XXH3-128 checksum of a file's content, in hex. Finds damage, not malice."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Yield a fresh folder beside `final` and rename it to `final` at the end; on an error remove it.

    When two processes make the same folder, the first to finish wins and the other's copy is removed. What a killed
    process left behind beside it is removed too.
    """
    with scratch_folder(final.parent, final.name) as staged:
        yield staged
        sync_folder(staged)
        try:
            staged.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    sync_folder(final.parent)


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a fresh folder in `parent`, made if it is not there, and remove it at the end; what a killed process left
    behind there is removed too."""
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    folder = parent / f"{_STAGING_PREFIX}{name}-{secrets.token_hex(6)}"
    folder.mkdir()
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(held)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    """Remove staged folders that no process holds: a lock goes with its process, however it dies. A folder that was
    made just now may not be locked yet."""
    for folder in parent.glob(f"{_STAGING_PREFIX}*/"):
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(descriptor).st_mtime > _JUST_MADE_S:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
