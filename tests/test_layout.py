"""The shape of the repository: imports point down, and what should start quickly imports little."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from commands import REPOSITORY, environment

LEVELS = (
    ("cli", "__main__"),
    ("launch", "predict"),
    ("tune",),
    ("pipeline",),
    ("data",),
    ("train",),
    ("evaluate", "report", "serve_app", "export"),
    ("bundle",),
    ("models",),
    ("features",),
    ("runs", "storage", "job", "errors", "client", "raylway"),
)
"""Rooms from top to bottom; a room imports from its own level and below. `raylway` is the package's own version."""

UPWARD = {("pipeline", "launch")}
"""The stages run inside the connection to Ray, which the pipeline opens only when there is work to do."""

SOURCES = [*(REPOSITORY / "platform" / "raylway").rglob("*.py"), *(REPOSITORY / "serve_app").glob("*.py")]


def level(room: str) -> int:
    return next(place for place, rooms in enumerate(LEVELS) if room in rooms)


def room_of(module: str) -> str:
    """The room that a dotted name belongs to: `raylway.data.clean` is of `data`."""
    first, _, rest = module.partition(".")
    second = rest.partition(".")[0]
    return second if first == "raylway" and any(second in rooms for rooms in LEVELS) else first


def imported(file: Path) -> set[str]:
    """Dotted names of our own modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides the room"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("raylway", "serve_app")}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_imports_point_down(file: Path) -> None:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    here = room_of(".".join(parts[1:] if parts[0] == "platform" else parts))
    for name in imported(file):
        there = room_of(name)
        assert level(there) >= level(here) or (here, there) in UPWARD, f"{here} imports {name} from above"


def test_training_reads_prepared_data_through_features_only() -> None:
    for room in ("train", "evaluate", "report"):
        for file in (REPOSITORY / "platform" / "raylway" / room).rglob("*.py"):
            assert not any(room_of(name) == "data" for name in imported(file)), file


def test_our_folder_does_not_shadow_the_standard_library() -> None:
    assert not (REPOSITORY / "platform" / "__init__.py").exists()
    code = "import platform; print(platform.__file__); print(platform.python_version())"
    shown = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    file, version = shown.stdout.split()
    assert not Path(file).is_relative_to(REPOSITORY / "platform")
    assert version == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["schema"], ["check", "jobs/flights.yaml"]])
def test_quick_commands_import_neither_ray_nor_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from raylway.cli import main; sys.argv = ['raylway', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: print(sorted({'ray', 'torch'} & set(sys.modules)), file=sys.stderr)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr.splitlines()[-1] == "[]"


def test_the_wheel_holds_every_package() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    roots = (REPOSITORY / "platform", REPOSITORY)
    there = {
        ".".join(file.parent.relative_to(root).parts)
        for root in roots
        for file in root.glob("raylway/**/__init__.py" if root.name == "platform" else "serve_app/**/__init__.py")
    }
    assert listed == there


def test_dependencies_are_locked_and_explained() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    locked = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [line for line in locked if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and not set("+@/ ") & set(line) for line in pins)
    names = {need.split(">")[0].split("[")[0] for need in needs}
    assert names <= {pin.split("==")[0] for pin in pins}
    page = (REPOSITORY / "docs" / "dependencies.md").read_text().splitlines()
    rows = [line.split("|")[1] for line in page if line.startswith("| ") and not line.startswith("| package")]
    explained = {name.split("[")[0].strip() for row in rows for name in row.split(", ")}
    assert names == explained


def test_nothing_of_ours_is_ignored_by_git() -> None:
    """A pattern for results must not catch a room of the same name: its files would be missing in every clone."""
    files = [str(file.relative_to(REPOSITORY)) for file in SOURCES]
    asked = subprocess.run(["git", "check-ignore", *files], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert asked.stdout == ""
