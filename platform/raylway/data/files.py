"""Where the source data lies: files, globs, folders, `pkg://package/path`; and what `python://module:function` returns.

Nothing here reads rows of files, and neither ray nor torch is imported.
"""

from __future__ import annotations

import codecs
import difflib
import functools
import glob
import importlib.util
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from raylway import storage
from raylway.errors import UserError
from raylway.features.prepared import SPLITS, SplitName
from raylway.job.load import LoadedJob
from raylway.job.schema import Files

Format = Literal["csv", "jsonl", "text", "parquet", "python"]
_TEXT_ENDINGS: dict[str, Format] = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text"}
_PACKED = (".gz", ".bz2", ".zst")
_PARQUET_ENDINGS = (".parquet", ".pq")
_ALL_ENDINGS = (*_TEXT_ENDINGS, *(f"{kind}{packed}" for kind in _TEXT_ENDINGS for packed in _PACKED), ".zip")
ENDINGS = f"{', '.join(_TEXT_ENDINGS)}, each perhaps with {', '.join(_PACKED)}; .zip; {', '.join(_PARQUET_ENDINGS)}"
_WHERE = "data.source"


class Location(msgspec.Struct, frozen=True):
    """One place that rows come from, as found before anything is read."""

    name: str
    """How messages and row accounts call it: the job file's words, so that it is the same on every machine."""
    path: str
    """Absolute; for `python://` the module's file."""
    function: str | None = None
    """For `python://`: `module:function`."""
    member: str | None = None
    """One file inside a zip archive."""
    side: SplitName | None = None
    """Where its rows go, if the job names files for each side."""

    kind: Literal["auto", "csv", "jsonl", "text", "parquet"] = "auto"
    """`data.read.format`."""
    delimiter: str = "auto"
    encoding: str = "auto"
    columns: list[str] = []
    """Of CSV files without a heading."""

    @property
    def format(self) -> Format:
        if self.function:
            return "python"
        if self.kind != "auto":
            return self.kind
        lower = (self.member or self.path).lower()
        if lower.endswith(_PARQUET_ENDINGS):
            return "parquet"
        for packed in _PACKED:
            lower = lower.removesuffix(packed)
        return next((kind for ending, kind in _TEXT_ENDINGS.items() if lower.endswith(ending)), "csv")

    @property
    def compression(self) -> Literal["zip", "gz", "bz2", "zst", ""]:
        lower = self.path.lower()
        kinds: tuple[Literal["zip", "gz", "bz2", "zst"], ...] = ("zip", "gz", "bz2", "zst")
        return next((kind for kind in kinds if lower.endswith(f".{kind}")), "")

    @property
    def size(self) -> int:
        return Path(self.path).stat().st_size


def locate(loaded: LoadedJob) -> list[Location]:
    """The files of the job's source, sorted by name; one that is named twice counts once.

    Raises:
        UserError: Nothing is there, the formats are mixed, or an address is of a kind that is not read.
    """
    source = loaded.job.data.source
    where = loaded.location(_WHERE)
    by_path: dict[tuple[str, str | None], Location] = {}
    for side, text in _texts(source):
        try:
            found = [msgspec.structs.replace(each, side=side) for each in _locate_one(text, loaded, where)]
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise UserError(
                "the source can't be looked for", where=where, found=f"{text[:200]}: {error.strerror}"
            ) from None
        for location in found:
            known = by_path.setdefault((location.path, location.function), location)
            if known.side != side:
                raise UserError(
                    "a file can't be on two sides of the split",
                    where=where,
                    found=f"{location.name}: {known.side}, {side}",
                )
    locations = sorted(by_path.values(), key=lambda location: location.name)
    if not locations:
        raise UserError("the source names nothing", where=where, expected="a file, glob, folder, pkg:// or python://")
    if loaded.job.data.read.format == "auto":
        _refuse_mixed(locations, where)
    for location in locations:
        _check_readable(location, where)
    read = loaded.job.data.read
    asked = {"kind": read.format, "delimiter": read.delimiter, "encoding": _encoding(loaded), "columns": read.columns}
    return [msgspec.structs.replace(location, **asked) for location in locations]


