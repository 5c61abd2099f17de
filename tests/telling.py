"""What commands say that are refused; and small sources and modules to be refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from raylway import cli

ROWS = pd.DataFrame({"size": np.arange(60) % 17, "colour": ["red", "blue", "green"] * 20, "sold": ["yes", "no"] * 30})
ROWS["day"] = [f"2013-01-{1 + row % 28:02d}" for row in range(60)]
CSV = ROWS.to_csv(index=False)
Made = dict[str, Any]
"""Files by name: text, bytes, or what makes the file at its path."""


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, folder: Path, *arguments: str) -> str:
    """What a command says that is refused: exit code 2, every part of the message, and no traceback."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["raylway", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr().err
    assert end.value.code == 2, shown
    assert shown.startswith("error: ") and shown.count("error: ") == 1
    assert all(f"\n  {label}: " in shown for label in ("expected", "found", "fix")), shown
    return shown


def written(folder: Path, made: Made) -> None:
    for name, content in made.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def mine(line: str) -> Made:
    """A module of the user's with one function `f` of this line."""
    return {"made_by_test.py": f"import numpy as np\nimport pyarrow as pa\ndef f(*t):\n    {line}\n"}


def step(call: str = "made_by_test:f(size)") -> dict[str, Any]:
    return {"derive": {"z": call}}
