"""One step, and a few of them, against plain torch on the one big batch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ranks
import torch
from made_prepared import make
from torch.nn import functional as F
from user_models import FOLDER, net

from raylway.features.prepared import Prepared
from raylway.train.feed.order import Order


def plain_sgd(
    prepared: Prepared, steps: int, batch: int, lr: float, seed: int
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The weights after some steps of plain torch, each on the whole global batch, and the loss of each step."""
    torch.manual_seed(seed)
    target = prepared.manifest.transform.target
    model = net(len(prepared.manifest.transform.numeric), [3], max(1, len(target.classes)))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rows = prepared.rows("train")
    order = Order([shard.rows for shard in prepared.shards("train")], seed)
    losses = []
    for step in range(steps):
        numeric, categorical, truth, _ = rows.take(order.positions(step, batch))
        output = model(torch.from_numpy(numeric), torch.from_numpy(categorical).long())
        if target.classes:
            loss = F.cross_entropy(output, torch.from_numpy(truth).long())
        else:
            loss = F.mse_loss(output[:, 0], torch.from_numpy((truth - target.mean) / target.spread))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}, losses


@pytest.mark.parametrize("target", ["label", "v"])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_division_of_a_batch_gives_its_gradient(tmp_path: Path, workers: int, target: str) -> None:
    """23 rows in batches of 8: two whole steps and one of 7 rows; and in batches of 11: a last step of one row, which
    leaves other ranks without any. Microbatches make 1, 2 and 4 passes of a whole step."""
    prepared = ranks.prepared(tmp_path / "prepared", 23, target=target)
    cases = []
    for batch in (8, 11):
        for passes in (1, 2, 4):
            microbatch = math.ceil(math.ceil(batch / workers) / passes)
            train = {
                "for": "3 steps",
                "global_batch": batch,
                "microbatch": microbatch,
                "clip": None,
                "optimizer": {"kind": "sgd", "lr": 0.5},
            }
            folder = tmp_path / f"{batch}-{passes}"
            cases.append(ranks.Case(folder, prepared, train, {"kind": "user_models:net"}, [FOLDER]))
    assert {case.plan(workers).accumulation for case in cases} >= {1, 2} | ({4} if workers < 4 else set())
    reports = ranks.run(*(case.assignment(workers) for case in cases), workers=workers, folder=tmp_path)[0]
    for case, report in zip(cases, reports, strict=True):
        assert report.failure is None, report.failure
        expected, losses = plain_sgd(prepared, 3, case.plan(workers).global_batch, 0.5, case.seed)
        found = case.weights(report.last_checkpoint)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-10)
        np.testing.assert_allclose([step["loss"] for step in case.steps()], losses, rtol=1e-10)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_word_weighs_the_same_in_whatever_pass_it_lands(tmp_path: Path, workers: int) -> None:
    """Lines of 1, 2, 3 and 10 words, a row for each word: one plain step of rate 1 moves each logit by the share of its
    word less a half. Means of means would move them by 0.125, or 0.167."""
    words = pa.table({"place": np.arange(16.0), "word": list("a" + "ab" + "bbb" + "b" * 10)})
    prepared = make(tmp_path / "prepared", {"train": words, "validation": words[:0], "test": words[:2]}, "word")
    train = {"for": "1 steps", "global_batch": 16, "clip": None, "optimizer": {"kind": "sgd", "lr": 1.0}}
    cases = [
        ranks.Case(
            tmp_path / str(size), prepared, train | {"microbatch": size}, {"kind": "user_models:frequencies"}, [FOLDER]
        )
        for size in (1, 5, 16)
    ]
    for case, report in zip(
        cases,
        ranks.run(*(case.assignment(workers) for case in cases), workers=workers, folder=tmp_path)[0],
        strict=True,
    ):
        np.testing.assert_allclose(case.weights(report.last_checkpoint)["logits"], [-0.375, 0.375], atol=1e-12)
        assert case.steps()[0]["loss"] == pytest.approx(math.log(2))
