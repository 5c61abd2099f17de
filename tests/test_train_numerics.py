"""Number formats, overflows and losses that are no number."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from user_models import FOLDER

from raylway.train.checkpoint import newest, opened
from raylway.train.guard import MOST_SKIPS_IN_A_ROW


def overflowing(folder: Path, attempts: list[int], **train: Any) -> ranks.Case:
    """40 rows in 10 batches of 4, a cosine from 0.1 to 0 over them, a checkpoint at every step; the gradient is
    infinite on the attempts named."""
    job = {
        "for": "1 epoch",
        "global_batch": 4,
        "precision": "fp16",
        "optimizer": {"kind": "sgd", "lr": 0.1},
        "schedule": {"kind": "cosine"},
        "checkpoint": {"every": "1 steps", "keep": 20},
    }
    args: dict[str, Any] = {"attempts": attempts}
    model = {"kind": "user_models:overflowing", "args": args}
    return ranks.Case(folder, ranks.prepared(folder / "prepared", 40), job | train, model, [FOLDER])


def rate(updates: int) -> float:
    return 0.05 * (1 + math.cos(math.pi * updates / 10))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_overflow_is_skipped_counted_and_does_not_move_the_schedule(tmp_path: Path, workers: int) -> None:
    case = overflowing(tmp_path, [1, 2])
    if workers == 2:  # one rank's overflow is everyone's
        case.model["args"]["rank"] = 1
    report = ranks.done(case, workers)
    assert (report.step, report.updates, report.skipped) == (10, 8, 2)
    steps = case.steps()
    assert [step["lr"] for step in steps] == pytest.approx([rate(0), rate(0), *map(rate, range(8))])
    assert [step["skipped"] for step in steps] == [1] + [2] * 9
    names = [f"step-{step:08d}-a001" for step in range(1, 11)]
    weights = [case.weights(name) for name in names]
    for name, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][name])
        assert np.isfinite(weights[9][name]).all()
    assert any((value != weights[2][name]).any() for name, value in weights[1].items())
    scales = [opened(case.run.checkpoints / name).state.scaler["scale"] for name in names]
    assert scales == [2.0**15, *[2.0**14] * 9]


def test_a_resumed_run_goes_on_from_the_updates_and_the_scale(tmp_path: Path) -> None:
    case = overflowing(tmp_path / "one", [1, 2])
    whole = ranks.done(case)
    shutil.copytree(case.folder, tmp_path / "two")
    again = ranks.Case(tmp_path / "two", case.prepared, case.train, {**case.model, "args": {"attempts": []}}, [FOLDER])
    for step in range(6, 11):
        shutil.rmtree(again.run.checkpoints / f"step-{step:08d}-a001")
    report = ranks.done(again)
    assert (report.step, report.updates, report.skipped) == (10, 8, 2)
    assert [(step["step"], step["lr"], step["loss"]) for step in again.steps()] == [
        (step["step"], step["lr"], step["loss"]) for step in case.steps()
    ]
    assert opened(again.run.checkpoints / report.last_checkpoint).state.scaler["scale"] == 2.0**14
    for name, value in case.weights(whole.last_checkpoint).items():
        np.testing.assert_array_equal(again.weights(report.last_checkpoint)[name], value)


def test_too_many_overflows_in_a_row_end_the_run(tmp_path: Path) -> None:
    case = overflowing(tmp_path, list(range(1, 100)), **{"for": "10 epochs"})
    (report,) = ranks.run(case.assignment(1), workers=1, folder=tmp_path)[0]
    assert report.failure is not None
    assert report.failure.kind == "run"
    assert f"step {MOST_SKIPS_IN_A_ROW}, {MOST_SKIPS_IN_A_ROW} steps in a row" in report.failure.text[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_elsewhere_an_infinite_gradient_is_reported_and_not_applied(tmp_path: Path, precision: str) -> None:
    case = overflowing(tmp_path, [3], precision=precision)
    (report,) = ranks.run(case.assignment(1), workers=1, folder=tmp_path)[0]
    assert report.failure is not None
    assert report.failure.kind == "run"
    assert "step 3: loss" in report.failure.text[0]
    assert "gradient norm" in report.failure.text[0]
    assert [step["step"] for step in case.steps()] == [1, 2]
    found = newest(case.run, {})
    assert found is not None
    assert found.manifest.step == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns(tmp_path: Path, precision: str) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 200, 50)
    case = ranks.Case(
        tmp_path, prepared, {"for": "10 epochs", "precision": precision, "optimizer": {"lr": 0.01}}, {"dropout": 0.0}
    )
    report = ranks.done(case)
    assert report.best_value is not None
    assert report.best_value < 0.25  # ln 2 = 0.69 without learning
    assert all(value.dtype == np.float32 for value in case.weights(report.best_checkpoint).values())


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_diverging_run_stops_on_all_ranks_and_keeps_finite_weights(tmp_path: Path, workers: int, kind: str) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 64)
    train = {
        "for": "5 epochs",
        "global_batch": 16,
        "clip": None,
        "optimizer": {"kind": kind, "lr": 1e30},
        "checkpoint": {"every": "1 steps", "keep": 9},
    }
    case = ranks.Case(tmp_path, prepared, train, {"hidden": [8], "dropout": 0.0})
    reports = [mine[0] for mine in ranks.run(case.assignment(workers), workers=workers, folder=tmp_path)]
    for report in reports:
        assert report.failure is not None
        assert report.failure.kind == "run"
        assert "loss" in report.failure.text[0]
        assert "step " in report.failure.text[0]
        assert "nan" in report.failure.text[0] or "not finite" in report.failure.text[0]
    for folder in case.run.checkpoints.glob("step-*"):
        assert all(np.isfinite(value).all() for value in case.weights(folder.name).values())


def test_weights_that_overflow_from_a_finite_gradient_are_seen() -> None:
    from raylway.train.saving import not_finite

    assert not not_finite({"model.weight": torch.ones(3), "optim.weight.exp_avg": torch.tensor([math.inf])})
    assert not_finite({"model.bias": torch.ones(1), "model.weight": torch.tensor([1.0, math.inf])}) == "weight"