def _refuse_mixed(locations: list[Location], where: str) -> None:
    formats = sorted({location.format for location in locations})
    if len(formats) > 1 or (formats == ["python"] and len(locations) > 1):
        examples = [next(location.name for location in locations if location.format == kind) for kind in formats]
        raise UserError(
            "the files of one source must have one format",
            where=where,
            expected="files of one format only, or one python:// function",
            found=", ".join(f"{kind} ({name})" for kind, name in zip(formats, examples, strict=True)),
            fix="name the files of one format, such as FOLDER/*.csv",
        )


def _encoding(loaded: LoadedJob) -> str:
    name = loaded.job.data.read.encoding
    try:
        return name if name == "auto" else codecs.lookup(name).name
    except LookupError:
        raise UserError(
            "there is no such encoding",
            where=loaded.location("data.read.encoding"),
            expected="a name such as utf-8, cp1252, latin-1 or utf-16",
            found=name,
        ) from None


def _texts(source: str | list[str] | Files) -> list[tuple[SplitName | None, str]]:
    if not isinstance(source, Files):
        return [(None, text) for text in ([source] if isinstance(source, str) else source)]
    result: list[tuple[SplitName | None, str]] = []
    for side in SPLITS:
        texts = getattr(source, side)
        result += [(side, text) for text in ([texts] if isinstance(texts, str) else texts or [])]
    return result


def file_at(path: Path) -> Location:
    """One data file that a person named on the command line.

    Raises:
        UserError: It is not there or of no known format.
    """
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), fix=_nearest(path.name, [path.parent]))
    if not _is_data(path.name):
        raise UserError("the file is of no known format", where=str(path), expected=ENDINGS)
    location = Location(str(path), str(path.absolute()))
    _check_readable(location, str(path))
    return location


def _check_readable(location: Location, where: str) -> None:
    if not os.access(location.path, os.R_OK):
        raise UserError(
            "the file can't be read", where=where, expected="a file that this user may read", found=location.name
        )


def checksum(location: Location) -> str:
    """Of the file's content; computed once while the file keeps its size and time."""
    status = Path(location.path).stat()
    return _checksum(location.path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=100_000)
def _checksum(path: str, size: int, mtime_ns: int) -> str:
    return storage.checksum(Path(path))


def zip_members(location: Location) -> list[Location]:
    """The data files inside a zip archive, sorted by name; hidden ones are left out.

    Raises:
        UserError: The archive is damaged, encrypted or holds no CSV file.
    """
    try:
        with zipfile.ZipFile(location.path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir() and not _is_hidden(entry.filename)]
    except zipfile.BadZipFile as error:
        raise UserError(
            "the archive is damaged", where=location.name, expected="a zip archive", found=str(error)
        ) from None
    every = [entry.filename for entry in entries if entry.filename.lower().endswith(tuple(_TEXT_ENDINGS))]
    # a text beside data is a note about it
    wanted = sorted([name for name in every if not name.lower().endswith(".txt")] or every)
    locked = [entry.filename for entry in entries if entry.flag_bits & 1]
    if locked:
        raise UserError("the archive is encrypted", where=location.name, found=locked[0], fix="unpack it first")
    if twice := sorted({name for name in wanted if wanted.count(name) > 1}):
        raise UserError(
            "two files in the archive have the same name", where=location.name, found=twice[0], fix="pack it anew"
        )
    if not wanted:
        raise UserError(
            "the archive holds no data file",
            where=location.name,
            expected=f"one or more files ending in {', '.join(_TEXT_ENDINGS)}",
            found=", ".join(entry.filename for entry in entries[:5]) or "nothing",
        )
    several = len(wanted) > 1
    if len({Location(name, name).format for name in wanted}) > 1 and location.kind == "auto":
        raise UserError(
            "the files in the archive must have one format",
            where=location.name,
            expected="CSV files only, or JSON Lines only",
            found=", ".join(wanted[:5]),
        )
    return [
        msgspec.structs.replace(location, name=f"{location.name}/{name}" if several else location.name, member=name)
        for name in wanted
    ]


