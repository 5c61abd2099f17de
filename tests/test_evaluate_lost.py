"""Evaluation whose workers are killed: it goes on, or says so, and counts every row once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from made import made
from test_evaluate import QUIET, padded, rule, staged

from raylway.errors import RunFailed
from raylway.evaluate import evaluate
from raylway.models.registry import ModelSpec

DYING = """
import os, signal
from pathlib import Path
import torch

class Dying(torch.nn.Linear):
    def forward(self, numeric, categorical):
        deaths = Path(self.folder) / "deaths"
        if os.getpid() != self.driver and len(deaths.read_text().split()) < self.times:
            with deaths.open("a") as file:
                file.write(f"{os.getpid()}\\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(numeric)

def build(num_numeric, category_counts, num_outputs, *, folder, driver, times):
    made = Dying(num_numeric, num_outputs)
    made.folder, made.driver, made.times = folder, driver, times
    return made
"""


@pytest.mark.parametrize("times", [1, pytest.param(99, marks=pytest.mark.long)])
def test_a_worker_that_is_killed_is_replaced_and_at_last_ends_the_evaluation(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    (tmp_path / "deaths").write_text("")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "model_that_dies.py").write_text(DYING)
    monkeypatch.syspath_prepend(str(tmp_path / "job"))
    prepared = padded(tmp_path / "prepared")
    spec = ModelSpec("model_that_dies:build", {"folder": str(tmp_path), "driver": os.getpid(), "times": times})
    run = staged(tmp_path, prepared, made(rule(200, 3), "label", {"x": "number"}, spec, steps=50))
    with QUIET.stage("evaluate") as stage:
        if times == 1:
            found = evaluate.score(evaluate.answers(prepared, run.staged_bundle, 64, stage), prepared.manifest)
            assert found.confusion == [[2, 1], [0, 2]]
        else:
            with pytest.raises(RunFailed, match="evaluation: a worker died again and again"):
                evaluate.answers(prepared, run.staged_bundle, 64, stage)
    killed = (tmp_path / "deaths").read_text().split()
    assert len(killed) == len(set(killed)) == min(times, 4) and str(os.getpid()) not in killed
    sys.modules.pop("model_that_dies", None)
