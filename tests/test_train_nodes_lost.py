"""Training on a cluster that loses nodes: it goes on from its checkpoint on those that remain or come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
from nodes import cluster
from test_train_ray import TRAIN, Driver, case, same_bits

from raylway.train import failures

NOTICED = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", ["kill", pytest.param("drain", marks=pytest.mark.long)])
def test_a_node_that_is_killed_or_is_to_be_taken_away_costs_no_bit(tmp_path: Path, fault: str) -> None:
    train = TRAIN | {"for": "100 epochs", "checkpoint": {"every": "20 steps", "keep": 2}}
    whole = case(tmp_path / "whole", train)
    expected = whole.weights(ranks.done(whole, 2).last_checkpoint)

    broken = case(tmp_path / "broken", train, slow=str(tmp_path / "slow"))
    (tmp_path / "slow").touch()
    with cluster() as nodes:
        nodes.have(2)
        driver = Driver(broken, nodes.environment() | NOTICED)
        driver.wait_for(lambda: any(broken.run.checkpoints.glob("step-*/manifest.json")))
        lost = nodes.ids[0]
        if fault == "kill":
            nodes.kill(lost)
        else:
            nodes.drain(lost)
        nodes.have(2 + (fault == "drain"))
        driver.wait_for(lambda: any(failures.recorded(broken.run)))
        made = broken.steps()
        (tmp_path / "slow").unlink()
        printed, shown = driver.end()
    assert printed.splitlines()[-1] == "step-00000800-a002 2", shown
    assert same_bits(broken.weights("step-00000800-a002"), expected)
    assert [step["step"] for step in broken.steps()] == list(range(1, 801))
    events = [json.loads(line) for line in broken.run.events.read_text().splitlines()]
    first, second = (event["from_step"] for event in events if event["event"] == "attempt started")
    assert first == 0 < second
    found = failures.recorded(broken.run)
    if fault == "drain":
        assert {(failure.kind, failure.attempt) for failure in found} == {("preempted", 1)}
        assert second == max(step["step"] for step in made), "it was saved where it left"
    else:
        assert [failure.attempt for failure in found if failure.kind == "lost"] == [1]
