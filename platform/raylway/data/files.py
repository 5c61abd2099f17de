"""Where the source data lies: files, globs, folders, `pkg://`, `s3://`, `gs://`, `https://`; and `python://`.

Nothing here reads rows of files, and neither ray nor torch is imported.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from raylway import storage
from raylway.data import function, local, packed, remote
from raylway.data.location import Format, Location, unreadable
from raylway.errors import UserError
from raylway.features.prepared import SPLITS, SplitName
from raylway.job.load import LoadedJob
from raylway.job.schema import Files
from raylway.storage.buckets import SCHEMES
from raylway.storage.credentials import refuse_credentials

_WHERE = "data.source"


def locate(loaded: LoadedJob) -> list[Location]:
    """The files of the job's source, sorted by name; one that is named twice counts once.

    Raises:
        UserError: Nothing is there, the formats are mixed, or an address is of a kind that is not read.
    """
    source, read = loaded.job.data.source, loaded.job.data.read
    declared = None if read.format == "auto" else read.format
    bases = [loaded.folder, Path.cwd()]
    if not isinstance(source, Files):
        texts = [source] if isinstance(source, str) else source
        return find(texts, bases, loaded.location(_WHERE), declared)
    locations: list[Location] = []
    for side in SPLITS:
        texts = getattr(source, side)
        if texts is not None:
            where = loaded.location(f"{_WHERE}.{side}")
            found = find([texts] if isinstance(texts, str) else texts, bases, where, declared)
            locations += [msgspec.structs.replace(location, side=side) for location in found]
    _refuse_shared(locations, loaded.location(_WHERE))
    _one_format(locations, loaded.location(_WHERE))
    return sorted(locations, key=lambda location: location.name)


def find(texts: Sequence[str], bases: list[Path], where: str, declared: Format | None = None) -> list[Location]:
    """The files that some texts name, sorted by name; one that is named twice counts once.

    Args:
        texts: Paths and addresses.
        bases: Folders that relative paths are looked for in.
        where: What names them, for messages.
        declared: Their format, if it is named.

    Raises:
        UserError: As `locate`.
    """
    by_path: dict[tuple[str, str | None, str | None], Location] = {}
    for text in texts:
        refuse_credentials(text, where)
        try:
            found = _find_one(text, bases, where, declared)
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise UserError(
                "the source can't be looked for",
                where=where,
                expected="files and folders that this user may enter and read",
                found=f"{str(error.filename or text)[:200]}: {error.strerror}",
                fix="name another place, or give this user the right to enter the folder and to read what is in it",
            ) from None
        for location in found:
            for each in members(_checked(location, where)):
                by_path.setdefault((each.path, each.function, each.member), each)
    locations = sorted(by_path.values(), key=lambda location: location.name)
    if not locations:
        raise UserError(
            "the source names nothing",
            where=where,
            expected="a file, glob, folder, pkg:// or python://",
            found="an empty list",
            fix="name where the rows are",
        )
    _one_format(locations, where)
    return locations


def checksum(location: Location) -> str:
    """Of the file's content; of a remote file its size and ETag (or the time of its last change)."""
    if location.is_remote:
        return f"{location.length}:{location.stamp}"
    found = packed.stamped(location)
    try:
        return _checksum(location.path, found.stamp)
    except OSError as error:
        raise unreadable(location.name, location.name, error) from None


@functools.lru_cache(maxsize=100_000)
def _checksum(path: str, stamp: str) -> str:
    return storage.checksum(Path(path))


def _find_one(text: str, bases: list[Path], where: str, declared: Format | None) -> list[Location]:
    scheme, separator, rest = text.partition("://")
    if not separator:
        return local.find(text, text, bases, where, declared)
    if scheme == "pkg":
        return local.find_in_package(rest, text, where, declared)
    if scheme == "python":
        return [function.find(rest, text, where)]
    if scheme in SCHEMES:
        return remote.find(text, where, declared)
    if scheme in ("https", "http"):
        from raylway.data import web  # urllib3 takes a tenth of a second

        return web.find(text, where, declared)
    raise UserError(
        f"{scheme}:// is not read",
        where=where,
        expected="a file, glob or folder; s3://, gs://, https://, pkg://package/path or python://module:function",
        found=text,
        fix="copy the files to a folder or bucket that every node sees",
    )


def members(location: Location) -> list[Location]:
    """The data files of a zip archive; another file itself.

    Raises:
        UserError: The archive is damaged, encrypted or holds no data file.
    """
    if location.compression != "zip" or location.function:
        return [location]
    return packed.zip_members(location)


def _checked(location: Location, where: str) -> Location:
    """The location as it is now, seen to be readable and to have a name that can be written down."""
    if location.is_remote:
        return location
    if not os.access(location.path, os.R_OK):
        raise unreadable(location.name, where)
    try:
        location.name.encode()
    except UnicodeEncodeError:
        raise UserError(
            "the name of a file is not UTF-8",
            where=where,
            expected="names that can be written into messages and records",
            found=location.name,
            fix="rename the file",
        ) from None
    return location if location.function else packed.stamped(location)


def _one_format(locations: list[Location], where: str) -> None:
    formats = sorted({location.format for location in locations})
    if len(formats) > 1 or (formats == ["python"] and len(locations) > 1):
        examples = [next(location.name for location in locations if location.format == kind) for kind in formats]
        raise UserError(
            "the files of one source must have one format",
            where=where,
            expected="CSV files only, Parquet files only, ..., or one python:// function",
            found=", ".join(f"{kind} ({name})" for kind, name in zip(formats, examples, strict=True)),
            fix="name the files of one format, such as FOLDER/*.csv",
        )


def _refuse_shared(locations: list[Location], where: str) -> None:
    sides: dict[tuple[str, str | None, str | None], SplitName | None] = {}
    for location in locations:
        key = (location.path, location.function, location.member)
        other = sides.setdefault(key, location.side)
        if other != location.side:
            raise UserError(
                "a file can't be on two sides of the split",
                where=where,
                expected="a file of its own for each side",
                found=f"{location.name}: {other}, {location.side}",
                fix="give each file to one side",
            )
