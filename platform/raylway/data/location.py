"""One place that rows come from: its name, where it lies, and what its name says of the format."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import msgspec

from raylway.errors import UserError
from raylway.features.prepared import SplitName

Format = Literal["csv", "jsonl", "text", "parquet", "arrow", "python"]
Packing = Literal["zip", "gz", "bz2", "zst", ""]
TEXT_FORMATS = ("csv", "jsonl", "text")
_ENDINGS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_PACKED: dict[str, Packing] = {".gz": "gz", ".bz2": "bz2", ".zst": "zst", ".zip": "zip"}
ENDINGS = f"{', '.join(_ENDINGS)}; text files also with {', '.join(_PACKED)}"
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


class Location(msgspec.Struct, frozen=True):
    """One file, archive member or function, as found before anything of it is read."""

    name: str
    """How messages and row accounts call it: the job file's words, so that it is the same on every machine."""
    path: str
    """Absolute, or an address (`s3://`, `https://`); for `python://` the module's file."""
    function: str | None = None
    """For `python://`: `module:function`."""
    member: str | None = None
    """One file inside a zip archive."""
    declared: Format | None = None
    """The format that the job names; else the name's ending says it."""
    side: SplitName | None = None
    """The side of the split that the job gives the file to."""
    encoding: str = "utf-8"
    """Of a text file, as a codec's name; `opening` finds it out."""
    length: int | None = None
    """Bytes, when it was found."""
    stamp: str = ""
    """What tells whether it was changed since: an ETag or the like, of a file here the time of its last change."""
    packing: Packing = ""
    """How the web server packs the file on its way; else the name's ending says it."""
    has_ranges: bool = True
    """Whether any range of the file can be read without what precedes it."""

    @property
    def format(self) -> Format:
        if self.function:
            return "python"
        if self.declared:
            return self.declared
        return format_of(self.member or self.path) or "csv"

    @property
    def compression(self) -> Packing:
        return self.packing or _PACKED.get(Path(path_of(self.path).lower()).suffix, "")

    @property
    def is_remote(self) -> bool:
        return "://" in self.path

    @property
    def is_plain(self) -> bool:
        """Whether the bytes of the file are UTF-8 text themselves, so that any range of it can be read."""
        return not self.compression and self.encoding == "utf-8" and self.has_ranges

    @property
    def size(self) -> int:
        """Bytes, packed ones of a packed file."""
        return Path(self.path).stat().st_size if self.length is None else self.length

    @property
    def partitions(self) -> dict[str, str | None]:
        """The columns that folders named `column=value` give, decoded as URLs are; None is a missing cell."""
        found: dict[str, str | None] = {}
        for folder in path_of(self.name).split("/")[:-1]:
            column, equals, value = folder.partition("=")
            if equals and column and "://" not in folder and not self.function:
                found[unquote(column)] = None if value in ("", _NO_PARTITION) else unquote(value)
        return found


def path_of(address: str) -> str:
    """The path of a web server's address, decoded; another name itself."""
    return unquote(urlsplit(address).path) if address.startswith(("https://", "http://")) else address


def format_of(name: str) -> Format | None:
    """The format that a name's ending says, packed or not; None for another name, `csv` for a bare `.zip`."""
    path = Path(path_of(name).lower())
    if path.suffix in _PACKED:
        inner = _ENDINGS.get(Path(path.stem).suffix)
        if inner is None and path.suffix == ".zip":
            return "csv"
        return inner if inner in TEXT_FORMATS else None
    return _ENDINGS.get(path.suffix)


def chosen(names: list[str], declared: Format | None) -> list[str]:
    """The data files among those of a folder, glob or archive.

    By their endings; where the job names the format, those with an ending of it, or all if there is none. Text files
    (`.txt`) beside other data are notes about it.
    """
    formats = {name: format_of(name) for name in names}
    if declared:
        return [name for name in names if formats[name] == declared] or names
    data = [name for name in names if formats[name]]
    return [name for name in data if formats[name] != "text"] or data


def is_hidden(path: str) -> bool:
    """Files that tools leave beside data (`.DS_Store`, `_SUCCESS`, `__MACOSX/`) begin with a dot or an underscore."""
    return any(part.startswith((".", "_")) and "=" not in part for part in path.split("/"))


def unreadable(name: str, where: str, error: OSError | None = None) -> UserError:
    """The operating system does not let this user read a file or folder."""
    return UserError(
        "the file can't be read",
        where=where,
        expected="a file that this user may read",
        found=f"{name}: {error.strerror or error}" if error else name,
        fix="give this user the right to read it, and to enter its folder, or take it out of the source",
    )


def is_spelled(pattern: str) -> bool:
    """Whether a glob names hidden files itself: one of its parts begins with a dot or an underscore, `_*.csv`."""
    parts = pattern.split("/")
    until = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return any(part.startswith((".", "_")) for part in parts[until:])


def unknown_format(text: str, where: str) -> UserError:
    """The ending of a file that the job names says nothing."""
    return UserError(
        "the file is of no known format",
        where=where,
        expected=ENDINGS,
        found=text,
        fix="end its name with one of these, or name its format with data.read.format in the job file",
    )


def was_changed(location: Location) -> UserError:
    """A file is not the one that was found."""
    return UserError(
        "the file was changed or removed while it was read",
        where=location.name,
        expected="files at rest: what is prepared or answered is known by their content",
        found="another file than when it was found",
        fix="give the command again when nothing writes the file, or read a copy of it",
    )
