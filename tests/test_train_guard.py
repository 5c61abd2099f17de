"""Spikes of the loss: seen by all ranks alike, stopped or gone back from, and the same bits after a kill."""

from __future__ import annotations

import json
import math
import shutil
import signal
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_prepared import make
from torch.nn import functional as F
from user_models import FOLDER, fragile

from raylway.errors import RunFailed
from raylway.job.schema import Job
from raylway.job.training import Spike
from raylway.train.checkpoint import newest, opened
from raylway.train.feed.order import Order
from raylway.train.guard import MOST_ROLLBACKS, Guard, Verdict
from raylway.train.plan import plan
from raylway.train.progress import Progress, Rollback
from raylway.train.step import Agreed, Wish

ROWS, BATCH, STEPS = 50, 4, 39
"""13 steps an epoch, the last one of two rows; three epochs."""
GUARDED = {
    "for": "3 epochs",
    "global_batch": BATCH,
    "optimizer": {"kind": "adam", "lr": 0.01, "ema": 0.9, "spike": {"then": "rollback", "window": "6 steps"}},
    "schedule": {"kind": "linear", "warmup": "3 steps"},
    "validate": {"every": "2 steps"},
    "checkpoint": {"every": "5 steps", "keep": 1},
}


def poisoned(folder: Path) -> Any:
    """One row among the fifty on which `user_models.fragile` is wrong by far: it comes once an epoch."""
    parts = {"train": ranks.table(ROWS, 1), "validation": ranks.table(10, 2), "test": ranks.table(2, 3)}
    train = parts["train"].to_pydict()
    train["u"][7], train["label"][7] = 60.0, "no"
    return make(folder, parts | {"train": pa.table(train)}, "label")


def case(folder: Path, prepared: Any, train: dict[str, Any], **acts: Any) -> ranks.Case:
    return ranks.Case(folder, prepared, train, {"kind": "user_models:fragile", "args": acts}, [FOLDER])


def rate(updates: int) -> float:
    return 0.01 * min(1.0, (updates + 1) / 3) * (1 - max(0, updates - 3) / (STEPS - 3))


def plain(prepared: Any) -> tuple[dict[str, torch.Tensor], list[tuple[int, int, int]]]:
    """Plain torch that keeps a copy at every fifth step, and goes back to it by the documented rule."""
    torch.manual_seed(42)
    model = fragile(2, [3], 2)
    optimizer = torch.optim.Adam(model.parameters())
    rows, order = prepared.rows("train"), Order([shard.rows for shard in prepared.shards("train")], 42)
    losses: list[float] = []
    updates, kept, ways = 0, None, []
    for step in range(1, STEPS + 1):
        numeric, categorical, truth, _ = rows.take(order.positions(step - 1, BATCH))
        output = model(torch.from_numpy(numeric), torch.from_numpy(categorical).long())
        loss = F.cross_entropy(output, torch.from_numpy(truth).long())
        is_known = len(losses) >= 6 and kept is not None and len(truth) == BATCH
        if is_known and loss.item() > np.mean(losses[-6:]) + 6 * np.std(losses[-6:]):
            assert kept is not None
            last = [way[2] for way in ways if way[0] == kept[0]]
            ways.append((kept[0], 1 + max([kept[0], *last]), step))
            model.load_state_dict(kept[1])
            optimizer.load_state_dict(deepcopy(kept[2]))
            losses, updates = list(kept[3]), kept[4]
        else:
            if len(truth) == BATCH:
                losses.append(loss.item())
            optimizer.param_groups[0]["lr"] = rate(updates)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            updates += 1
        if step % 5 == 0:
            kept = (step, deepcopy(model.state_dict()), deepcopy(optimizer.state_dict()), list(losses), updates)
    return model.state_dict(), ways


