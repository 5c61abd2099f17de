"""Copies of objects on this machine, shared by its processes: one download for each content, verified when it comes.

    <cache>/objects/<checksum>   a file, or a folder; renamed into place when it is whole
    <cache>/staging/             downloads under way, and what is about to be uploaded
    <cache>/locks/               one process at a time brings a content; the others wait for it

The folder is `RAYLWAY_CACHE`, else `~/.cache/raylway`. It holds `RAYLWAY_CACHE_GB` at most, else what leaves a fifth of
the disk's free space to others; what was not used for the longest time goes first. A process may go on reading what is
removed under it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raylway.errors import RunFailed, UserError
from raylway.storage import buckets, folders
from raylway.storage.buckets import Address

_FOLDER, _LIMIT = "RAYLWAY_CACHE", "RAYLWAY_CACHE_GB"
_SHARE = 0.8
_LOCKS = 256
_TRIES = 2
_verified: set[str] = set()
"""Contents that this process has compared with their checksums."""


def fetched(address: Address, size: int | None, checksum: str) -> Path:
    """A file of this machine with the object's content; brought here only if it is not here already.

    Args:
        address: Where it is.
        size: Its bytes; None if they are not known.
        checksum: `folders.checksum` of it. What is here is compared too, once a process.

    Raises:
        FileNotFoundError: There is no such object.
        RunFailed: Its content is another.
    """
    path = _objects() / checksum
    with _alone(checksum):
        if not _is_whole(path, size, checksum):
            with _room(address.size() or 0 if size is None else size, checksum) as folder:
                staged = folder / checksum
                for _ in range(_TRIES):
                    buckets.download(address, staged)
                    if folders.checksum(staged) == checksum and size in (None, staged.stat().st_size):
                        break
                else:
                    raise RunFailed(f"{address}: the object is damaged: its content does not match its checksum")
                staged.replace(path)
                _verified.add(checksum)
    touch(path)
    return path


def fetched_folder(key: str, size: int, bring: Callable[[Path], None]) -> Path:
    """A folder of this machine whose content the key says; brought here only if it is not here already.

    Args:
        key: Equal keys mean equal contents.
        size: Bytes of all files.
        bring: Writes them into an empty folder, and compares them; it must not use the cache.
    """
    path = _objects() / key
    with _alone(key):
        if not path.is_dir():
            with _room(size, key) as folder:
                (folder / key).mkdir()
                bring(folder / key)
                (folder / key).rename(path)
    touch(path)
    return path


def keep(source: Path, checksum: str) -> None:
    """Move a file that was uploaded from here into the cache: it will be read here soon."""
    with _alone(checksum), _room(source.stat().st_size, checksum):
        source.replace(_objects() / checksum)


def touch(path: Path) -> None:
    """Say that a file or folder of the cache is in use, so that others go first."""
    with suppress(FileNotFoundError):
        os.utime(path)


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A fresh folder on the disk of the cache for what is on its way; removed at the end.

    Raises:
        UserError: The disk is full.
    """
    try:
        with folders.scratch_folder(_made("staging"), name) as folder:
            yield folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _unusable(error) from None


def _is_whole(path: Path, size: int | None, checksum: str) -> bool:
    if not path.is_file() or size not in (None, path.stat().st_size):
        return False
    if checksum not in _verified and folders.checksum(path) != checksum:
        return False
    _verified.add(checksum)
    return True


@contextmanager
def _room(size: int, name: str) -> Iterator[Path]:
    """A scratch folder, after so much was removed that `size` bytes fit below the limit (more than that is brought all
    the same, as the only one)."""
    with _alone("room"):
        entries = sorted((_used(path) for path in _objects().iterdir()), key=lambda entry: entry[0])
        free = _limit(sum(bytes_ for _, bytes_, _ in entries)) - sum(bytes_ for _, bytes_, _ in entries)
        for _, bytes_, path in entries:
            if free >= size:
                break
            folders.discard(path, _made("staging"))
            free += bytes_
    with scratch(name) as folder:
        yield folder


def _used(path: Path) -> tuple[float, int, Path]:
    """When it was used last, its bytes, and it itself."""
    try:
        parts = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
        return path.stat().st_mtime, sum(each.stat().st_size for each in parts), path
    except FileNotFoundError:  # another process has removed it
        return 0.0, 0, path


def _limit(held: int) -> int:
    text = os.environ.get(_LIMIT)
    if text is None:
        return int(_SHARE * (shutil.disk_usage(_root()).free + held))
    try:
        return int(float(text) * 1e9)
    except (ValueError, OverflowError):
        raise UserError(
            f"{_LIMIT} is no number",
            where="the environment",
            expected="gigabytes that the cache may hold, such as 200",
            found=text,
            fix="correct it, or unset it",
        ) from None


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Hold a name among all processes and threads of this machine; the lock goes with its process, however it dies."""
    lock = name if name == "room" else f"{zlib.crc32(name.encode()) % _LOCKS}"
    with (_made("locks") / lock).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _root() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(_FOLDER) or home / "raylway").absolute()


def _objects() -> Path:
    return _made("objects")


def _made(name: str) -> Path:
    folder = _root() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(error) from None
    return folder


def _unusable(error: OSError) -> UserError:
    return UserError(
        "the cache of what is in buckets can't be written",
        where=str(_root()),
        expected="a folder that this user may write, on a disk with room",
        found=error.strerror or str(error),
        fix=f"make room there, name another folder with {_FOLDER}, or let it hold less with {_LIMIT}",
    )
