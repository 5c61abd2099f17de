"""Training through Ray Train: faults in it are restarted, the user's mistakes are not, and the bits stay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
from commands import environment
from user_models import FOLDER

from raylway.errors import UserError
from raylway.job.load import LoadedJob
from raylway.launch.capacity import Capacity, Node
from raylway.runs import starts as starting
from raylway.runs.progress import Reporter
from raylway.train import failures, trainer

TRAIN = {
    "for": "4 epochs",
    "global_batch": 8,
    "workers": 2,
    "validate": {"every": "1 epoch"},
    "checkpoint": {"every": "3 steps", "keep": 2},
}
FOUR_CPUS = Capacity([Node("here", 4, 0)])


class Job(LoadedJob):
    import_paths = [FOLDER]  # noqa: RUF012 - what the class says of each job here


def loaded(case: ranks.Case) -> LoadedJob:
    return Job(case.job, Path("jobs/case.yaml"), {"train.workers": "jobs/case.yaml:9"})


def case(folder: Path, train: dict[str, Any], **acts: Any) -> ranks.Case:
    """60 rows in batches of 8: eight steps an epoch."""
    model = {"kind": "user_models:watched", "args": {"dropout": 0.3, **acts}}
    return ranks.Case(folder / "run", ranks.prepared(folder / "prepared", 60, 10), train, model, [FOLDER])


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all((value == other[name]).all() for name, value in one.items())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The last weights of the job on two bare ranks."""
    whole = case(tmp_path_factory.mktemp("whole"), TRAIN)
    return whole.weights(ranks.done(whole, 2).last_checkpoint)


def test_a_worker_killed_mid_epoch_changes_no_bit(
    tmp_path: Path, ray_session: None, unbroken: dict[str, np.ndarray]
) -> None:
    """Of a group that may change its size, and has no reason to."""
    marker = tmp_path / "killed"
    train = TRAIN | {"workers": {"min": 1, "max": 2}}
    broken = case(tmp_path, train, act="kill", at=13, rank=1, once=str(marker))
    outcome = trainer.train(loaded(broken), broken.run, broken.prepared, FOUR_CPUS, Reporter("lines"))
    assert marker.exists(), "the kill happened"
    assert (outcome.last_step, outcome.updates, outcome.attempts) == (32, 32, 2)
    assert outcome.last_checkpoint == "step-00000032-a002"
    assert same_bits(broken.weights(outcome.last_checkpoint), unbroken)
    assert [step["step"] for step in broken.steps()] == list(range(1, 33))
    events = [json.loads(line) for line in broken.run.events.read_text().splitlines()]
    starts = [event for event in events if event["event"] == "attempt started"]
    assert [start["workers"] for start in starts] == [2, 2]
    # The checkpoint of step 12 may not have been whole yet.
    assert starts[0]["from_step"] == 0 and starts[1]["from_step"] in (9, 12)
    assert outcome.resized is None
    (lost,) = [failure for failure in failures.recorded(broken.run) if failure.kind == "lost"]
    assert (lost.attempt, lost.rank) == (1, 1) and "ended without a word" in lost.text[0]
    first, second = starting.starts(events)
    assert (first.attempt, second.attempt) == (1, 2)
    assert list(first.stages) == list(starting.STAGES.values())
    assert list(second.stages) == list(starting.STAGES.values())[1:]  # the controller stays
    assert not (broken.run.folder / ".ray-train").exists()

    # Finished: a second start makes no step.
    again = trainer.train(loaded(broken), broken.run, broken.prepared, FOUR_CPUS, Reporter("lines"))
    assert (again.last_step, again.last_checkpoint) == (32, "step-00000032-a002")
    assert len(broken.steps()) == 32


def test_what_ray_says_of_memory_becomes_what_to_change(tmp_path: Path) -> None:
    """Its words are those of a real kill; a long test has one."""
    from ray.exceptions import OutOfMemoryError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    from raylway.train.witness import Witness

    run = case(tmp_path, TRAIN).run
    failures.begin(run, "launch", 0, 2, used=0)
    killed = OutOfMemoryError("3 worker(s) were killed due to the node running low on memory.\nObject store: ...")
    seen: Any = {0: ValueError("its own word"), 1: WorkerHealthCheckFailedError("A health check failed.", killed)}
    witness = Witness(str(run.folder))
    for _ in range(2):
        witness.after_exception(None, seen)  # type: ignore[arg-type]
    (lost,) = failures.recorded(run)
    assert (lost.kind, lost.rank) == ("lost", 1)
    assert "ran out of memory. Lower train.microbatch" in lost.text[0]