@pytest.mark.parametrize(("workers", "precision"), [(1, "fp16"), (2, "fp32")])
def test_a_spike_is_gone_back_from_and_its_batches_left_out(tmp_path: Path, workers: int, precision: str) -> None:
    """The model is in float64, so that fp16 scales its gradients and changes nothing else."""
    prepared = poisoned(tmp_path / "prepared")
    expected, ways = plain(prepared)
    assert len(ways) >= 2, "the row comes in every epoch; the first time there may be nothing to compare with"
    done = case(tmp_path / "run", prepared, GUARDED | {"precision": precision})
    report = ranks.done(done, workers)
    found = opened(done.run.checkpoints / report.last_checkpoint)
    made = found.state.progress.rollbacks
    assert [(way.to_step, way.first_step, way.last_step) for way in made] == ways
    weights = found.tensors("model.")
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name].numpy(), value.numpy(), rtol=0, atol=1e-10)

    left_out = sum(last - first + 1 for _, first, last in ways)
    assert (report.step, report.updates, report.skipped) == (STEPS, STEPS - left_out, 0)
    assert [step["step"] for step in done.steps()] == list(range(1, STEPS + 1))
    events = [json.loads(line) for line in done.run.events.read_text().splitlines()]
    told = [event for event in events if event["event"] == "rolled back"]
    assert [(event["to_step"], event["first_step"], event["last_step"]) for event in told] == ways
    assert [event["checkpoint"] for event in told] == [f"step-{to:08d}-a001" for to, _, _ in ways]
    assert len(report.rolled_back) == len(ways)
    to, first, last = ways[0]
    assert f"at step {last} (loss " in report.rolled_back[0]
    assert f"back to step {to}, leaving out the batches of steps {first} to {last}" in report.rolled_back[0]


def test_killed_anywhere_it_goes_back_to_the_same_place_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    """In between there are other checkpoints, of best validations, to go on from: they are no places to go back to."""
    prepared = poisoned(tmp_path / "prepared")
    whole = case(tmp_path / "whole", prepared, GUARDED)
    expected = ranks.done(whole)
    end = opened(whole.run.checkpoints / expected.last_checkpoint)
    way = end.state.progress.rollbacks[0]
    assert way.last_step - way.to_step >= 2
    begun_from: list[int] = []
    for number, (at, workers) in enumerate([(way.last_step, 1), (way.last_step + 1, 1), (way.last_step + 4, 1)]):
        folder = tmp_path / f"killed-{number}"
        acts = {"act": "kill", "at": at, "once": str(tmp_path / f"marker-{number}")}
        broken = case(folder, prepared, GUARDED, **acts)
        started = ranks.Ranks([broken.assignment(workers)], workers, folder)
        started.results()
        assert [process.exitcode for process in started.processes] == [-signal.SIGKILL] * workers
        left = newest(broken.run, {})
        assert left is not None
        begun_from.append(left.manifest.step)
        report = ranks.done(broken, workers)
        found = opened(broken.run.checkpoints / report.last_checkpoint)
        progress = msgspec.structs.replace(found.state.progress, anchor="", best_checkpoint="")
        assert progress == msgspec.structs.replace(end.state.progress, anchor="", best_checkpoint="")
        for prefix in ("model.", "optim.", "ema."):
            was = end.tensors(prefix)
            assert all((value == was[name]).all() for name, value in found.tensors(prefix).items())
        assert [(step["loss"], step["lr"], step["updates"]) for step in broken.steps()] == [
            (step["loss"], step["lr"], step["updates"]) for step in whole.steps()
        ]
    assert any(way.to_step < step < way.last_step for step in begun_from), "none was between the two"


@pytest.mark.parametrize("workers", [1, 2])
def test_or_it_stops_before_the_weights_are_touched(tmp_path: Path, workers: int) -> None:
    prepared = poisoned(tmp_path / "prepared")
    optimizer = GUARDED["optimizer"] | {"spike": {"then": "stop", "window": "6 steps"}}
    stopping = case(tmp_path / "run", prepared, GUARDED | {"optimizer": optimizer, "checkpoint": {"every": "1 steps"}})
    reports = [mine[0] for mine in ranks.run(stopping.assignment(workers), workers=workers, folder=tmp_path)]
    order = Order([shard.rows for shard in prepared.shards("train")], 42)
    first = next(step for step in range(6, STEPS) if 7 in order.positions(step, BATCH)) + 1
    for report in reports:
        assert report.failure is not None
        assert report.failure.kind == "run"
        assert f"training stopped at step {first}: loss " in report.failure.text[0]
        assert "a spike, above" in report.failure.text[0]
    assert len(stopping.steps()) == first - 1
    left = newest(stopping.run, {})
    assert left is not None
    assert left.manifest.step == first - 1


def test_without_a_word_in_the_job_nothing_happens_at_a_spike(tmp_path: Path) -> None:
    prepared = poisoned(tmp_path / "prepared")
    optimizer = {"kind": "adam", "lr": 0.01}
    report = ranks.done(case(tmp_path / "run", prepared, GUARDED | {"optimizer": optimizer}))
    assert (report.step, report.updates, report.rolled_back) == (STEPS, STEPS, [])


