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
from raylway.data.location import ENDINGS, Format, Location, format_of, refuse_credentials
from raylway.errors import UserError
from raylway.features.prepared import SPLITS, SplitName
from raylway.job.load import LoadedJob
from raylway.job.schema import Files

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
                "the source can't be looked for", where=where, found=f"{text[:200]}: {error.strerror}"
            ) from None
        for location in found:
            _check_readable(location, where)
            for each in members(location):
                by_path.setdefault((each.path, each.function, each.member), each)
    locations = sorted(by_path.values(), key=lambda location: location.name)
    if not locations:
        raise UserError("the source names nothing", where=where, expected="a file, glob, folder, pkg:// or python://")
    _one_format(locations, where)
    return locations


def file_at(path: Path) -> Location:
    """One data file that a person named on the command line.

    Raises:
        UserError: It is not there or of no known format.
    """
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), fix=local.nearest(path.name, [path.parent]))
    if format_of(path.name) is None:
        raise UserError("the file is of no known format", where=str(path), expected=ENDINGS)
    location = Location(str(path), str(path.absolute()))
    _check_readable(location, str(path))
    return location


def checksum(location: Location) -> str:
    """Of the file's content; of a remote file its size and ETag (or the time of its last change)."""
    if location.is_remote:
        return f"{location.length}:{location.stamp}"
    status = Path(location.path).stat()
    return _checksum(location.path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=100_000)
def _checksum(path: str, size: int, mtime_ns: int) -> str:
    return storage.checksum(Path(path))


def _find_one(text: str, bases: list[Path], where: str, declared: Format | None) -> list[Location]:
    scheme, separator, rest = text.partition("://")
    if not separator:
        return local.find(text, text, bases, where, declared)
    if scheme == "pkg":
        return local.find_in_package(rest, text, where, declared)
    if scheme == "python":
        return [function.find(rest, text, where)]
    if scheme in remote.SCHEMES:
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


def _check_readable(location: Location, where: str) -> None:
    if not location.is_remote and not os.access(location.path, os.R_OK):
        raise UserError(
            "the file can't be read", where=where, expected="a file that this user may read", found=location.name
        )


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
                found=f"{location.name}: {other}, {location.side}",
                fix="give each file to one side",
            )
