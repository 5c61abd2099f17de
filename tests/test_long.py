"""Longer campaigns, run by `make test-long`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from commands import REPOSITORY, environment, raylway
from sklearn import metrics
from sklearn.datasets import load_digits
from stores import Bucket
from test_buckets import everything
from test_storage import named

from raylway.storage import place as at

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


def test_the_articles_job_ends_in_its_two_metrics(tmp_path: Path) -> None:
    done = raylway("run", REPOSITORY / "jobs" / "article.yaml", folder=tmp_path, timeout=1500)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs" / "article").iterdir()
    evaluation = json.loads((run / "evaluation.json").read_text())["metrics"]
    answers = pq.read_table(run / "predictions.parquet").to_pandas()
    assert len(answers) == 1_200
    accuracy = metrics.accuracy_score(answers["target"], answers["prediction"])
    assert evaluation["accuracy"] == pytest.approx(accuracy)
    assert evaluation["f1_weighted"] == pytest.approx(
        metrics.f1_score(answers["target"], answers["prediction"], average="weighted")
    )
    assert accuracy > 0.8
    assert f"accuracy {accuracy:.4g}" in done.stderr
    assert "F1 (weighted)" in done.stderr


def test_killed_at_random_moments_the_same_command_ends_in_the_same_bits(tmp_path: Path) -> None:
    """The whole command is killed in whatever stage it is, again and again; what it ends with is the unbroken run's."""
    table = pd.DataFrame({"x": range(3_000), "colour": ["red", "blue", "green"] * 1_000})
    table["sold"] = (table["x"] * 7 % 11 + (table["colour"] == "red") * 3 > 6).map({True: "yes", False: "no"})
    for name in ("whole", "broken"):
        folder = tmp_path / name
        folder.mkdir()
        table.to_csv(folder / "rows.csv", index=False)
        (folder / "job.yaml").write_text(
            "name: killed\ndata: {source: rows.csv, target: sold}\n"
            "train: {for: 150 epochs, global_batch: 32, checkpoint: {every: 100 steps}}\n"
        )
    whole = raylway("run", "job.yaml", folder=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    draw = random.Random(5)
    killed = 0
    for _ in range(8):
        command = subprocess.Popen(
            [sys.executable, "-m", "raylway", "run", "job.yaml"],
            cwd=tmp_path / "broken",
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            command.wait(draw.uniform(3, 30))
        except subprocess.TimeoutExpired:
            os.kill(command.pid, signal.SIGKILL)
            killed += command.wait() == -signal.SIGKILL
            time.sleep(3)  # Ray's processes notice, and end
    assert killed >= 3
    done = raylway("run", "job.yaml", folder=tmp_path / "broken")
    assert done.returncode == 0, done.stderr
    bundles = [tmp_path / name / "runs" / "killed" for name in ("whole", "broken")]
    weights = [next(folder.glob("*/bundle/model.safetensors")).read_bytes() for folder in bundles]
    assert weights[0] == weights[1]
    steps = []
    for folder in bundles:
        lines = [json.loads(line) for line in next(folder.glob("*/metrics.jsonl")).read_text().splitlines()]
        steps.append([line["step"] for line in lines if line["kind"] == "step"])
    assert steps[0] == steps[1] == list(range(1, len(steps[0]) + 1))


def verified(
    folder: Path, model: str, *more: str, storage: str = "runs"
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """`raylway verify-resume` of a small job, and what it found."""
    digits = load_digits(as_frame=True).frame
    digits.to_csv(folder / "rows.csv", index=False)
    (folder / "job.yaml").write_text(
        f"name: verified\nstorage: {storage}\n"
        f"data: {{source: rows.csv, target: target, features: {{categorical: [pixel_0_1]}}}}\n"
        f"model: {model}\ntrain: {{for: 60 epochs, global_batch: 32, {', '.join(more)}}}\n"
    )
    done = raylway("verify-resume", "job.yaml", "--kills", "2", "--seed", "7", "--json", folder=folder, timeout=900)
    return done, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_is_shown_to_resume_exactly(tmp_path: Path, workers: int) -> None:
    done, found = verified(tmp_path, "{kind: mlp, hidden: [16], dropout: 0.3}", f"workers: {workers}")
    assert done.returncode == 0, done.stderr
    assert len(found["kills"]) == 2
    assert all(kill["aimed_at"] <= kill["step"] < found["steps"] for kill in found["kills"])
    assert any(kill["resumed_from"] for kill in found["kills"])
    counts = {each["what"]: (each["count"], each["different"]) for each in found["compared"]}
    assert counts["losses"] == counts["global batches"] == (found["steps"], 0)
    assert counts["weights"][0] and counts["optimizer's tensors"][0]
    assert not any(each["different"] for each in found["compared"])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["prepared"]


def test_a_job_in_a_bucket_is_shown_to_resume_exactly(
    tmp_path: Path, s3_server: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow enough for its steps to be seen before it ends."""
    monkeypatch.setenv("RAYLWAY_CACHE", str(tmp_path / "cache"))
    place = named(monkeypatch, s3_server).address("verified")
    (tmp_path / "loose.py").write_text(LOOSE.replace("(1 + os.urandom(1)[0] / 1000)", "(1 + (time.sleep(0.02) or 0))"))
    done, found = verified(tmp_path, '{kind: "loose:build"}', storage=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(kill["aimed_at"] <= kill["step"] < found["steps"] for kill in found["kills"])
    assert any(kill["resumed_from"] for kill in found["kills"])
    assert not any(each["different"] for each in found["compared"])
    counts = {each["what"]: each["count"] for each in found["compared"]}
    assert counts["global batches"] == found["steps"] and counts["weights"]
    assert {name.partition("/")[0] for name in everything(at(place))} == {"prepared"}


def test_a_model_with_random_numbers_of_its_own_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "loose.py").write_text(LOOSE)
    done, found = verified(tmp_path, '{kind: "loose:build"}')
    assert done.returncode == 1, done.stderr
    different = {each["what"]: each["different"] for each in found["compared"]}
    assert different["global batches"] == different["steps, each once"] == 0
    assert different["losses"] and different["weights"]


LOOSE = """
import os
import time
import torch

class Loose(torch.nn.Linear):
    def forward(self, numeric, categorical):
        return super().forward(numeric) * (1 + os.urandom(1)[0] / 1000)

def build(num_numeric, category_counts, num_outputs):
    return Loose(num_numeric, num_outputs)
"""