def test_a_loss_that_is_not_finite_is_gone_back_from_too(tmp_path: Path) -> None:
    train = {
        "for": "1 epoch",
        "global_batch": 4,
        "optimizer": {"kind": "sgd", "lr": 0.1, "spike": {"then": "rollback"}},
        "checkpoint": {"every": "2 steps", "keep": 20},
    }
    prepared = ranks.prepared(tmp_path / "prepared", 40)
    model = {"kind": "user_models:overflowing", "args": {"attempts": [6]}}
    done = ranks.Case(tmp_path / "run", prepared, train, model, [FOLDER])
    report = ranks.done(done)
    assert (report.step, report.updates) == (10, 8)
    state = opened(done.run.checkpoints / "step-00000006-a001").state
    assert state.progress.rollbacks == [Rollback(4, 5, 6, pytest.approx(done.steps()[5]["loss"]))]
    before, after = (done.weights(f"step-{step:08d}-a001") for step in (4, 6))
    assert all((value == after[name]).all() for name, value in before.items())


def test_a_lost_place_to_go_back_to_is_no_place(tmp_path: Path) -> None:
    """The checkpoint was damaged since: the spike stops the run, with weights that were not touched."""
    prepared = poisoned(tmp_path / "prepared")
    whole = case(tmp_path / "whole", prepared, GUARDED | {"checkpoint": {"every": "5 steps", "keep": 99}})
    ranks.done(whole)
    way = opened(whole.run.checkpoints / f"step-{STEPS:08d}-a001").state.progress.rollbacks[0]
    shutil.copytree(whole.folder, tmp_path / "damaged")
    damaged = case(tmp_path / "damaged", prepared, whole.train)
    for folder in damaged.run.checkpoints.iterdir():
        if int(folder.name[5:13]) > way.to_step:
            shutil.rmtree(folder)
    state = damaged.run.checkpoints / f"step-{way.to_step:08d}-a001" / "state.json"
    state.write_bytes(state.read_bytes() + b" ")
    report = ranks.done(damaged)
    assert report.step == STEPS
    assert opened(damaged.run.checkpoints / report.last_checkpoint).state.progress.anchor.endswith("a002")


def guard(window: int = 5, **spike: Any) -> Guard:
    job = Job.model_validate(
        {"name": "case", "data": {"source": "a.csv", "target": "t"}, "train": {"for": "90 steps", "global_batch": 10}}
    )
    return Guard(
        Spike.model_validate({"window": f"{window} steps"} | spike),
        plan(job, "classification", 100, 0, 2, 0, 0),
        may_skip=False,
    )


@given(
    losses=st.lists(st.floats(0, 1e6), min_size=5, max_size=5),
    loss=st.floats(0, 1e7),
    deviations=st.floats(0.1, 20),
)
def test_a_spike_is_a_loss_beyond_so_many_deviations(losses: list[float], loss: float, deviations: float) -> None:
    limit = np.mean(losses) + deviations * np.std(losses)
    if math.isclose(loss, limit, rel_tol=1e-9, abs_tol=1e-9):
        return
    progress = Progress(step=20, losses=losses, anchor="step-00000020-a001")
    found = guard(then="rollback", deviations=deviations).judge(
        progress, Agreed(loss, True, Wish(), 0, np.zeros((1, 2))), torch.tensor(1.0)
    )
    assert found is (Verdict.ROLL_BACK if loss > limit else Verdict.UPDATE)


def test_too_many_ways_back_to_one_checkpoint_end_the_run() -> None:
    judge = guard(then="rollback")
    saved = Progress(step=10, updates=10, losses=[1.0] * 5, anchor="step-00000010-a001")
    progress = saved
    for number in range(MOST_ROLLBACKS):
        progress = judge.rolled_back(progress.after_step(False, progress.losses), saved, math.inf)
        assert progress.rollbacks[-1] == Rollback(10, 11 + number, 11 + number, None)
        assert (progress.updates, progress.skipped) == (10, 0)
    with pytest.raises(RunFailed, match=f"after each of {MOST_ROLLBACKS} ways back to step 10"):
        judge.rolled_back(progress.after_step(False, progress.losses), saved, 9.0)
