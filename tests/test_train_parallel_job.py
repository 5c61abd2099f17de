"""A whole job through Ray with one copy of the model on two workers: trained, evaluated, bundled and reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import raylway

JOB = """\
name: case
data: {source: rows.csv, target: label}
model: {hidden: [16, 8], dropout: 0.1}
train:
  for: 3 epochs
  global_batch: 32
  optimizer: {lr: 0.01}
  resources: {gpus: 0}
"""
long = pytest.mark.long
WAYS = [
    pytest.param("shard", "2 workers x 1 microbatches of at most 16 rows", marks=long),
    pytest.param("tensor", "1 groups of 2 x 1 microbatches of at most 32 rows", marks=long),
    pytest.param("pipeline", "1 groups of 2 x 8 microbatches of at most 4 rows"),
]


@pytest.mark.parametrize(("way", "step"), WAYS)
def test_a_divided_model_is_trained_evaluated_and_bundled(tmp_path: Path, way: str, step: str) -> None:
    draw = np.random.default_rng(0)
    table = pd.DataFrame(draw.normal(size=(800, 3)), columns=["a", "b", "c"])
    table["kind"] = draw.choice(["x", "y"], 800)
    table["label"] = np.where(table["a"] + table["b"] + (table["kind"] == "x") > 0, "yes", "no")
    table.to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "job.yaml").write_text(JOB)
    asked = ("job.yaml", "--set", f"train.parallel.{way}=2")
    checked = raylway("check", *asked, folder=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "workers     2 with 1 CPU each" in checked.stdout
    assert step in checked.stdout

    done = raylway("run", *asked, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs" / "case").iterdir()
    assert json.loads((run / "evaluation.json").read_text())["metrics"]["accuracy"] > 0.85
    assert (run / "report.html").exists()
    predicted = raylway("predict", "case", "rows.csv", "-o", "answers.csv", folder=tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    answers = pd.read_csv(tmp_path / "answers.csv")
    assert (answers["prediction"] == table["label"]).mean() > 0.85
