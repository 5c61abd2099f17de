"""Who is to blame, and whether it is tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import ranks
from user_models import FOLDER

from raylway.errors import RunFailed, UserError
from raylway.train import failures

TRAIN = {"for": "12 steps", "global_batch": 4, "checkpoint": {"every": "4 steps"}}


def watched(folder: Path, **acts: Any) -> ranks.Case:
    model = {"kind": "user_models:watched", "args": acts}
    return ranks.Case(folder, ranks.prepared(folder / "prepared", 23), TRAIN, model, [FOLDER])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_one_rank_comes_back_from_all_as_a_value(tmp_path: Path, rank: int) -> None:
    case = watched(tmp_path, act="raise", at=3, rank=rank)
    # A peer that waited for the timeout of 300 s would be a hang to the test.
    reports = [mine[0] for mine in ranks.run(case.assignment(2), workers=2, folder=tmp_path)]
    for report in reports:
        assert report.failure is not None
        assert (report.failure.kind, report.failure.rank) == ("user", rank)
        error = report.failure.as_error()
        assert isinstance(error, UserError)
        assert "a mistake of the user's" in error.what
        assert "KeyError" in error.what
        assert "user_models.py:" in error.where
        assert "raise KeyError" in error.found


def test_a_mistake_while_the_model_is_built_is_the_users_too(tmp_path: Path) -> None:
    case = ranks.Case(
        tmp_path, ranks.prepared(tmp_path / "prepared", 23), TRAIN, {"kind": "user_models:raising"}, [FOLDER]
    )
    (report,) = ranks.run(case.assignment(1), workers=1, folder=tmp_path)[0]
    assert report.failure is not None
    assert report.failure.kind == "user"
    assert "ZeroDivisionError: while it is built" in report.failure.text[0]


def test_a_shard_that_was_damaged_since_is_a_failed_run(tmp_path: Path) -> None:
    case = watched(tmp_path)
    shard = case.prepared.folder / case.prepared.shards("train")[0].file
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    reports = [mine[0] for mine in ranks.run(case.assignment(2), workers=2, folder=tmp_path)]
    for report in reports:
        assert report.failure is not None
        assert report.failure.kind == "run"
        assert shard.name in report.failure.text[0]


def test_a_fault_is_raised_by_every_rank(tmp_path: Path) -> None:
    """Ours (no frame of the user's file): Ray Train starts the group again."""
    case = watched(tmp_path, act="fault", at=3, rank=1)
    case.import_paths.clear()
    results = ranks.Ranks([case.assignment(2)], 2, tmp_path).results()
    assert all(isinstance(mine[0], str) for mine in results), results
    assert "a machine's fault" in results[1][0]


def test_starts_that_make_progress_go_on_without_end(tmp_path: Path) -> None:
    case = watched(tmp_path, act="fault", at=5)
    case.train = TRAIN | {"for": "28 steps"}
    case.import_paths.clear()
    results = [ranks.Ranks([case.assignment(1)], 1, tmp_path).results()[0][0] for _ in range(7)]
    # Each start is broken off after four steps, at its fifth pass, just when a checkpoint is there.
    assert ["a machine's fault" in result for result in results[:6]] == [True] * 6
    assert results[6]["step"] == 28
    assert failures.attempts(case.run) == 7


def test_without_progress_the_fourth_start_is_refused(tmp_path: Path) -> None:
    case = watched(tmp_path, act="fault", at=2)
    case.import_paths.clear()
    for _ in range(3):
        (result,) = ranks.Ranks([case.assignment(1)], 1, tmp_path).results()[0]
        assert "a machine's fault" in result
    (report,) = ranks.run(case.assignment(1), workers=1, folder=tmp_path)[0]
    assert report.failure is not None
    error = report.failure.as_error()
    assert isinstance(error, RunFailed)
    assert "started 3 times from step 0" in str(error)
    assert "a machine's fault" in str(error)
    # A new command has tries of its own.
    (result,) = ranks.Ranks([case.assignment(1, launch="another")], 1, tmp_path).results()[0]
    assert "a machine's fault" in result


def test_a_smaller_microbatch_and_another_node_are_no_failures(tmp_path: Path) -> None:
    """More of them from one step than starts without progress are allowed."""
    case = watched(tmp_path)
    kinds: list[Literal["memory", "preempted"]] = ["memory", "preempted"]
    for attempt in range(1, 8):
        assert failures.begin(case.run, "launch", 0, 1, used=0) == attempt
        failures.record(case.run, failures.Failure(attempt, 0, kinds[attempt % 2], ["words"]))
    for _ in range(failures.MOST_STARTS):
        failures.begin(case.run, "launch", 0, 1, used=0)
    with pytest.raises(RunFailed, match="started 3 times from step 0"):
        failures.begin(case.run, "launch", 0, 1, used=0)


def test_attempts_are_never_numbered_twice(tmp_path: Path) -> None:
    case = watched(tmp_path)
    assert failures.begin(case.run, "a", 0, 1, used=0) == 1
    assert failures.begin(case.run, "a", 0, 1, used=5) == 6
    with case.run.events.open("ab") as file:
        file.write(b'{"event": "attempt started", "attem')  # a power cut
    assert failures.begin(case.run, "b", 0, 1, used=0) == 7
    assert failures.begin(case.run, "b", 0, 1, used=0) == 8


def test_failures_travel_as_plain_values() -> None:
    error = UserError("what", "where", "expected", "found", "fix")
    failure = failures.blame(error, 3, 1, [])
    again = msgspec.convert(msgspec.to_builtins(failure), failures.Failure).as_error()
    assert isinstance(again, UserError)
    assert str(again) == str(error)
    lost = failures.blame(RunFailed("too bad"), 3, 1, [])
    assert isinstance(lost.as_error(), RunFailed)
    assert str(lost.as_error()) == "too bad"
