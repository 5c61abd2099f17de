"""Training on a cluster whose nodes come and go: real raylets, the real scaling policy in Ray Train's controller."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nodes
import numpy as np
import pytest
import ranks
from test_train_ray import FOLDER

DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import ranks, test_train_ray
from raylway.features.prepared import Prepared
from raylway.launch.start import connect
from raylway.runs.progress import Reporter
from raylway.train import elastic, trainer

elastic.LOOK_EVERY_S = 2.0
case = ranks.Case(Path({run!r}), Prepared(Path({prepared!r})), {train!r}, {model!r}, [test_train_ray.FOLDER])
reporter = Reporter("lines")
with connect(reporter, [test_train_ray.FOLDER]) as capacity:
    outcome = trainer.train(test_train_ray.loaded(case), case.run, case.prepared, capacity, reporter)
print(outcome.last_checkpoint, outcome.attempts, outcome.resized, sep="|")
"""


class Driver:
    """A process that trains a case on a running cluster, as a command does."""

    def __init__(self, case: ranks.Case, cluster: nodes.Nodes, log: Path) -> None:
        script = DRIVER.format(
            tests=str(Path(__file__).parent),
            run=str(case.folder),
            prepared=str(case.prepared.folder),
            train=case.train,
            model=case.model,
        )
        # Short waits: Ray Train looks at its workers, and tries again without the node that is gone.
        soon = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
        self._log = log
        with log.open("w") as shown:
            self.process = subprocess.Popen(
                [sys.executable, "-c", script],
                env=cluster.environment() | soon,
                stdout=subprocess.PIPE,
                stderr=shown,
                text=True,
            )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.process.poll() is None, self.shown()
            time.sleep(0.05)

    def shown(self) -> str:
        return self._log.read_text()

    def printed(self) -> str:
        """Its last line; those before are Ray's."""
        return self.process.communicate(timeout=300)[0].splitlines()[-1]


def starts(case: ranks.Case) -> list[tuple[int, int]]:
    """Workers and first step of each start of the group."""
    return [(event["workers"], event["from_step"]) for event in events(case, "attempt started")]


def events(case: ranks.Case, name: str) -> list[dict[str, Any]]:
    lines = case.run.events.read_text().splitlines() if case.run.events.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_group_grows_with_a_node_and_shrinks_without_it(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    train: dict[str, Any] = {
        "for": "1500 steps",
        "global_batch": 8,
        "workers": {"min": 1, "max": 2},
        "optimizer": {"kind": "sgd", "lr": 0.05},
        "checkpoint": {"every": "40 steps", "keep": 2},
    }
    prepared = ranks.prepared(tmp_path / "prepared", 60)
    model = {"kind": "user_models:watched", "args": {"slow": str(slow)}}
    fixed = ranks.Case(tmp_path / "fixed", prepared, train | {"workers": 1}, model, [FOLDER])
    ranks.done(fixed, 1)
    slow.touch()
    case = ranks.Case(tmp_path / "run", prepared, train, model, [FOLDER])

    def reached() -> int:
        return case.run.metrics.read_bytes().count(b'"kind":"step"') if case.run.metrics.exists() else 0

    with nodes.cluster() as cluster:
        cluster.have(1)
        driver = Driver(case, cluster, tmp_path / "log")
        driver.wait_for(lambda: reached() > 10)
        assert starts(case) == [(1, 0)]
        cluster.have(2)
        driver.wait_for(lambda: any(case.run.checkpoints.glob("step-*-a002/manifest.json")))
        cluster.kill(cluster.ids[-1])
        driver.wait_for(lambda: len(starts(case)) > 2)
        slow.unlink()
        printed = driver.printed()
    assert driver.process.returncode == 0, driver.shown()

    _, (grown, second), (shrunk, third) = starts(case)
    assert (grown, shrunk) == (2, 1)
    assert second < third
    assert third % 40 == 0, "a checkpoint that was due"
    lost = [event["lost_steps"] for event in events(case, "attempt continues")]
    assert lost[0] == 0, "growth loses no step"
    resized = f"from 1 to 2 workers at step {second:,}; from 2 to 1 workers at step {third:,}"
    assert printed == f"step-00001500-a003|3|{resized}"
    assert f"resized from 1 to 2 workers at step {second:,}" in driver.shown()
    assert f"resized from 2 to 1 workers at step {third:,}" in driver.shown()

    assert [(step["step"], step["batch"]) for step in case.steps()] == [
        (step["step"], step["batch"]) for step in fixed.steps()
    ]
    losses = [[step["loss"] for step in each.steps()] for each in (case, fixed)]
    assert len(losses[0]) == 1_500
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)
