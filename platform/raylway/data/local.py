"""Files of this machine: a file, glob or folder, and `pkg://package/path`."""

from __future__ import annotations

import difflib
import glob
import importlib.util
import os
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
        UserError: There is none, or one is no ordinary file.
        OSError: A folder may not be entered.
    """
    expanded = os.path.expanduser(path)  # noqa: PTH111 - takes the name of no user too
    for base in bases:
        candidate = base / expanded
        if candidate.is_file():
            if not declared and format_of(candidate.name) is None:
                raise unknown_format(text, where)
            return [Location(text, str(candidate.absolute()), declared=declared)]
        if candidate.is_dir():
            return _folder(candidate, text, where, declared)
        if glob.has_magic(path):
            found = [Path(name) for name in glob.glob(str(candidate), recursive=True)]  # noqa: PTH207 - takes any path
            # the glob's own words up to its first wildcard, then what was found
            fixed = Path(*_until_magic(Path(expanded)))
            if not is_spelled(path):
                found = [file for file in found if not is_hidden(file.relative_to(base / fixed).as_posix())]
            if files := _chosen([file for file in found if not file.is_dir()], declared, where):
                shown = text[: len(text) - len(path)]
                return [_found(file, base / fixed, f"{shown}{fixed.as_posix()}", declared) for file in files]
        if os.path.lexists(candidate):
            raise _no_file(candidate, where)
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
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the package {package!r} is not installed" if spec is None else f"{package!r} is a module without files",
            where=where,
            expected="pkg://package/path, a path inside an installed Python package",
            found=text,
            fix=f"install it with: pip install {package}" if package and spec is None else "name a package with files",
        )
    return find(path, text, [Path(spec.submodule_search_locations[0])], where, declared)


def _folder(folder: Path, text: str, where: str, declared: Format | None) -> list[Location]:
    every = [Path(inside) / name for inside, _, names in os.walk(folder, onerror=_raise) for name in names]
    visible = [file for file in every if not is_hidden(file.relative_to(folder).as_posix())]
    files = _chosen([file for file in visible if not file.is_dir()], declared, where)
    if not files:
        raise UserError(
            "the folder holds no data file",
            where=where,
            expected=f"files ending in {ENDINGS}",
            found=text + (f", with {', '.join(file.name for file in visible[:5])}" if visible else ", which is empty"),
            fix="name the folder that holds the rows, or their format with data.read.format",
        )
    return [_found(file, folder, text.rstrip("/"), declared) for file in files]


def _raise(error: OSError) -> None:
    """Rows of a folder that may not be entered must not be missing without a word."""
    raise error


def _chosen(files: list[Path], declared: Format | None, where: str) -> list[Path]:
    data = [Path(name) for name in chosen([str(file) for file in files], declared)]
    for file in data:
        if not file.is_file():
            raise _no_file(file, where)
    return data


def _no_file(path: Path, where: str) -> UserError:
    leads = f", which leads to {path.readlink()}" if not path.exists() else ""
    return UserError(
        "the source is a link to nothing" if leads else "the source is no ordinary file",
        where=where,
        expected="files and folders; not a pipe, socket or device, which can be read once only",
        found=f"{path}{leads}",
        fix="take it out of the source" if leads else "write what it gives into a file, and name that",
    )


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
