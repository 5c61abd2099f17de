"""A group of workers that changes its size makes the steps of one that does not."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import ranks
from ray._private.state import state
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from user_models import FOLDER

from raylway.errors import UserError
from raylway.job.schema import Job
from raylway.runs import pace, starts
from raylway.runs.run import Run
from raylway.train import elastic, failures, resizing
from raylway.train.plan import plan
from raylway.train.resizing import ResizeWord
from raylway.train.worker import Report

ELASTIC = {
    "for": "4 epochs",
    "global_batch": 8,
    "workers": {"min": 1, "max": 3},
    "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
    "checkpoint": {"every": "5 steps", "keep": 2},
    "validate": {"every": "1 epoch"},
}
"""60 rows in batches of 8, the last of an epoch of 4: eight steps an epoch, 32 in all."""


def case(folder: Path, prepared: Any, **acts: Any) -> ranks.Case:
    """In float64."""
    return ranks.Case(folder, prepared, ELASTIC, {"kind": "user_models:watched", "args": acts}, [FOLDER])


def group(case: ranks.Case, workers: int) -> ranks.Ranks:
    """So many ranks of an elastic job."""
    return ranks.Ranks([case.assignment(None)], workers, case.folder)


def left(started: ranks.Ranks) -> bool:
    """Whether all ranks have left to make room."""
    return all("room for another number of workers" in str(mine[0]) for mine in started.results())


def test_one_then_three_then_two_workers_make_the_steps_of_a_fixed_one(tmp_path: Path) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 60, 10)
    fixed = case(tmp_path / "fixed", prepared)
    ResizeWord(fixed.run.folder).give()  # left by another command, and nothing to a fixed number of workers
    ranks.done(fixed, 1)

    # After seven steps there is room for more: the group leaves, and no step was lost.
    folder = tmp_path / "run"
    grown = case(folder, prepared, act="mark", at=7, rank=0, once=str(folder / "resize"))
    assert left(group(grown, 1))
    ResizeWord(folder).take_back()  # as Ray's controller has it done
    assert [step["step"] for step in grown.steps()] == list(range(1, 8))

    # Three of them go on with the eighth; at its 16th step a machine is lost, with a worker and all since step 20.
    killed = tmp_path / "killed"
    grown.model = {"kind": "user_models:watched", "args": {"act": "kill", "at": 16, "rank": 2, "once": str(killed)}}
    three = group(grown, 3)
    assert three.results()[2] == [None]
    assert three.processes[2].pid == int(killed.read_text())
    assert [step["step"] for step in grown.steps()] == list(range(1, 23))

    # Two are left, and end it.
    reports = [msgspec.convert(mine[0], Report) for mine in group(grown, 2).results()]
    assert [(report.failure, report.step, report.updates) for report in reports] == [(None, 32, 32)] * 2
    starts = [(start.workers, start.from_step) for start in failures.starts(grown.run)]
    assert starts == [(1, 0), (3, 7), (2, 20)]
    assert resizing.history(grown.run) == ["from 1 to 3 workers at step 7", "from 3 to 2 workers at step 20"]
    assert [line["text"] for line in grown.lines("note")] == [
        "1 worker (of 1 to 3) at step 0",
        "resized from 1 to 3 workers at step 7",
        "resized from 3 to 2 workers at step 20",
    ]

    assert [(step["step"], step["batch"], step["lr"]) for step in grown.steps()] == [
        (step["step"], step["batch"], step["lr"]) for step in fixed.steps()
    ]
    for name in ("loss", "grad_norm"):
        figures = [[step[name] for step in each.steps()] for each in (grown, fixed)]
        assert len(figures[0]) == 32
        np.testing.assert_allclose(figures[0], figures[1], rtol=1e-10)
    found, expected = (each.validations() for each in (grown, fixed))
    np.testing.assert_allclose([v["val_loss"] for v in found], [v["val_loss"] for v in expected], rtol=1e-10)
    for name, weights in fixed.weights("step-00000032-a001").items():
        np.testing.assert_allclose(grown.weights("step-00000032-a003")[name], weights, rtol=1e-10, atol=1e-12)


def test_a_group_leaves_all_at_once_and_is_no_failure(tmp_path: Path) -> None:
    file = str(tmp_path / "resize")
    asked = case(tmp_path, ranks.prepared(tmp_path / "prepared", 60), act="mark", at=3, rank=0, once=file)
    assert left(group(asked, 2))
    assert b'"attempt failed"' not in asked.run.events.read_bytes()
    assert [path.name for path in asked.run.checkpoints.iterdir()] == ["step-00000003-a001"]


def test_a_group_that_is_asked_at_its_last_step_ends_as_always(tmp_path: Path) -> None:
    last = case(tmp_path, ranks.prepared(tmp_path / "prepared", 60), act="mark", at=32, once=str(tmp_path / "resize"))
    (report,) = group(last, 1).results()[0]
    assert (tmp_path / "resize").exists()
    assert report["step"] == 32


def test_who_was_told_to_stop_does_not_start_again(tmp_path: Path) -> None:
    stopped = case(tmp_path, ranks.prepared(tmp_path / "prepared", 60), act="mark", at=3, once=str(tmp_path / "stop"))
    ResizeWord(tmp_path).give()
    (result,) = group(stopped, 1).results()[0]
    assert "room for another number" in result, "after its first step"
    stopped.model["args"]["at"] = 1
    (report,) = group(stopped, 1).results()[0]
    assert (report["failure"], report["step"], report["last_checkpoint"]) == (None, 2, "step-00000002-a002")


def test_machines_that_come_and_go_are_no_failures(tmp_path: Path) -> None:
    """Twice three starts of two sizes from one step; a seventh of either size would fail as well."""
    run = case(tmp_path, ranks.prepared(tmp_path / "prepared", 60)).run
    for attempt in range(6):
        assert failures.begin(run, "a", 5, 1 + attempt % 2, used=0) == attempt + 1
    for workers in (1, 2):
        with pytest.raises(Exception, match="started 3 times from step 5"):
            failures.begin(run, "a", 5, workers, used=0)
    assert failures.begin(run, "a", 5, 3, used=0) == 7


class Policy(elastic.AskingPolicy):
    """Ours, with nodes of one CPU of which the coordinator of Ray tells."""

    nodes = 1

    def _maybe_send_resource_request(self) -> None:
        pass

    def _get_reserved_resources(self) -> dict[str, dict[str, float]]:
        return {str(node): {"CPU": 1.0} for node in range(self.nodes)}

    def look(self, workers: int) -> int | None:
        """What becomes of a healthy group: the size of the next one, or None if it goes on."""
        group = SimpleNamespace(start_time=float("-inf"), num_workers=workers)
        decision = self.make_decision_for_running_worker_group(group, None)
        return decision.num_workers if isinstance(decision, ResizeDecision) else None


def test_a_healthy_group_is_asked_and_never_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = elastic.scaling(plan(job(), "classification", 1_000, 10, 4, 1, 0))
    assert (config.min_workers, config.max_workers) == (2, 6)
    config.elastic_resize_monitor_interval_s = 0.0
    policy, asked = Policy(config, tmp_path), tmp_path / "resize"
    # nodes, workers, whether the group is asked
    for nodes, workers, expected in ((3, 3, False), (4, 3, True), (9, 6, False), (5, 6, True), (1, 3, False)):
        policy.nodes = nodes
        assert policy.look(workers) is None
        assert asked.exists() == expected, (nodes, workers)
        policy.before_controller_execute_resize_decision(None)  # whatever comes, a start follows
        assert not asked.exists()

    # Node 3 is about to be taken away: nothing is started there, and who is there has notice.
    monkeypatch.setattr(state, "get_draining_nodes", lambda: {"3": 0})
    policy.nodes = 4
    assert policy.make_decision_for_non_running_worker_group().num_workers == 3
    assert policy.look(4) is None and asked.exists()

    # While there is room for too few, that is told once, and again when it is so again.
    monkeypatch.setattr(elastic, "_WAIT_S", 0)
    for nodes in (1, 1, 2, 1, 0):
        policy.nodes = nodes
        policy.make_decision_for_non_running_worker_group()
    assert [line["event"] for line in pace.lines(Run(tmp_path).events)] == [starts.WAITS] * 2

    # A folder that can't be written is no reason to end a run.
    lost = Policy(config, tmp_path / "lost")
    lost.nodes = 4
    assert lost.look(3) is None
    lost.before_controller_execute_resize_decision(None)
    lost.nodes = 1
    lost.make_decision_for_non_running_worker_group()


def test_ray_calls_what_the_policy_answers() -> None:
    """Its names inside Ray Train, where a new version may have others."""
    controller = inspect.getsource(TrainController)
    for name in ("make_decision_for_non_running_worker_group", "make_decision_for_running_worker_group"):
        assert f"self._scaling_policy.{name}(" in re.sub(r"\s+", "", controller)
    assert '"before_controller_execute_resize_decision", decision' in controller
    assert "self._initialize_and_run_controller(" in inspect.getsource(DataParallelTrainer.fit)
    assert "scaling_policy=" in inspect.getsource(DataParallelTrainer.fit)
    assert issubclass(elastic.AskingPolicy, ControllerCallback)


def job(**train: Any) -> Job:
    given = {"workers": {"min": 2, "max": 6}, **train}
    return Job.model_validate({"name": "case", "data": {"source": "a.csv", "target": "t"}, "train": given})


def test_the_fewest_workers_decide_the_microbatch_and_the_most_what_is_refused() -> None:
    found = plan(job(global_batch=100), "classification", 1_000, 10, 4, 1, 0)
    assert (found.needed_workers, found.workers, found.microbatch, found.accumulation) == (2, 6, 50, 1)
    assert plan(job(global_batch=100, microbatch=20), "classification", 1_000, 10, 4, 1, 0).accumulation == 3
    with pytest.raises(UserError, match="each of the 6 workers"):
        plan(job(global_batch=5), "classification", 1_000, 10, 4, 1, 0)


@pytest.mark.parametrize("kind", ["shard", "tensor", "pipeline"])
def test_a_divided_model_is_refused(kind: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(job(parallel={kind: 2}), "classification", 1_000, 10, 4, 1, 0)
    assert caught.value.where == "train.workers"
    assert f"min 2, max 6 with train.parallel.{kind} 2" in str(caught.value)
