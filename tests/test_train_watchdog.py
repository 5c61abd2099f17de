"""A rank that hangs says who it is and where, and ends; the group then starts again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ranks
from user_models import FOLDER

from raylway.errors import RunFailed, UserError
from raylway.train import failures, watchdog

TRAIN = {"for": "12 steps", "global_batch": 4, "checkpoint": {"every": "1 steps"}}


def hanging(folder: Path, limit_s: float, **acts: Any) -> ranks.Case:
    """At the third forward pass of a process."""
    model = {"kind": "user_models:watched", "args": {"at": 3, **acts}}
    prepared = ranks.prepared(folder / "prepared", 23)
    return ranks.Case(folder, prepared, TRAIN, model, [FOLDER], hang_limit_s=limit_s)


@pytest.mark.parametrize(("workers", "rank"), [(1, 0), (2, 1)])
def test_a_rank_that_hangs_is_named_with_its_stack_and_the_next_start_goes_on(
    tmp_path: Path, workers: int, rank: int
) -> None:
    # a peer that waits is given a tenth more: on a busy machine that must be more than a moment
    case = hanging(tmp_path, 2.0 if workers == 1 else 6.0, act="hang", rank=rank, once=str(tmp_path / "hung"))
    started = ranks.Ranks([case.assignment(workers)], workers, tmp_path)
    results = started.results()
    assert (tmp_path / "hung").read_text() == str(started.processes[rank].pid), "it hung"
    assert results[rank] == [None]
    assert started.processes[rank].exitcode == 1
    if workers == 2:
        assert isinstance(results[1 - rank][0], str), "the peer raises, and Ray Train starts the group again"
    (hang,) = [failure for failure in failures.recorded(case.run) if failure.kind == "hang"]
    assert hang.rank == rank
    assert f"rank {rank} hangs: pass 3" in hang.text[0]
    assert "user_models.py" in hang.text[0] and "in _act" in hang.text[0]
    report = ranks.done(case, workers)
    assert (report.step, failures.attempts(case.run)) == (12, 2)
    assert [step["step"] for step in case.steps()] == list(range(1, 13))


def test_one_that_hangs_again_and_again_ends_the_run_with_its_name(tmp_path: Path) -> None:
    case = hanging(tmp_path, 0.5, act="hang")
    case.train = TRAIN | {"checkpoint": {"every": "12 steps"}}
    for _ in range(failures.MOST_STARTS):
        assert ranks.Ranks([case.assignment(1)], 1, tmp_path).results() == [[None]]
    (report,) = ranks.run(case.assignment(1), workers=1, folder=tmp_path)[0]
    assert report.failure is not None
    error = report.failure.as_error()
    assert isinstance(error, RunFailed)
    assert "rank 0 hangs: pass 3" in str(error) and "user_models.py" in str(error)


def test_even_one_that_holds_pythons_lock_ends(tmp_path: Path) -> None:
    case = hanging(tmp_path, 0.3, act="hold", once=str(tmp_path / "hung"))
    started = ranks.Ranks([case.assignment(1)], 1, tmp_path)
    began = time.monotonic()
    assert started.results() == [[None]]
    assert (tmp_path / "hung").exists()
    assert started.processes[0].exitcode == 1
    assert time.monotonic() - began < 60
    assert ranks.done(case).step == 12


@pytest.mark.parametrize("text", ["soon", "0", "nan", "-5", "1e9"])
def test_a_limit_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(watchdog.LIMIT_VARIABLE, text)
    with pytest.raises(UserError, match=watchdog.LIMIT_VARIABLE):
        watchdog.limit_s()


def test_the_limit_is_the_commands_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(watchdog.LIMIT_VARIABLE, raising=False)
    assert watchdog.limit_s() == 240
    monkeypatch.setenv(watchdog.LIMIT_VARIABLE, "30")
    assert watchdog.limit_s() == 30