def free_bytes() -> tuple[int, int]:
    """Of this machine: what there is, and what is in use."""
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (1024 * int(facts[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return total, total - free


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_worker_that_fills_the_machine_is_killed_and_the_run_says_what_to_change(tmp_path: Path) -> None:
    """Ray kills it 6 GB above what is in use now, of which Ray itself takes 2 or 3: whatever else runs here is safe."""
    total, used = free_bytes()
    assert used + 8e9 < total, "there is room for that"
    filled = case(tmp_path, TRAIN, act="fill", at=3, rank=1, most=7e9)
    limits = {"RAY_memory_usage_threshold": f"{(used + 6e9) / total:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    driver = Driver(filled, environment() | limits)
    _, shown = driver.process.communicate(timeout=800)
    assert driver.process.returncode == 1
    assert "RunFailed" in shown and "ran out of memory. Lower train.microbatch" in shown
    lost = [failure.text[0] for failure in failures.recorded(filled.run) if failure.kind == "lost"]
    assert any("ran out of memory" in text for text in lost)


def test_a_mistake_of_the_users_is_told_once_and_not_tried_again(tmp_path: Path, ray_session: None) -> None:
    wrong = case(tmp_path, TRAIN, act="raise", at=5, rank=1)
    with pytest.raises(UserError) as caught:
        trainer.train(loaded(wrong), wrong.run, wrong.prepared, FOUR_CPUS, Reporter("lines"))
    assert "KeyError" in caught.value.what
    assert "user_models.py:" in caught.value.where
    started = [line for line in wrong.run.events.read_text().splitlines() if '"attempt started"' in line]
    assert len(started) == 1


def test_what_can_never_run_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """No Ray is there: whoever waited for workers would fail otherwise."""
    many = case(tmp_path, TRAIN | {"workers": 8})
    with pytest.raises(UserError, match=r"(?s)jobs/case.yaml:9 \(train.workers\).*8 workers"):
        trainer.train(loaded(many), many.run, many.prepared, FOUR_CPUS, Reporter("lines"))
    few_rows = case(tmp_path / "rows", TRAIN | {"workers": 4, "global_batch": 3})
    with pytest.raises(UserError, match="train.global_batch"):
        trainer.train(loaded(few_rows), few_rows.run, few_rows.prepared, FOUR_CPUS, Reporter("lines"))
    broken = case(tmp_path / "model", TRAIN)
    broken.model = {"kind": "user_models:raising"}
    with pytest.raises(UserError, match="ZeroDivisionError: while it is built"):
        trainer.train(loaded(broken), broken.run, broken.prepared, FOUR_CPUS, Reporter("lines"))


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import ranks, test_train_ray
from raylway.features.prepared import Prepared
from raylway.launch.start import connect
from raylway.runs.progress import Reporter
from raylway.train import failures, trainer

case = ranks.Case(Path({run!r}), Prepared(Path({prepared!r})), {train!r}, {model!r}, [test_train_ray.FOLDER])
reporter = Reporter("lines")
with connect(reporter, [test_train_ray.FOLDER]):
    outcome = trainer.train(
        test_train_ray.loaded(case), case.run, case.prepared, test_train_ray.FOUR_CPUS, reporter
    )
print(outcome.last_checkpoint, outcome.attempts)
"""


class Driver:
    """A process that trains a case as a command does.

    Args:
        case: To train.
        variables: Its environment, if it joins a cluster; else it starts a Ray of its own.
    """

    def __init__(self, case: ranks.Case, variables: dict[str, str] | None = None) -> None:
        script = DRIVER.format(
            tests=str(Path(__file__).parent),
            run=str(case.folder),
            prepared=str(case.prepared.folder),
            train=case.train,
            model=case.model,
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            env=variables or environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def end(self) -> tuple[str, str]:
        return self.process.communicate(timeout=200)


@pytest.mark.timeout(600)  # four starts of a Ray of its own, on a machine that may be busy
def test_the_driver_killed_or_interrupted_goes_on_with_the_same_command(
    tmp_path: Path, unbroken: dict[str, np.ndarray]
) -> None:
    """One worker, so that two cores do: SIGKILL first, then SIGTERM, then Ctrl-C, then to the end."""
    # Long enough that each signal finds it at work.
    train = TRAIN | {"for": "300 epochs", "workers": 1, "checkpoint": {"every": "20 steps", "keep": 2}}
    whole = case(tmp_path / "whole", train)
    expected = whole.weights(ranks.done(whole, 1).last_checkpoint)

    broken = case(tmp_path / "broken", train)

    def steps() -> int:
        return broken.run.metrics.read_bytes().count(b'"kind":"step"') if broken.run.metrics.exists() else 0

    driver = Driver(broken)
    driver.wait_for(lambda: steps() > 100)
    os.kill(driver.process.pid, signal.SIGKILL)
    assert driver.process.wait(60) == -signal.SIGKILL  # two of Ray's agents hold its pipes for another minute
    reached = steps()
    assert 100 < reached < 2_400

    stopped_at = []
    for number, word in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")):
        driver = Driver(broken)
        # The workers may outlive their driver and go on counting: only a checkpoint of its own shows this one at work.
        own = f"step-*-a{2 + len(stopped_at):03d}"
        driver.wait_for(lambda own=own: any(broken.run.checkpoints.glob(own)))  # type: ignore[misc]
        os.kill(driver.process.pid, number)
        _, shown = driver.end()
        assert f"a checkpoint is written first; {word} again" in shown
        # A script that Ctrl-C ends is ended by the signal; `raylway` makes 130 of it.
        assert driver.process.returncode == (143 if word == "SIGTERM" else -signal.SIGINT)
        stopped_at.append(steps())
    assert stopped_at[-1] < 2_400

    driver = Driver(broken)
    printed, _ = driver.end()
    assert printed.split() == ["step-00002400-a004", "4"]
    starts = [json.loads(line) for line in broken.run.events.read_text().splitlines()]
    from_steps = [event["from_step"] for event in starts if event["event"] == "attempt started"]
    assert from_steps[0] == 0
    assert reached - 20 <= from_steps[1]
    assert from_steps[2:] == stopped_at, "each was saved where it stopped"
    assert [step["step"] for step in broken.steps()] == list(range(1, 2_401))
    assert same_bits(broken.weights("step-00002400-a004"), expected)
