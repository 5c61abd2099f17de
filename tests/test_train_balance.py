"""Balanced classes: exact counts and gradients, the same bits after a kill, and a minority that is learnt."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_prepared import make
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from user_models import FOLDER, net

from raylway.errors import UserError
from raylway.features.prepared import Prepared
from raylway.train.feed.balanced import Balanced, draws, sentence, shares, weights
from raylway.train.feed.order import Order

CODES = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(lambda codes: np.array(codes, np.int32))


def skewed(folder: Path, rows: int, validation: int = 0, every: int = 7) -> Prepared:
    """One row in `every` is rare, and lies among the others of its side."""

    def table(count: int, seed: int) -> pa.Table:
        draw = np.random.default_rng(seed)
        rare = np.arange(count) % every == 0
        u = draw.normal(size=count) + 2 * rare
        kind = np.array(["a", "b", "c"])[draw.integers(0, 3, count)]
        return pa.table({"u": u, "v": draw.normal(size=count), "kind": kind, "label": np.where(rare, "rare", "usual")})

    splits = {"train": table(rows, 1), "validation": table(max(validation, 2), 2).slice(0, validation)}
    return make(folder, splits | {"test": table(100, 3)}, "label")


@given(codes=CODES)
def test_weights_are_scikit_learns(codes: np.ndarray) -> None:
    present = np.unique(codes)
    expected = np.zeros(5)
    expected[present] = compute_class_weight("balanced", classes=present, y=codes)
    np.testing.assert_allclose(weights(np.bincount(codes, minlength=5).tolist()), expected, rtol=1e-12)


@given(codes=CODES, seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 30), epochs=st.integers(1, 5))
@settings(max_examples=200)
def test_draws_are_equal_among_classes_and_among_the_rows_of_a_class(
    codes: np.ndarray, seed: int, batch: int, epochs: int
) -> None:
    order = Balanced(codes, 5, seed)
    rows = np.bincount(codes, minlength=5)
    steps = math.ceil(len(codes) / batch)
    used = np.zeros(len(codes), int)
    for epoch in range(epochs):
        seen = [order.positions(epoch * steps + step, batch) for step in range(steps)]
        assert [len(each) for each in seen] == [order.step_rows(step, batch) for step in range(steps)]
        drawn = np.bincount(codes[np.concatenate(seen)], minlength=5)
        assert drawn.sum() == len(codes)
        assert drawn.tolist() == draws(rows.tolist(), epoch)
        assert np.ptp(drawn[rows > 0]) <= 1
        assert not drawn[rows == 0].any()
        used += np.bincount(np.concatenate(seen), minlength=len(codes))
        for code in np.unique(codes):
            assert np.ptp(used[codes == code]) <= 1
    totals = [used[codes == code].sum() for code in np.unique(codes)]
    assert max(totals) - min(totals) <= 1


@given(codes=CODES, batch=st.integers(1, 30), step=st.integers(0, 60), workers=st.integers(1, 5))
def test_ranks_divide_the_same_balanced_batch_at_any_step(
    codes: np.ndarray, batch: int, step: int, workers: int
) -> None:
    """Each rank asks an order of its own, at once for this step: what a resumed run does."""
    whole = Balanced(codes, 5, 7)
    for earlier in range(step):
        whole.positions(earlier, batch)
    parts = [Balanced(codes, 5, 7).positions(step, batch, rank, workers) for rank in range(workers)]
    assert np.concatenate(parts).tolist() == whole.positions(step, batch).tolist()


def plain(prepared: Prepared, steps: int, batch: int, balance: str) -> tuple[dict[str, np.ndarray], list[float]]:
    """Plain torch on the whole batches: sum(weight * loss) / rows."""
    torch.manual_seed(42)
    model = net(2, [3], 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rows = prepared.rows("train")
    codes = rows.take(np.arange(len(rows)))[2]
    weight = torch.ones(2, dtype=torch.float64)
    order: Any = Balanced(codes, 2, 42)
    if balance == "weights":
        order = Order([shard.rows for shard in prepared.shards("train")], 42)
        weight = torch.from_numpy(compute_class_weight("balanced", classes=np.array([0, 1]), y=codes))
    losses = []
    for step in range(steps):
        numeric, categorical, truth, _ = rows.take(order.positions(step, batch))
        output = model(torch.from_numpy(numeric), torch.from_numpy(categorical).long())
        target = torch.from_numpy(truth).long()
        loss = (weight[target] * F.cross_entropy(output, target, reduction="none")).sum() / len(target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}, losses


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_division_of_a_balanced_batch_gives_its_gradient(tmp_path: Path, workers: int) -> None:
    prepared = skewed(tmp_path / "prepared", 23)
    cases = []
    for balance in ("weights", "resample"):
        for batch, passes in ((8, 1), (8, 2), (11, 2)):
            train = {
                "for": "5 steps",
                "global_batch": batch,
                "microbatch": math.ceil(math.ceil(batch / workers) / passes),
                "clip": None,
                "optimizer": {"kind": "sgd", "lr": 0.5},
            }
            folder = tmp_path / f"{balance}-{batch}-{passes}"
            cases.append(
                ranks.Case(folder, prepared, train, {"kind": "user_models:net"}, [FOLDER], {"balance": balance})
            )
    reports = ranks.run(*(case.assignment(workers) for case in cases), workers=workers, folder=tmp_path)[0]
    for case, report in zip(cases, reports, strict=True):
        assert report.failure is None, report.failure
        expected, losses = plain(prepared, 5, case.plan(workers).global_batch, case.data["balance"])
        for name, value in expected.items():
            np.testing.assert_allclose(case.weights(report.last_checkpoint)[name], value, rtol=0, atol=1e-10)
        np.testing.assert_allclose([step["loss"] for step in case.steps()], losses, rtol=1e-10)


@pytest.mark.parametrize("balance", ["weights", "resample"])
def test_broken_off_and_resumed_it_ends_with_the_same_bits(tmp_path: Path, balance: str) -> None:
    prepared = skewed(tmp_path / "prepared", 23, 10)
    train = {
        "for": "3 epochs",
        "global_batch": 4,
        "checkpoint": {"every": "1 steps", "keep": 2},
    }
    whole = ranks.Case(tmp_path / "whole", prepared, train, data={"balance": balance})
    expected = ranks.done(whole, 2)
    broken = ranks.Case(tmp_path / "broken", prepared, train | {"for": "10 steps"}, data=whole.data)
    first = ranks.done(broken, 2)
    assert first.step == 10
    again = ranks.Case(tmp_path / "broken", prepared, train, data=whole.data)
    report = ranks.done(again, 2)
    assert report.step == expected.step == 18
    found, wanted = again.weights(report.last_checkpoint), whole.weights(expected.last_checkpoint)
    assert all((found[name] == value).all() for name, value in wanted.items())


def test_a_rare_class_is_found_more_often_and_validation_weighs_it(tmp_path: Path) -> None:
    prepared = skewed(tmp_path / "prepared", 600, 210, every=21)
    recall, losses = {}, {}
    for balance in ("none", "weights", "resample"):
        train = {"for": "40 epochs", "optimizer": {"lr": 0.01}}
        model = {"kind": "user_models:net"}
        case = ranks.Case(tmp_path / balance, prepared, train, model, [FOLDER], {"balance": balance})
        report = ranks.done(case)
        trained = net(2, [3], 2)
        trained.load_state_dict(
            {name: torch.from_numpy(value) for name, value in case.weights(report.last_checkpoint).items()}
        )
        for split in ("validation", "test"):
            numeric, categorical, truth, _ = prepared.rows(split).take(np.arange(len(prepared.rows(split))))
            with torch.no_grad():
                output = trained(torch.from_numpy(numeric), torch.from_numpy(categorical).long())
            recall[balance] = (output.argmax(1).numpy()[truth == 0] == 0).mean()
            if split == "validation":
                counts = prepared.manifest.classes["train"]
                weight = torch.from_numpy(weights(counts)) if balance != "none" else None
                losses[balance] = F.cross_entropy(output, torch.from_numpy(truth).long(), weight=weight).item()
        lines = [json.loads(line) for line in case.run.metrics.read_text().splitlines()]
        shown = [line["val_loss"] for line in lines if line["kind"] == "validation"][-1]
        assert shown == pytest.approx(losses[balance], rel=1e-6)
    assert recall["weights"] >= recall["none"] + 0.3
    assert recall["resample"] >= recall["none"] + 0.3


def test_numbers_cannot_be_balanced(tmp_path: Path) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 23, target="v")
    case = ranks.Case(tmp_path, prepared, {}, data={"balance": "weights"})
    with pytest.raises(UserError, match="only classes can be balanced") as raised:
        case.plan(1)
    assert raised.value.where == "data.balance"


def test_it_is_said_what_was_done() -> None:
    counted = sentence("resample", shares("resample", ["a", "b", "c"], [90, 0, 10]))
    each = "an epoch draws 50 times among the"
    assert counted == f"2 classes balanced: {each} 90 rows of a and {each} 10 rows of c"
    weighed = sentence("weights", shares("weights", ["a", "b"], [90, 10]))
    assert weighed == "2 classes balanced: a row of a weighs 0.556 and a row of b weighs 5"
