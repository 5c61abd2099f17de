"""What only a machine with a GPU can show; elsewhere these tests are skipped and say so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import raylway

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_worker_on_a_gpu_learns_what_a_worker_on_a_cpu_learns(tmp_path: Path, precision: str) -> None:
    x = np.random.default_rng(0).uniform(-3, 3, 4_000)
    pd.DataFrame({"x": x, "answer": np.where(x > 0, "pos", "neg")}).to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "job.yaml").write_text("name: gpu\ndata: {source: rows.csv, target: answer}\n")
    for gpus in (0, 1):
        done = raylway(
            "run", "job.yaml", "--set", f"train.resources.gpus={gpus}", "--set", f"train.precision={precision}",
            "--set", f"storage=on{gpus}", folder=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (evaluation,) = (tmp_path / f"on{gpus}").glob("gpu/*/evaluation.json")
        assert json.loads(evaluation.read_text())["metrics"]["accuracy"] > 0.99
