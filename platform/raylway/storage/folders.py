"""Folders of this machine: files that are whole or absent, folders that appear at once, and who may write."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from raylway.errors import UserError

_CHUNK_BYTES = 1 << 22
_STAGING_PREFIX = ".staging-"
_JUST_MADE_S = 60.0
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""What the operating system says where nothing more can be written."""


def require_writable(root: Path) -> None:
    """Create a folder and prove that it can be written.

    Raises:
        UserError: It is a file, or can't be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f"{_STAGING_PREFIX}{secrets.token_hex(6)}"
        probe.write_bytes(b"")
        probe.unlink()
    except (OSError, ValueError) as error:  # the latter for a name with a NUL
        raise _unwritable("storage", f"{root}: {getattr(error, 'strerror', None) or error}") from None


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


def discard(path: Path, scratch: Path) -> None:
    """Remove a file or folder at once; whoever reads it goes on. `scratch` is a folder of the same file system."""
    with scratch_folder(scratch, path.name) as folder, suppress(FileNotFoundError):
        path.rename(folder / path.name)
