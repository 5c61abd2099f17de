"""Files of this machine: a file, glob or folder, and `pkg://package/path`."""

from __future__ import annotations

import difflib
import glob
import importlib.util
from pathlib import Path

from raylway.data.location import ENDINGS, Format, Location, chosen, format_of, is_hidden, is_spelled, unknown_format
from raylway.errors import UserError


def find(path: str, text: str, bases: list[Path], where: str, declared: Format | None) -> list[Location]:
    """The files that a path names, looked for in each of `bases`.

    Args:
        path: A file, glob or folder.
        text: How the job writes it.
        bases: Folders, in the order of the search.
        where: The key, for messages.
        declared: The format that the job names.

    Raises:
        UserError: There is none.
    """
    for base in bases:
        candidate = base / Path(path).expanduser()
        if candidate.is_file():
            if not declared and format_of(candidate.name) is None:
                raise unknown_format(text, where)
            return [Location(text, str(candidate.absolute()), declared=declared)]
        if candidate.is_dir():
            return _folder(candidate, text, where, declared)
        if glob.has_magic(path):
            found = [Path(name) for name in glob.glob(str(candidate), recursive=True)]  # noqa: PTH207 - takes any path
            # the glob's own words up to its first wildcard, then what was found
            fixed = Path(*_until_magic(Path(path).expanduser()))
            if not is_spelled(path):
                found = [file for file in found if not is_hidden(file.relative_to(base / fixed).as_posix())]
            if files := _chosen([file for file in found if file.is_file()], declared):
                shown = text[: len(text) - len(path)]
                return [_found(file, base / fixed, f"{shown}{fixed.as_posix()}", declared) for file in files]
    raise UserError(
        "the source is not there",
        where=where,
        expected=f"a file, glob or folder, looked for in {' and '.join(dict.fromkeys(str(base) for base in bases))}",
        found=text,
        fix=nearest(path, bases),
    )


def find_in_package(rest: str, text: str, where: str, declared: Format | None) -> list[Location]:
    """The files of `package/path`; the package is not imported.

    Raises:
        UserError: It is not installed or holds no such file.
    """
    package, _, path = rest.partition("/")
    spec = importlib.util.find_spec(package) if package and "." not in package else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the package {package!r} is not installed",
            where=where,
            found=text,
            fix=f"install it with: pip install {package}",
        )
    return find(path, text, [Path(spec.submodule_search_locations[0])], where, declared)


def _folder(folder: Path, text: str, where: str, declared: Format | None) -> list[Location]:
    every = [file for file in folder.rglob("*") if file.is_file()]
    files = _chosen([file for file in every if not is_hidden(file.relative_to(folder).as_posix())], declared)
    if not files:
        raise UserError("the folder holds no data file", where=where, expected=f"files ending in {ENDINGS}", found=text)
    return [_found(file, folder, text.rstrip("/"), declared) for file in files]


def _chosen(files: list[Path], declared: Format | None) -> list[Path]:
    return [Path(name) for name in chosen([str(file) for file in files], declared)]


def _found(file: Path, base: Path, shown: str, declared: Format | None) -> Location:
    inner = file.relative_to(base).as_posix()
    name = inner if shown in ("", ".") else f"{shown}/{inner}"
    return Location(name, str(file.absolute()), declared=declared)


def _until_magic(path: Path) -> list[str]:
    parts: list[str] = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def nearest(path: str, bases: list[Path]) -> str:
    """A hint at the file of a similar name."""
    for base in bases:
        folder = (base / path).parent
        if folder.is_dir():
            near = difflib.get_close_matches(Path(path).name, [file.name for file in folder.iterdir()], n=1)
            if near:
                return f"did you mean {Path(path).parent / near[0]}?"
    return "name a file that exists, as seen from the job file's folder or the current folder"