def _locate_one(text: str, loaded: LoadedJob, where: str) -> list[Location]:
    scheme, separator, rest = text.partition("://")
    is_data = _is_data if loaded.job.data.read.format == "auto" else _any_ending
    if not separator:
        return _local(text, text, [loaded.folder, Path.cwd()], where, is_data)
    if scheme == "pkg":
        package, _, path = rest.partition("/")
        spec = importlib.util.find_spec(package) if package and "." not in package else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"the package {package!r} is not installed",
                where=where,
                found=text,
                fix=f"install it with: pip install {package}",
            )
        return _local(path, text, [Path(spec.submodule_search_locations[0])], where, is_data)
    if scheme == "python":
        return [_function(rest, text, where)]
    raise UserError(
        f"{scheme}:// is not read",
        where=where,
        expected="a file, glob or folder, pkg://package/path or python://module:function",
        found=text,
        fix="copy the files to a folder that every node sees",
    )


def _function(rest: str, text: str, where: str) -> Location:
    module, _, function = rest.partition(":")
    spec, found = None, text
    try:
        spec = importlib.util.find_spec(module) if module and function.isidentifier() else None
    except Exception as error:  # noqa: BLE001 - looking inside a package runs its __init__, which may raise anything
        found = f"{text} ({type(error).__name__}: {error})"
    if spec is None or spec.origin is None:
        raise UserError(
            "there is no such Python module",
            where=where,
            expected="python://module:function, the module beside the job file, in the current folder or installed",
            found=found,
        )
    return Location(text, str(Path(spec.origin).absolute()), function=rest)


def _local(path: str, text: str, bases: list[Path], where: str, is_data: Callable[[str], bool]) -> list[Location]:
    for base in bases:
        candidate = base / Path(path).expanduser()
        if candidate.is_file():
            if not is_data(candidate.name):
                raise UserError(
                    "the file is of no known format",
                    where=where,
                    expected=ENDINGS,
                    found=text,
                    fix="name its format with data.read.format",
                )
            return [Location(text, str(candidate.absolute()))]
        if candidate.is_dir():
            return _folder(candidate, text, where, is_data)
        if glob.has_magic(path):
            found = [Path(name) for name in glob.glob(str(candidate), recursive=True)]  # noqa: PTH207 - takes any path
            if files := [file for file in found if file.is_file() and is_data(file.name)]:
                # the glob's own words up to its first wildcard, then what was found
                fixed = Path(*_until_magic(Path(path).expanduser()))
                shown = text[: len(text) - len(path)]
                return [_found(file, base / fixed, f"{shown}{fixed.as_posix()}") for file in files]
    raise UserError(
        "the source is not there",
        where=where,
        expected=f"a file, glob or folder, looked for in {' and '.join(dict.fromkeys(str(base) for base in bases))}",
        found=text,
        fix=_nearest(path, bases),
    )


def _folder(folder: Path, text: str, where: str, is_data: Callable[[str], bool]) -> list[Location]:
    files = [
        file
        for file in folder.rglob("*")
        if file.is_file() and is_data(file.name) and not _is_hidden(file.relative_to(folder).as_posix())
    ]
    if not files:
        raise UserError("the folder holds no data file", where=where, expected=f"files ending in {ENDINGS}", found=text)
    return [_found(file, folder, text.rstrip("/")) for file in files]


def _found(file: Path, base: Path, shown: str) -> Location:
    inner = file.relative_to(base).as_posix()
    return Location(inner if shown in ("", ".") else f"{shown}/{inner}", str(file.absolute()))


def _until_magic(path: Path) -> list[str]:
    parts: list[str] = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def _is_data(name: str) -> bool:
    return name.lower().endswith((*_ALL_ENDINGS, *_PARQUET_ENDINGS))


def _any_ending(_: str) -> bool:
    """The job says the format."""
    return True


def _is_hidden(path: str) -> bool:
    """Files that tools leave beside data (`.DS_Store`, `_SUCCESS`, `__MACOSX/`) begin with a dot or an underscore."""
    return any(part.startswith((".", "_")) for part in path.split("/"))


def _nearest(path: str, bases: list[Path]) -> str:
    for base in bases:
        folder = (base / path).parent
        if folder.is_dir():
            near = difflib.get_close_matches(Path(path).name, [file.name for file in folder.iterdir()], n=1)
            if near:
                return f"did you mean {Path(path).parent / near[0]}?"
    return "name a file that exists, as seen from the job file's folder or the current folder"
