"""`model.compile`: what is compiled learns what the plain model learns; what can't be runs as it is, and says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
from user_models import FOLDER

from raylway.errors import UserError

TRAIN = {
    "for": "2 epochs",
    "global_batch": 9,
    "microbatch": 3,
    "optimizer": {"kind": "sgd", "lr": 0.5},
    "validate": {"every": "1 epoch"},
    "checkpoint": {"every": "1 epoch"},
}
"""29 rows in batches of 9: three whole steps an epoch and one of two rows. Of two ranks a whole step has 4 and 5 rows
in two microbatches each, and the last one a row each; all are filled up to three rows."""


def case(folder: Path, prepared: Any, model: dict[str, Any], **train: Any) -> ranks.Case:
    return ranks.Case(folder, prepared, TRAIN | train, model, [FOLDER])


def events_of(done: ranks.Case, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in done.run.events.read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def assert_same(one: ranks.Case, other: ranks.Case, last: str) -> None:
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([s[key] for s in one.steps()], [s[key] for s in other.steps()], rtol=1e-10)
    assert [step["batch"] for step in one.steps()] == [step["batch"] for step in other.steps()]
    expected = one.weights(last)
    for name, value in other.weights(last).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-10)


@pytest.mark.long
@pytest.mark.parametrize(("workers", "rows", "batch", "dropout"), [(1, 36, 6, 0.3), (2, 36, 12, 0.3), (2, 29, 9, 0.0)])
def test_a_compiled_model_learns_the_same(tmp_path: Path, workers: int, rows: int, batch: int, dropout: float) -> None:
    """In float64, where a difference that is not rounding would show. What dropout draws for a row depends on the rows
    beside it, so it is compared where nothing is filled up."""
    prepared = ranks.prepared(tmp_path / "prepared", rows, 10)
    model = {"hidden": [8], "dropout": dropout}
    plain, compiled = (
        case(tmp_path / name, prepared, model | {"compile": wanted}, global_batch=batch)
        for name, wanted in (("plain", False), ("c", True))
    )
    assert compiled.plan(workers).accumulation > 1
    reports = ranks.run(
        *(each.assignment(workers) for each in (plain, compiled)), workers=workers, folder=tmp_path, exact=True
    )[0]
    assert [report.failure for report in reports] == [None, None]
    assert len(events_of(compiled, "compiler done")) == 1
    assert events_of(compiled, "not compiled") == []
    assert_same(plain, compiled, reports[0].last_checkpoint)


@pytest.mark.parametrize("rank", [None, pytest.param(1, marks=pytest.mark.long)])
def test_what_can_not_be_compiled_runs_as_it_is(tmp_path: Path, rank: int | None) -> None:
    """On two ranks, both of which meet the reason, or one of them; filled up shapes change nothing."""
    prepared = ranks.prepared(tmp_path / "prepared", 29, 10)
    plain = case(tmp_path / "plain", prepared, {"kind": "user_models:branching", "args": {"rank": rank}})
    compiled = case(tmp_path / "c", prepared, plain.model | {"compile": True})
    reports = ranks.run(*(each.assignment(2) for each in (plain, compiled)), workers=2, folder=tmp_path)[0]
    assert [report.failure for report in reports] == [None, None]
    (told,) = events_of(compiled, "not compiled")
    assert told["rank"] == 0
    assert told["reason"].startswith(f"rank {rank or 0}: ")
    assert "user_models.py:" in told["reason"]
    assert "in forward" in told["reason"]
    (note,) = compiled.lines("note")
    assert note["text"] == f"model.compile: {told['reason']}; training goes on without it"
    assert_same(plain, compiled, reports[0].last_checkpoint)


@pytest.mark.long
def test_a_graph_that_fails_at_a_later_step_is_given_up_by_its_rank_alone(tmp_path: Path) -> None:
    """Five passes were made with it, and one before the first step."""
    prepared = ranks.prepared(tmp_path / "prepared", 29, 10)
    plain = case(tmp_path / "plain", prepared, {"kind": "user_models:late", "args": {"steps": 6, "rank": 1}})
    compiled = case(tmp_path / "c", prepared, plain.model | {"compile": True})
    reports = ranks.run(*(each.assignment(2) for each in (plain, compiled)), workers=2, folder=tmp_path)[0]
    assert [report.failure for report in reports] == [None, None]
    (told,) = events_of(compiled, "not compiled")
    assert told["rank"] == 1
    assert "user_models.py:" in told["reason"] and "in forward" in told["reason"]
    (compiler,) = events_of(compiled, "compiler done")
    assert compiler["time"] < told["time"]
    assert_same(plain, compiled, reports[0].last_checkpoint)


def test_without_a_compiler_it_runs_as_it_is(tmp_path: Path) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 29, 10)
    plain = case(tmp_path / "plain", prepared, {"kind": "user_models:without_compiler"})
    compiled = case(tmp_path / "c", prepared, plain.model | {"compile": True})
    reports = ranks.run(*(each.assignment(1) for each in (plain, compiled)), workers=1, folder=tmp_path)[0]
    assert [report.failure for report in reports] == [None, None]
    (told,) = events_of(compiled, "not compiled")
    assert "No working C++ compiler" in told["reason"]
    assert_same(plain, compiled, reports[0].last_checkpoint)


def test_parts_of_a_model_are_not_compiled(tmp_path: Path) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 29)
    divided = ranks.Case(tmp_path, prepared, TRAIN | {"parallel": {"shard": 2}}, {"hidden": [8], "compile": True})
    with pytest.raises(UserError, match="only whole copies of a model can be compiled"):
        divided.plan(2)
