"""Files in buckets: `s3://bucket/path` and `gs://bucket/path`, a file, glob or folder, read in ranges through Arrow
(`storage.buckets` has the clients).
"""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO

import msgspec
import pyarrow.fs as pa_fs

from raylway.data import ranged
from raylway.data.location import (
    ENDINGS,
    Format,
    Location,
    chosen,
    format_of,
    is_hidden,
    is_spelled,
    unknown_format,
    was_changed,
)
from raylway.errors import UserError
from raylway.storage.buckets import FAILURES, system, unusable

_ASKED_AT_ONCE = 16
_STAMPS = ("generation", "ETag")
"""What a store says of an object's content, Google's and S3's."""


def find(text: str, where: str, declared: Format | None) -> list[Location]:
    """The files that an address names.

    Args:
        text: The address, as the job writes it.
        where: The key, for messages.
        declared: The format that the job names.

    Raises:
        UserError: There is none, or the bucket can't be read.
    """
    scheme, _, path = text.rstrip("/").partition("://")
    with _told(text, where):
        files = {info.path: info for info in _listed(system(scheme), path) if info.is_file}
    if len(files) == 1 and path in files and not declared and format_of(path) is None:
        raise unknown_format(text, where)
    base = path if path in files else _fixed(path)
    names = [name for name in files if is_spelled(path) or not is_hidden(name.removeprefix(base).lstrip("/"))]
    wanted = chosen(names, declared)
    if not wanted:
        raise UserError(
            "the source is not there",
            where=where,
            expected=f"a file, glob or folder of a bucket, with files ending in {ENDINGS}",
            found=text,
            fix="list the bucket with a tool of its own, and name what is there",
        )
    found = [
        Location(f"{scheme}://{name}", f"{scheme}://{name}", declared=declared, length=files[name].size)
        for name in wanted
    ]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        return list(pool.map(_stamped, found))


def opened(location: Location) -> BinaryIO:
    """The file's bytes, to be read from any position.

    Raises:
        UserError: It is gone, or was changed since it was found; so do reads.
    """
    with _told(location.name, location.name):
        file = _file(location)
    if (file.size(), _stamp(file)) != (location.length, location.stamp):
        raise was_changed(location)

    def fetch(view: memoryview, position: int) -> None:
        with _told(location.name, location.name):
            filled = _filled(file, view, position)
            is_end = position + len(view) == location.length
            # at the end, what was read before it may have been of another object
            if filled < len(view) or (is_end and _stamp(_file(location)) != location.stamp):
                raise was_changed(location)

    return ranged.buffered(location.size, fetch)


def _filled(file: Any, view: memoryview, position: int) -> int:
    """How many bytes from a position on there were; none if the object is gone."""
    filled = 0
    try:
        file.seek(position)
        while filled < len(view) and (count := file.readinto(view[filled:])):
            filled += count
    except FileNotFoundError:
        return 0
    return filled


def _file(location: Location) -> Any:
    scheme, _, path = location.path.partition("://")
    try:
        return system(scheme).open_input_file(path)
    except FileNotFoundError:
        raise was_changed(location) from None


def _stamp(file: Any) -> str:
    metadata = file.metadata()
    return next((metadata[name].decode() for name in _STAMPS if name in metadata), "")


def _stamped(location: Location) -> Location:
    with _told(location.name, location.name):
        return msgspec.structs.replace(location, stamp=_stamp(_file(location)))


def _listed(client: pa_fs.FileSystem, path: str) -> list[Any]:
    """Everything that a path, folder or glob of a bucket names."""
    for name in dict.fromkeys([path, _fixed(path)]):  # a name may hold a wildcard
        info = client.get_file_info(name)
        if info.is_file:
            return [info]
    fixed = _fixed(path)
    every = client.get_file_info(pa_fs.FileSelector(fixed, recursive=True, allow_not_found=True))
    if fixed == path:
        return every
    return [info for info in every if _fits(info.path.split("/"), path.split("/"))]


def _fixed(path: str) -> str:
    """A glob's own words up to its first wildcard; another path itself."""
    parts = path.split("/")
    until = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[:until])


def _fits(parts: list[str], pattern: list[str]) -> bool:
    """Whether a path fits a glob, part by part; `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


@contextmanager
def _told(text: str, where: str) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        raise unusable(text, where, error) from None
