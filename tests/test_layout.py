"""The shape of the repository: imports point down, and what starts quickly imports little."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from commands import REPOSITORY

LIBRARY = REPOSITORY / "platform" / "raylway"

LEVELS = [
    {"cli", "__main__"},
    {"launch", "predict"},
    {"tune"},
    {"pipeline"},
    {"data"},
    {"train"},
    {"evaluate", "report"},
    {"bundle"},
    {"models"},
    {"features"},
    {"runs", "storage", "job", "errors", "__init__"},
]
"""From top to bottom. A room imports its own level and those below."""

NOT_DOWN = {
    ("pipeline", "launch"),  # the pipeline runs inside the connection that `launch.start` gives
    ("launch", "data"),  # `launch.check` shows what preparation would decide
}


def imports(file: Path) -> set[str]:
    """The modules of Raylway and serve_app that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("raylway", "serve_app")}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (LIBRARY / parts[1]).with_suffix("").exists() else ""


def level(name: str) -> int:
    return next(place for place, rooms in enumerate(LEVELS) if name in rooms)
