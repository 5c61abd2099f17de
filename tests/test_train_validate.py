"""Validation: what its figures are, and what follows from them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch

from raylway.models.registry import build
from raylway.train.validate import Best, judge, out_of_patience


def test_the_best_is_the_lowest_loss_or_the_highest_accuracy() -> None:
    values = [0.5, 0.4, 0.4, math.nan, 0.6, math.inf, 0.3]
    best, best_steps = Best(), []
    for step, value in enumerate(values, start=1):
        best = judge(best, "val_loss", value, step)
        best_steps.append((best.step, best.worse_since))
    assert best_steps == [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (7, 0)]
    up = judge(judge(Best(), "val_accuracy", 0.5, 1), "val_accuracy", 0.6, 2)
    assert (up.step, up.value) == (2, 0.6)
    assert judge(Best(), "val_loss", math.nan, 1).value is None


def test_patience_counts_validations_without_a_better_one() -> None:
    assert [out_of_patience(Best(0.1, 1, worse), 2) for worse in (0, 1, 2)] == [False, False, True]
    assert not out_of_patience(Best(0.1, 1, 99), None)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("target", ["label", "v"])
def test_every_row_counts_once_on_any_number_of_workers(tmp_path: Path, workers: int, target: str) -> None:
    """Three rows: one of four ranks has none, and must not make the others wait."""
    case = ranks.Case(
        tmp_path,
        ranks.prepared(tmp_path / "prepared", 23, 3, target=target),
        {"for": "4 steps", "global_batch": 8, "microbatch": 1, "validate": {"every": "4 steps"}},
        {"hidden": [6], "dropout": 0.5},
    )
    report = ranks.done(case, workers)
    transform = case.prepared.manifest.transform
    model = build(case.job.model, transform).eval()
    model.load_state_dict(
        {name: torch.from_numpy(value) for name, value in case.weights(report.last_checkpoint).items()}
    )
    numeric, categorical, truth, _ = case.prepared.rows("validation").take(np.arange(3))
    with torch.no_grad():
        output = model(torch.from_numpy(numeric), torch.from_numpy(categorical).long())
    (found,) = case.validations()
    if target == "label":
        expected = torch.nn.functional.cross_entropy(output, torch.from_numpy(truth).long()).item()
        assert found["val_accuracy"] == pytest.approx((output.argmax(1).numpy() == truth).mean())
    else:
        answers = output[:, 0].numpy() * transform.target.spread + transform.target.mean
        assert found["val_rmse"] == pytest.approx(np.sqrt(np.mean((answers - truth) ** 2)), rel=1e-5)
        expected = np.mean((answers - truth) ** 2) / transform.target.spread**2
    assert found["val_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_it_stops_early_and_a_second_start_does_not_go_on(tmp_path: Path, workers: int) -> None:
    train = {
        "for": "500 steps",
        "global_batch": 8,
        "optimizer": {"lr": 0.3},
        "validate": {"every": "2 steps", "patience": 3},
    }
    case = ranks.Case(tmp_path, ranks.prepared(tmp_path / "prepared", 40, 20), train, {"hidden": [16]})
    report = ranks.done(case, workers)
    assert report.stopped_early
    assert report.step == report.best_step + 6 < 500
    assert case.weights(report.best_checkpoint)
    assert report.best_checkpoint == f"step-{report.best_step:08d}-a001"
    again = ranks.done(case, workers)
    assert (again.step, again.stopped_early, again.best_checkpoint) == (report.step, True, report.best_checkpoint)


def test_without_validation_rows_the_newest_is_the_best(tmp_path: Path) -> None:
    case = ranks.Case(tmp_path, ranks.prepared(tmp_path / "prepared", 23), {"for": "5 steps", "global_batch": 8})
    report = ranks.done(case)
    assert report.best_value is None
    assert (report.best_step, report.best_checkpoint, report.last_checkpoint) == (5, *["step-00000005-a001"] * 2)
