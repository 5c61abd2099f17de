"""What a user's mistake gets: exit code 2, one message that names the place, and no traceback; never a hang."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import raylway

ROWS = pd.DataFrame({"size": np.arange(60) % 17, "colour": ["red", "blue", "green"] * 20, "sold": ["yes", "no"] * 30})


def job(folder: Path, table: pd.DataFrame | None = ROWS, **changes: str) -> Path:
    """A job file whose keys are replaced by `changes` (`data_target="x"` for `data: {target: x}`)."""
    if table is not None:
        table.to_csv(folder / "rows.csv", index=False)
    keys = {"data_source": "rows.csv", "data_target": "sold"} | changes
    inside = ", ".join(f"{key[5:]}: {value}" for key, value in keys.items() if key.startswith("data_"))
    outside = "".join(f"{key}: {value}\n" for key, value in keys.items() if not key.startswith("data_"))
    path = folder / "job.yaml"
    path.write_text(f"name: small\n{outside}data: {{{inside}}}\n")
    return path


def with_cell(column: str, value: object) -> pd.DataFrame:
    table = ROWS.astype(object)
    table.loc[7, column] = value
    return table


CASES = {
    "missing source": (ROWS, {"data_source": "nothing.csv"}, ["job.yaml:2", "data.source", "nothing.csv"]),
    "empty glob": (ROWS, {"data_source": '"parts/*.csv"'}, ["data.source", "parts/*.csv"]),
    "empty source": (ROWS.head(0), {}, ["rows.csv", "no rows"]),
    "missing package": (ROWS, {"data_source": "pkg://no_such_package/x.csv"}, ["no_such_package"]),
    "missing function": (ROWS, {"data_source": "python://no_such_module:rows"}, ["no_such_module"]),
    "unknown kind of file": (ROWS, {"data_source": "job.yaml"}, ["job.yaml", ".parquet"]),
    "target not there": (ROWS, {"data_target": "sodl"}, ["data.target", "sodl", "size, colour, sold"]),
    "feature not there": (ROWS, {"data_features": "{drop: [sise]}"}, ["data.features.drop", "sise", "'size'"]),
    "derive from nothing": (ROWS, {"data_derive": '{big: "sise > 3"}'}, ["data.derive", "sise"]),
    "derive is no expression": (ROWS, {"data_derive": '{big: "size >"}'}, ["data.derive.big", "can't be read"]),
    "derive is code": (ROWS, {"data_derive": "{big: \"open('x')\"}"}, ["data.derive.big", "not allowed"]),
    "single class": (ROWS.assign(sold="yes"), {}, ["sold", "'yes'", "class"]),
    "rare class": (with_cell("sold", "maybe"), {}, ["sold", "maybe", "1"]),
    "infinite number": (with_cell("size", "inf"), {}, ["rows.csv", "9", "size", "infinite"]),
    "words in numbers": (
        with_cell("size", "x"),
        {"data_features": "{numeric: [size]}"},
        ["rows.csv", "9", "size", "x"],
    ),
    "no features": (ROWS, {"data_features": "{drop: [size, colour]}"}, ["feature"]),
    "text regression": (ROWS, {"task": "regression"}, ["sold", "regression"]),
    "storage is a file": (ROWS, {"storage": "rows.csv"}, ["rows.csv", "storage"]),
    "too many workers": (ROWS, {"train": "{workers: 500}"}, ["train.workers", "500"]),
    "batch below workers": (ROWS, {"train": "{workers: 2, global_batch: 1}"}, ["global_batch"]),
    "no such model": (ROWS, {"model": '{kind: "no_such_module:build"}'}, ["model.kind", "no_such_module"]),
    "patience without rows": (
        ROWS,
        {"data_split": "{validation: 0%}", "train": "{validate: {patience: 2}}"},
        ["patience", "validation"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_run_refuses_at_once(tmp_path: Path, name: str) -> None:
    table, changes, words = CASES[name]
    done = raylway("run", job(tmp_path, table, **changes), folder=tmp_path, timeout=100)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "runs" / "small").exists()


def test_check_refuses_the_same(tmp_path: Path) -> None:
    for name in ("missing source", "target not there", "feature not there", "too many workers", "no such model"):
        table, changes, words = CASES[name]
        done = raylway("check", job(tmp_path, table, **changes), folder=tmp_path)
        assert done.returncode == 2, (name, done.stderr)
        assert all(word in done.stderr for word in words), done.stderr


def test_check_shows_what_is_inferred_and_derived(tmp_path: Path) -> None:
    done = raylway("check", job(tmp_path), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("classification", "colour", "categorical", "size", "numeric", "global batch", "steps"):
        assert words in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rum"], ["rum", "run"]),
        (["run"], ["JOB"]),
        (["run", "nothing.yaml"], ["nothing.yaml"]),
        (["serve", "latest"], ["latest", "none"]),
        (["predict", "latest", "x.csv"], ["latest"]),
        (["report", "nothing"], ["nothing"]),
        (["serve", "latest", "--port", "0"], ["port"]),
    ],
)
def test_wrong_words_get_exit_code_2(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    done = raylway(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words)
