"""Files in buckets: `s3://bucket/path`, a file, glob or folder, read in ranges through Arrow's S3 client.

Credentials come from the environment, as every S3 client knows them (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
`AWS_SESSION_TOKEN`, a profile, or the machine's role); a server of your own is named by `AWS_ENDPOINT_URL_S3` or
`AWS_ENDPOINT_URL`. They never stand in an address.
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import os
from typing import Any, BinaryIO

import pyarrow.fs as pa_fs

from raylway.data.location import ENDINGS, Format, Location, changed, chosen, format_of, is_hidden, unknown_format
from raylway.errors import UserError

SCHEMES = ("s3",)
_TIMEOUT_S = 10
_ATTEMPTS = 2


def find(text: str, where: str, declared: Format | None) -> list[Location]:
    """The files that an address names.

    Args:
        text: The address, as the job writes it.
        where: The key, for messages.
        declared: The format that the job names.

    Raises:
        UserError: There is none, or the bucket can't be read.
    """
    path = text.removeprefix("s3://").rstrip("/")
    try:
        found = _listed(path)
    except OSError as error:
        raise unreadable(text, where, error) from None
    files = {info.path: info for info in found if info.is_file}
    if len(files) == 1 and path in files and not declared and format_of(path) is None:
        raise unknown_format(text, where)
    base = path if path not in files else ""
    names = [name for name in files if not (base and is_hidden(name.removeprefix(base).lstrip("/")))]
    wanted = chosen(names, declared)
    if not wanted:
        raise UserError(
            "the source is not there",
            where=where,
            expected=f"a file, glob or folder of a bucket, with files ending in {ENDINGS}",
            found=text,
            fix="list the bucket with a tool of its own, and name what is there",
        )
    return [
        Location(
            f"s3://{name}",
            f"s3://{name}",
            declared=declared,
            length=files[name].size,
            stamp=str(files[name].mtime_ns),
        )
        for name in wanted
    ]


def opened(location: Location) -> BinaryIO:
    """The file's bytes, to be read from any position.

    Raises:
        UserError: It is gone, or was changed since it was found.
    """
    path = location.path.removeprefix("s3://")
    try:
        info = system().get_file_info(path)
        if not info.is_file or (info.size, str(info.mtime_ns)) != (location.length, location.stamp):
            raise changed(location.name)
        return system().open_input_file(path)
    except OSError as error:
        raise unreadable(location.name, location.name, error) from None


def _listed(path: str) -> list[Any]:
    """Everything that a path, folder or glob of a bucket names."""
    fixed = path
    if glob.has_magic(path):
        parts = path.split("/")
        until = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        fixed = "/".join(parts[:until])
    info = system().get_file_info(fixed)
    if info.is_file:
        return [info]
    every = system().get_file_info(pa_fs.FileSelector(fixed, recursive=True, allow_not_found=True))
    if fixed == path:
        return every
    return [info for info in every if _fits(info.path.split("/"), path.split("/"))]


def _fits(parts: list[str], pattern: list[str]) -> bool:
    """Whether a path fits a glob, part by part; `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


@functools.lru_cache(maxsize=1)
def system() -> pa_fs.S3FileSystem:
    """The client of all buckets, with what the environment says of it."""
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


def unreadable(text: str, where: str, error: OSError) -> UserError:
    """What to tell a person of an error of the client."""
    words = str(error).splitlines()[0]
    denied = any(word in words for word in ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "403"))
    return UserError(
        "the bucket refuses these credentials" if denied else "the bucket can't be read",
        where=where,
        expected="a bucket that exists and may be read, with credentials in the environment (AWS_ACCESS_KEY_ID, ...)",
        found=f"{text}: {words[:300]}",
        fix="check the address, the credentials and AWS_ENDPOINT_URL_S3",
    )
