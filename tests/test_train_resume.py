"""Runs that are broken off anywhere end with the bits of the unbroken one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import stores
from user_models import FOLDER

from raylway import storage
from raylway.storage import Place, buckets
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


@pytest.mark.parametrize("trials", [4, pytest.param(20, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_killed_while_a_checkpoint_is_written_it_goes_on_and_ends_with_the_same_bits(
    tmp_path: Path, trials: int
) -> None:
    """A checkpoint at every step; one of two ranks, or all, are killed a moment after one more file has appeared."""
    prepared = ranks.prepared(tmp_path / "prepared", 23, 5)
    train = EVERY_STEP | {"for": "40 steps"}

    def case(name: str) -> ranks.Case:
        return ranks.Case(tmp_path / name, prepared, train, {"hidden": [8], "dropout": 0.1})

    ends = []
    for workers in (1, 2):
        whole = case(f"whole-{workers}")
        ends.append(whole.weights(ranks.done(whole, workers).last_checkpoint))
    hits = 0
    for trial in range(trials):
        workers, draw = 1 + trial % 2, random.Random(trial)
        broken = case(f"broken-{trial}")
        started = ranks.Ranks([broken.assignment(workers)], workers, tmp_path)
        wait_for_files(broken.run.checkpoints, draw.randint(1, 40))
        time.sleep(draw.uniform(0, 0.01))
        victims = started.processes if draw.random() < 0.5 else started.processes[-1:]
        for process in victims:
            os.kill(process.pid, signal.SIGKILL)
        started.results()
        assert all(process.exitcode == -signal.SIGKILL for process in victims)

        hits += any(not (path / "manifest.json").exists() for path in broken.run.checkpoints.iterdir())
        found = checkpoint.newest(broken.run, {})
        made = len(broken.steps())
        assert made < 40, "it was killed too late to show anything"
        assert (found.manifest.step if found else 0) >= made - 1, "more than one interval is lost"
        report = ranks.done(broken, workers)
        assert (report.step, report.updates) == (40, 40)
        assert [step["step"] for step in broken.steps()] == list(range(1, 41))
        assert same_bits(ends[workers - 1], broken.weights(report.last_checkpoint))
        kept = {"step-00000039-a002", "step-00000040-a002", report.best_checkpoint}
        assert {path.name for path in broken.run.checkpoints.iterdir()} == kept
    assert hits >= trials // 4, "none was hit while it was written"


def wait_for_files(folder: Path, count: int) -> None:
    """Until so many different files have been there."""
    seen: set[str] = set()
    while len(seen) < count:
        seen |= {os.path.join(path, name) for path, _, names in os.walk(folder) for name in names}  # noqa: PTH118


FULL = EVERY_STEP | {"checkpoint": {"every": "3 steps", "keep": 9}, "validate": {"every": "18 steps"}}


def filled(folder: Place, prepared: Any, **acts: Any) -> ranks.Case:
    model = {"kind": "user_models:watched", "args": {"act": "full", **acts}}
    return ranks.Case(folder, prepared, FULL, model, [FOLDER])


@pytest.fixture(scope="module")
def never_filled(tmp_path_factory: pytest.TempPathFactory) -> ranks.Case:
    """A finished run of two ranks whose disk had room."""
    folder = tmp_path_factory.mktemp("never-filled")
    case = filled(folder / "run", ranks.prepared(folder / "prepared", 23, 10))
    ranks.done(case, 2)
    return case


def failed(case: ranks.Case) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in case.run.events.read_text().splitlines()]
    return [line for line in lines if line["event"] == "checkpoint failed"]


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint(tmp_path: Path, never_filled: ranks.Case) -> None:
    """On one of two ranks. The run goes on with the last good one, and ends as it would have."""
    full = filled(tmp_path / "full", never_filled.prepared, at=5, until=7, rank=1)
    report = ranks.done(full, 2)
    assert [(event["checkpoint"], "File too large" in event["reason"]) for event in failed(full)] == [
        ("step-00000006-a001", True)
    ]
    there = {path.name for path in full.run.checkpoints.iterdir()}
    assert there == {f"step-{step:08d}-a001" for step in (3, 9, 12, 15, 18)}
    assert same_bits(never_filled.weights("step-00000018-a001"), full.weights(report.last_checkpoint))
    (note,) = [line["text"] for line in full.lines("note") if "can't be written" in line["text"]]
    assert "the checkpoint of step 6 can't be written" in note
    assert "the last whole one is step-00000003-a001; going on" in note
    assert all(line["stall_s"] > 0 for line in full.lines("checkpoint"))


def test_a_disk_that_stays_full_stops_the_run_which_goes_on_when_there_is_room(
    tmp_path: Path, never_filled: ranks.Case
) -> None:
    full = filled(tmp_path / "full", never_filled.prepared, at=5, rank=1, once=str(tmp_path / "filled"))
    for reports in ranks.run(full.assignment(2), workers=2, folder=tmp_path):
        failure = reports[0].failure
        assert failure is not None and failure.kind == "run"
        assert "the checkpoint of step 9 can't be written: [Errno 27] File too large" in failure.text[0]
        assert "the last whole one is step-00000003-a001. 2 in a row failed" in failure.text[0]
    assert [event["checkpoint"] for event in failed(full)] == ["step-00000006-a001", "step-00000009-a001"]
    assert [path.name for path in full.run.checkpoints.iterdir()] == ["step-00000003-a001"]
    report = ranks.done(full, 2)
    assert same_bits(never_filled.weights("step-00000018-a001"), full.weights(report.last_checkpoint))
    assert [step["step"] for step in full.steps()] == list(range(1, 19))


def test_a_bucket_that_goes_away_stops_the_run_which_goes_on_when_it_is_back(
    tmp_path: Path, s3_server: stores.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After step 6: the save of step 9 fails, the run goes on, the save of step 12 fails too, and the run ends."""
    prepared = ranks.prepared(tmp_path / "prepared", 23, 10)
    whole = filled(tmp_path / "whole", prepared, act="wait")
    expected = ranks.done(whole)
    way = stores.Way(int(s3_server.variables["AWS_ENDPOINT_URL_S3"].rpartition(":")[2]))
    variables = s3_server.variables | {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{way.port}"}
    variables["RAYLWAY_CACHE"] = str(tmp_path / "cache")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    buckets.system.cache_clear()
    once = str(tmp_path / "cut")
    cut = filled(storage.place(s3_server.address(f"{tmp_path.name}/cut")), prepared, act="wait", at=8, once=once)

    started = ranks.Ranks([cut.assignment(1)], 1, tmp_path, setup=partial(ranks.reach, variables))
    while not Path(once + ".waits").exists():
        assert started.processes[0].is_alive()
        time.sleep(0.01)
    way.cut()
    Path(once + ".goes-on").touch()
    ((report,),) = started.results()
    assert report["failure"]["kind"] == "run", report
    text = report["failure"]["text"][0]
    assert "the checkpoint of step 12 can't be written" in text and "the bucket can't be reached" in text
    assert "the last whole one is step-00000006-a001. 2 in a row failed" in text

    gone = ranks.Ranks([cut.assignment(2)], 2, tmp_path, setup=partial(ranks.reach, variables)).results()
    assert [report["failure"]["kind"] for (report,) in gone] == ["run", "run"], "a start that sees nothing is no fault"
    assert all("the bucket can't be reached" in report["failure"]["text"][0] for (report,) in gone)

    way.mend()
    assert checkpoint.newest(cut.run, {}).manifest.step == 6
    ((report,),) = ranks.Ranks([cut.assignment(1)], 1, tmp_path, setup=partial(ranks.reach, variables)).results()
    assert report["step"] == 18, report
    assert same_bits(whole.weights(expected.last_checkpoint), cut.weights(report["last_checkpoint"]))
    assert [(step["step"], step["loss"]) for step in cut.steps()] == [
        (step["step"], step["loss"]) for step in whole.steps()
    ]
    buckets.system.cache_clear()
    way.cut()


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
