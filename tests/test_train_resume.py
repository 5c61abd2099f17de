"""Runs that are broken off anywhere end with the bits of the unbroken one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
from user_models import FOLDER

from raylway.train import checkpoint
from raylway.train.feed.order import Order

EVERY_STEP = {
    "for": "3 epochs",
    "global_batch": 4,
    "optimizer": {"kind": "adam", "lr": 0.01},
    "schedule": {"kind": "cosine", "warmup": "4 steps"},
    "validate": {"every": "1 epoch"},
    "checkpoint": {"every": "1 steps", "keep": 2},
}
"""23 rows in batches of 4: six steps an epoch, 18 in all."""


def recording(folder: Path, prepared: Any, record: Path, **acts: Any) -> ranks.Case:
    record.mkdir(parents=True)
    model = {"kind": "user_models:watched", "args": {"dropout": 0.5, "record": str(record), **acts}}
    return ranks.Case(folder, prepared, EVERY_STEP, model, [FOLDER])


def recorded(folder: Path, workers: int) -> list[list[float]]:
    """The first number of each row, for each step, over all ranks."""
    steps = zip(*(passes(folder, rank) for rank in range(workers)), strict=True)
    return [[value for seen in step for value in seen["rows"]] for step in steps]


def passes(folder: Path, rank: int) -> list[dict[str, Any]]:
    """What a rank has seen in each forward pass."""
    return [json.loads(line) for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines()]


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all((value == other[name]).all() for name, value in one.items())


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_after_step_10_it_makes_steps_11_to_18_and_no_others(tmp_path: Path, workers: int) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 23, 10)
    whole = recording(tmp_path / "whole", prepared, tmp_path / "rows-whole")
    expected = ranks.done(whole, workers)
    marker = tmp_path / "killed"
    broken = recording(
        tmp_path / "broken",
        prepared,
        tmp_path / "rows-broken",
        act="kill",
        at=11,
        rank=workers - 1,
        once=str(marker),
    )
    started = ranks.Ranks([broken.assignment(workers)], workers, tmp_path)
    results = started.results()
    assert results[-1] == [None]
    assert started.processes[-1].exitcode == -signal.SIGKILL
    assert marker.read_text() == str(started.processes[-1].pid)
    if workers == 2:  # the peer fails at once and leaves it to Ray Train to start again
        assert isinstance(results[0][0], str)
    assert [step["step"] for step in broken.steps()] == list(range(1, 11))

    report = ranks.done(broken, workers)
    assert (report.step, report.updates) == (expected.step, expected.updates) == (18, 18)
    assert [(step["step"], step["lr"], step["loss"]) for step in broken.steps()] == [
        (step["step"], step["lr"], step["loss"]) for step in whole.steps()
    ]
    assert len(whole.steps()) == 18
    assert same_bits(whole.weights(expected.last_checkpoint), broken.weights(report.last_checkpoint))
    assert whole.weights(expected.best_checkpoint).keys() == broken.weights(report.best_checkpoint).keys()

    seen = recorded(tmp_path / "rows-broken", 1)
    if workers == 2:  # the surviving rank had begun step 11 when its peer died
        lines = (tmp_path / "rows-broken" / "rank-0.jsonl").read_text().splitlines()
        (tmp_path / "rows-broken" / "rank-0.jsonl").write_text("\n".join(lines[:10] + lines[11:]))
        seen = recorded(tmp_path / "rows-broken", 2)
    assert seen == recorded(tmp_path / "rows-whole", workers)
    # Dropout draws anew at each step of each rank, and the same again after a resume.
    draws = [[seen["draw"] for seen in passes(tmp_path / "rows-broken", rank)] for rank in range(workers)]
    assert draws == [[seen["draw"] for seen in passes(tmp_path / "rows-whole", rank)] for rank in range(workers)]
    assert len({draw for rank in draws for draw in rank}) == 18 * workers
    first = np.float32(prepared.rows("train").take(np.arange(23))[0][:, 0])
    for epoch in range(3):
        rows = np.float32([value for step in seen[6 * epoch : 6 * epoch + 6] for value in step])
        assert sorted(rows) == sorted(first)
    order = Order([shard.rows for shard in prepared.shards("train")], 42)
    assert [np.float32(rows).tolist() for rows in seen] == [
        first[order.positions(step, 4)].tolist() for step in range(18)
    ]


def test_another_number_of_workers_sees_the_same_batches(tmp_path: Path) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 23, 10)
    whole = recording(tmp_path / "whole", prepared, tmp_path / "rows")
    ranks.done(whole, 3)
    steps = recorded(tmp_path / "rows", 3)
    shutil.copytree(tmp_path / "whole", tmp_path / "fewer")
    fewer = recording(tmp_path / "fewer", prepared, tmp_path / "rows-fewer")
    shutil.rmtree(fewer.run.checkpoints / "step-00000018-a001")
    report = ranks.done(fewer, 1)
    assert report.step == 18
    # The microbatch of the three stays, so the one worker makes two passes over its four rows.
    first, second = recorded(tmp_path / "rows-fewer", 1)
    assert sorted(first + second) == sorted(steps[17])


def test_three_ranks_add_in_one_order_before_and_after_a_resume(tmp_path: Path) -> None:
    """Bits, not tolerances: with three ranks and more the order of addition shows."""
    train = EVERY_STEP | {"checkpoint": {"every": "1 steps", "keep": 30}, "global_batch": 8, "precision": "bf16"}
    model = {"hidden": [900, 400], "dropout": 0.3}
    whole = ranks.Case(tmp_path / "whole", ranks.prepared(tmp_path / "prepared", 60, 10), train, model)
    expected = ranks.done(whole, 3)
    shutil.copytree(whole.folder, tmp_path / "resumed")
    resumed = ranks.Case(tmp_path / "resumed", whole.prepared, train, model)
    for step in range(8, expected.step + 1):
        shutil.rmtree(resumed.run.checkpoints / f"step-{step:08d}-a001")
    report = ranks.done(resumed, 3)
    assert report.step == expected.step == 24
    assert same_bits(whole.weights(expected.last_checkpoint), resumed.weights(report.last_checkpoint))
    assert report.last_checkpoint.endswith("a002")


@pytest.mark.parametrize("trial", range(10))
def test_killed_while_a_checkpoint_is_written_it_always_goes_on(tmp_path: Path, trial: int) -> None:
    """Two ranks, a checkpoint at every step; one of them, or both, are killed a random moment after the first one."""
    draw = random.Random(trial)
    train = EVERY_STEP | {"for": "40 steps"}
    case = ranks.Case(tmp_path, ranks.prepared(tmp_path / "prepared", 23, 5), train, {"hidden": [8], "dropout": 0.1})
    workers = 1 + trial % 2
    started = ranks.Ranks([case.assignment(workers)], workers, tmp_path)
    while checkpoint.newest(case.run, {}) is None:
        time.sleep(0.001)
    # Where in a save it hits is left to chance; a save takes 20 to 60 ms here.
    time.sleep(draw.uniform(0, 0.2))
    victims = started.processes if draw.random() < 0.5 else started.processes[-1:]
    for process in victims:
        os.kill(process.pid, signal.SIGKILL)
    started.results()
    assert all(process.exitcode == -signal.SIGKILL for process in victims)

    found = checkpoint.newest(case.run, {})
    assert found is not None, "at no moment is there no whole checkpoint"
    made = len(case.steps())
    assert made < 40, "it was killed too late to show anything"
    assert found.manifest.step >= made - 1
    report = ranks.done(case, workers)
    assert (report.step, report.updates) == (40, 40)
    assert [step["step"] for step in case.steps()] == list(range(1, 41))
    kept = {"step-00000039-a002", "step-00000040-a002", report.best_checkpoint}
    assert {path.name for path in case.run.checkpoints.iterdir()} == kept


def test_an_attempt_that_was_taken_over_harms_nothing(tmp_path: Path) -> None:
    """Workers may outlive a killed driver for a while: here the first attempt is still at work during the second."""
    train = EVERY_STEP | {"for": "150 steps", "checkpoint": {"every": "1 steps", "keep": 20}}
    case = ranks.Case(tmp_path, ranks.prepared(tmp_path / "prepared", 23, 5), train, {"hidden": [8], "dropout": 0.1})
    first = ranks.Ranks([case.assignment(1)], 1, tmp_path)
    while checkpoint.newest(case.run, {}) is None:
        time.sleep(0.001)
    assert first.processes[0].is_alive()
    report = ranks.done(case, launch="another")
    assert first.results() == [["RuntimeError: a later attempt has taken over this run"]]
    assert report.step == 150
    assert report.last_checkpoint == "step-00000150-a002"
    assert checkpoint.opened(case.run.checkpoints / report.last_checkpoint)
    assert checkpoint.opened(case.run.checkpoints / report.best_checkpoint)
    assert [step["step"] for step in case.steps()] == list(range(1, 151))
