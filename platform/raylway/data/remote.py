"""Files in buckets: `s3://bucket/path` and `gs://bucket/path`, a file, glob or folder, read in ranges through Arrow.

Credentials come from the environment, as every client of these stores knows them, and never stand in an address:
- S3: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, a profile, or the machine's role; a server of
  your own is named by `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`;
- Google Cloud Storage: `GOOGLE_APPLICATION_CREDENTIALS`, what `gcloud auth application-default login` left, or the
  machine's service account; an emulator is named by `STORAGE_EMULATOR_HOST` and asks for none.
"""

from __future__ import annotations

import datetime
import fnmatch
import functools
import glob
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO

import msgspec
import pyarrow as pa
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

SCHEMES = ("s3", "gs")
FAILURES = (OSError, pa.ArrowException)
"""What the clients raise; Google's raises both."""
_TIMEOUT_S = 10
_ATTEMPTS = 2
_ASKED_AT_ONCE = 16
_STAMPS = ("generation", "ETag")
"""What a store says of an object's content, Google's and S3's."""
_DENIED = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY",
    "SIGNATURE_DOES_NOT_MATCH",
    "403",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "access token",
)
_VARIABLES = {
    "s3": ("AWS_ACCESS_KEY_ID, ...", "AWS_ENDPOINT_URL_S3"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS, the path of a key file", "STORAGE_EMULATOR_HOST"),
}


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


@functools.lru_cache
def system(scheme: str) -> pa_fs.FileSystem:
    """The client of all buckets of a store, with what the environment says of it."""
    return _google() if scheme == "gs" else _s3()


def _s3() -> pa_fs.FileSystem:
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    scheme, separator, host = (address or "").partition("://")
    further: dict[str, Any] = {"endpoint_override": host.rstrip("/"), "scheme": scheme} if separator else {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return pa_fs.S3FileSystem(
        region=region or ("us-east-1" if further else None),
        connect_timeout=_TIMEOUT_S,
        request_timeout=_TIMEOUT_S,
        retry_strategy=pa_fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        **further,
    )


def _google() -> pa_fs.FileSystem:
    retry = datetime.timedelta(seconds=_TIMEOUT_S)
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if not emulator:
        return pa_fs.GcsFileSystem(retry_time_limit=retry)
    scheme, separator, host = emulator.rpartition("://")
    return pa_fs.GcsFileSystem(
        anonymous=True,
        scheme=scheme if separator else "http",
        endpoint_override=host.rstrip("/"),
        retry_time_limit=retry,
    )


@contextmanager
def _told(text: str, where: str) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        raise unreadable(text, where, error) from None


def unreadable(text: str, where: str, error: Exception) -> UserError:
    """What to tell a person of an error of the client."""
    words = (str(error).splitlines() or [type(error).__name__])[0].partition(" error_info=")[0]
    credentials, server = _VARIABLES["gs" if text.startswith("gs://") else "s3"]
    denied = any(word in words for word in _DENIED)
    return UserError(
        "the bucket refuses these credentials" if denied else "the bucket can't be read",
        where=where,
        expected=f"a bucket that exists and may be read, with credentials in the environment ({credentials})",
        found=f"{text}: {words[-300:] if text.startswith('gs://') else words[:300]}",
        fix=f"check the address, the credentials and {server}",
    )
