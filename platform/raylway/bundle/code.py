"""The user's own modules, of the model and of derived columns, carried in the bundle so that it answers where the job's
folder is not.

Copied are the modules that hold the functions and, through its `import` statements, every module beside it (in the
folder that Python found it in): single files, and packages as a whole, their `.py` files only. What is installed
(`site-packages`, the standard library) stays where it is and must be installed where the model is served. Refused:
a function that lives in an installed package or in compiled code, since neither can be carried.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raylway.errors import UserError


def copy(modules: list[str], target: Path) -> None:
    """Copy the sources of modules, and of what they import from beside themselves, into a new folder.

    Args:
        modules: Dotted names, importable in this process.
        target: The folder to make.

    Raises:
        UserError: A module can't be found, is installed or compiled; or two files of different folders have one name.
    """
    copied: dict[str, Path] = {}
    for module in modules:
        for inside, path in sources(module).items():
            if copied.setdefault(inside, path) != path:
                raise UserError(
                    f"two modules of the job are called {inside}",
                    where=str(path),
                    found=str(copied[inside]),
                    fix="rename one of them",
                )
    target.mkdir()
    for inside, path in copied.items():
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / inside)


def sources(module: str) -> dict[str, Path]:
    """The files of a module and of what it imports from beside itself, by their path in its folder.

    Args:
        module: Dotted name, importable in this process.

    Raises:
        UserError: The module can't be found, is installed or compiled.
    """
    root = _root(module)
    found: dict[str, Path] = {}
    waiting, seen = [module.partition(".")[0]], set()
    while waiting:
        name = waiting.pop()
        if name in seen or (source := _beside(root, name)) is None:
            continue
        seen.add(name)
        for path in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            found[path.relative_to(root).as_posix()] = path
            waiting += _imported(path)
    return found


@contextmanager
def importable(folder: Path | None) -> Iterator[None]:
    """Import the modules of a bundle's `code/` from there, whatever was imported under their names before.

    The folder stays on the path, for imports that a model does while it answers.
    """
    if folder is None:
        yield
        return
    names = {path.stem if path.is_file() else path.name for path in folder.iterdir()}
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}
    sys.path[:] = [str(folder), *(path for path in sys.path if path != str(folder))]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.modules.update(hidden)


def _root(module: str) -> Path:
    """The folder on the path in which the module's top level lies."""
    name = module.partition(".")[0]
    found = importlib.machinery.PathFinder.find_spec(name)
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise UserError(
            f"the source of {module} can't be put into the bundle",
            where=f"the module {module}",
            expected="a Python file, or a package with __init__.py, beside the job file",
            found="no such module" if found is None else found.origin or "a folder without __init__.py",
        )
    origin = Path(found.origin)
    root = origin.parent.parent if found.submodule_search_locations else origin.parent
    installed = {Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")}
    if root in installed:
        raise UserError(
            "a function from an installed package can't be carried in a bundle",
            where=f"the module {module}",
            found=str(origin),
            fix="write a function of your own beside the job file that calls it",
        )
    return root


def _beside(root: Path, name: str) -> Path | None:
    package, file = root / name, root / f"{name}.py"
    if (package / "__init__.py").is_file():
        return package
    return file if file.is_file() else None


def _imported(path: Path) -> list[str]:
    """Top-level names of all modules that a file imports absolutely, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_bytes(), filename=str(path))):
        if isinstance(node, ast.Import):
            names += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module.partition(".")[0])
    return names
