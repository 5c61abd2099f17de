"""The average of the weights: torch's own, validated and served, and the same bits after a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from user_models import FOLDER, net

from raylway.errors import UserError
from raylway.train.checkpoint import opened
from raylway.train.feed.order import Order


def averaged(folder: Path, prepared: Any, ema: float | None = 0.8, **train: Any) -> ranks.Case:
    """23 rows in batches of 4: six steps an epoch, 18 in all."""
    settings = {
        "for": "3 epochs",
        "global_batch": 4,
        "optimizer": {"kind": "sgd", "lr": 0.5, "ema": ema},
        "validate": {"every": "6 steps"},
        "checkpoint": {"every": "1 steps", "keep": 40},
    }
    return ranks.Case(folder, prepared, settings | train, {"kind": "user_models:net"}, [FOLDER])


@pytest.mark.parametrize("workers", [1, 2])
def test_it_is_torchs_average_and_what_is_validated_and_bundled(tmp_path: Path, workers: int) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 23, 10)
    case = averaged(tmp_path / "run", prepared)
    report = ranks.done(case, workers)

    torch.manual_seed(42)
    model = net(2, [3], 2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    rows, order = prepared.rows("train"), Order([shard.rows for shard in prepared.shards("train")], 42)
    figures = []
    for step in range(18):
        numeric, categorical, truth, _ = rows.take(order.positions(step, 4))
        optimizer.zero_grad()
        loss = F.cross_entropy(
            model(torch.from_numpy(numeric), torch.from_numpy(categorical).long()), torch.from_numpy(truth).long()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        if step % 6 == 5:
            numeric, categorical, truth, _ = prepared.rows("validation").take(np.arange(10))
            with torch.no_grad():
                output = average(torch.from_numpy(numeric), torch.from_numpy(categorical).long())
            figures.append(F.cross_entropy(output, torch.from_numpy(truth).long()).item())

    raw = opened(case.run.checkpoints / report.last_checkpoint).tensors("model.")
    bundled = case.weights(report.last_checkpoint)  # what evaluation and the bundle load
    for name, value in average.module.state_dict().items():
        np.testing.assert_allclose(bundled[name], value.numpy(), rtol=0, atol=1e-12)
        np.testing.assert_allclose(raw[name].numpy(), model.state_dict()[name].numpy(), rtol=0, atol=1e-12)
        assert np.abs(bundled[name] - raw[name].numpy()).max() > 1e-4, "there is nothing to tell the two apart by"
    lines = [json.loads(line) for line in case.run.metrics.read_text().splitlines()]
    found = [line["val_loss"] for line in lines if line["kind"] == "validation"]
    assert found == pytest.approx(figures, rel=1e-10)
    assert report.best_value == min(found)


@pytest.mark.parametrize("workers", [1, 2])
def test_it_goes_on_to_the_last_bit(tmp_path: Path, workers: int) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 23, 10)
    whole = averaged(tmp_path / "whole", prepared)
    expected = ranks.done(whole, workers)
    shutil.copytree(whole.folder, tmp_path / "again")
    again = averaged(tmp_path / "again", prepared)
    for step in range(8, 19):
        shutil.rmtree(again.run.checkpoints / f"step-{step:08d}-a001")
    report = ranks.done(again, workers)
    assert report.last_checkpoint == "step-00000018-a002"
    for prefix in ("model.", "ema."):
        was = opened(whole.run.checkpoints / expected.last_checkpoint).tensors(prefix)
        found = opened(again.run.checkpoints / report.last_checkpoint).tensors(prefix)
        assert found.keys() == was.keys()
        assert all((value == was[name]).all() for name, value in found.items())


def test_a_skipped_step_does_not_move_it(tmp_path: Path) -> None:
    train = {
        "for": "1 epoch",
        "global_batch": 4,
        "precision": "fp16",
        "optimizer": {"kind": "sgd", "lr": 0.1, "ema": 0.5},
        "checkpoint": {"every": "1 steps", "keep": 20},
    }
    model = {"kind": "user_models:overflowing", "args": {"attempts": [1, 4]}}
    case = ranks.Case(tmp_path, ranks.prepared(tmp_path / "prepared", 40), train, model, [FOLDER])
    assert ranks.done(case).skipped == 2
    kept = [opened(case.run.checkpoints / f"step-{step:08d}-a001") for step in range(1, 11)]
    weights, averages = ([each.tensors(prefix) for each in kept] for prefix in ("model.", "ema."))
    for name in weights[0]:
        assert torch.equal(averages[0][name], weights[0][name])
        assert torch.equal(averages[1][name], weights[1][name]), "after the first update it is the weights"
        assert torch.equal(averages[3][name], averages[2][name])
        torch.testing.assert_close(averages[4][name], (averages[3][name] + weights[4][name]) / 2)


def test_a_checkpoint_without_an_average_does_not_fit_a_job_with_one(tmp_path: Path) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 23)
    ranks.done(averaged(tmp_path / "run", prepared, None, **{"for": "2 steps"}))
    (report,) = ranks.run(averaged(tmp_path / "run", prepared).assignment(1), workers=1, folder=tmp_path)[0]
    assert report.failure is not None
    error = report.failure.as_error()
    assert isinstance(error, UserError)
    assert "train.optimizer.ema" in str(error)


@pytest.mark.parametrize("way", ["shard", "tensor", "pipeline"])
def test_parts_of_a_model_have_parts_of_its_average(tmp_path: Path, way: str) -> None:
    """Two workers that hold a model together, against one that holds it alone; each goes on from the other's."""
    prepared = ranks.prepared(tmp_path / "prepared", 23, 10)
    whole, divided = (averaged(tmp_path / name, prepared, microbatch=2) for name in ("whole", "divided"))
    divided.train["parallel"] = {way: 2}
    whole.model = divided.model = {"hidden": [8, 6], "dropout": 0}
    expected, found = ranks.done(whole, 1), ranks.done(divided, 2)
    same(divided, found, whole, expected)
    for one, other, workers in ((whole, divided, 2), (divided, whole, 1)):
        again = averaged(tmp_path / f"again-{workers}", prepared)
        shutil.copytree(one.folder, again.folder)
        for step in range(9, 19):
            shutil.rmtree(again.run.checkpoints / f"step-{step:08d}-a001")
        again.train, again.model = other.train, other.model
        same(again, ranks.done(again, workers), whole, expected)


def same(one: ranks.Case, report: Any, other: ranks.Case, expected: Any) -> None:
    assert report.best_value == pytest.approx(expected.best_value, rel=1e-4)
    weights = other.weights(expected.last_checkpoint)
    for name, value in one.weights(report.last_checkpoint).items():
        np.testing.assert_allclose(value, weights[name], rtol=0, atol=1e-5)
