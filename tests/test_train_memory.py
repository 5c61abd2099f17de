"""Passes that memory does not hold: a smaller microbatch, the same gradient; or what to change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from user_models import FOLDER

from raylway.errors import UserError
from raylway.models import mlp
from raylway.train import failures, memory

TRAIN = {
    "for": "6 steps",
    "global_batch": 24,
    "clip": None,
    "optimizer": {"kind": "sgd", "lr": 0.2, "momentum": 0.9},
    "checkpoint": {"every": "2 steps"},
}
"""60 rows in batches of 24: two whole ones and one of 12."""
EVERYTHING = 1_000


def hungry(folder: Path, prepared: Any, rows: int, **train: Any) -> ranks.Case:
    """A model that can't pass more than so many rows at once."""
    return ranks.Case(folder, prepared, TRAIN | train, {"kind": "user_models:hungry", "args": {"rows": rows}}, [FOLDER])


def events(case: ranks.Case, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in case.run.events.read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def assert_same(case: ranks.Case, last: str, whole: ranks.Case, whole_last: str) -> None:
    for name, value in whole.weights(whole_last).items():
        if name != "seen":
            np.testing.assert_allclose(case.weights(last)[name], value, rtol=0, atol=1e-10)
    np.testing.assert_allclose(
        [step["loss"] for step in case.steps()], [step["loss"] for step in whole.steps()], rtol=1e-10
    )
    assert [step["batch"] for step in case.steps()] == [step["batch"] for step in whole.steps()]


@pytest.mark.parametrize(("workers", "rank", "refusal"), [(1, None, "cpu"), (2, 1, "cuda")])
def test_the_largest_microbatch_that_fits_on_all_ranks_is_found_once_and_changes_no_gradient(
    tmp_path: Path, workers: int, rank: int | None, refusal: str
) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 60, 7)
    whole = hungry(tmp_path / "whole", prepared, EVERYTHING)
    expected = ranks.done(whole, workers)
    share = 24 // workers
    assert expected.microbatch == share

    case = hungry(tmp_path / "run", prepared, 5)
    case.model["args"] |= {"rank": rank, "refusal": refusal}
    results = ranks.Ranks([case.assignment(workers)], workers, tmp_path).results()
    assert all(isinstance(mine[0], str) for mine in results), "all ranks leave, and Ray Train starts the group again"
    (failure,) = failures.recorded(case.run)
    assert (failure.kind, failure.rank, failure.microbatch) == ("memory", rank or 0, share)
    assert ("CUDA out of memory" if refusal == "cuda" else "can't allocate memory") in failure.text[0]

    report = ranks.done(case, workers)
    assert report.microbatch == 4
    assert_same(case, report.last_checkpoint, whole, expected.last_checkpoint)
    found = [(event["microbatch"], event["accumulation"]) for event in events(case, "microbatch chosen")]
    assert found == [(share, 1), (4, math.ceil(share / 4))]
    # What the model counts: its trial when it is built, six steps and two validations; nothing is left of the search.
    steps = 2 * (2 * math.ceil(share / 4) + math.ceil(share / 8))
    assert case.weights(report.last_checkpoint)["seen"] == 1 + steps + 2 * math.ceil(math.ceil(7 / workers) / 4)
    state = json.loads((case.run.checkpoints / report.last_checkpoint / "state.json").read_text())
    assert state["microbatch"] == 4
    (case.run.checkpoints / report.last_checkpoint / "manifest.json").unlink()
    assert ranks.done(case, workers).microbatch == 4
    assert len(events(case, "microbatch chosen")) == 2, "once"


@pytest.mark.parametrize(
    ("rows", "train", "words"),
    [
        (5, {"microbatch": 12}, "not enough for a pass of 12 rows"),
        (0, {"microbatch": 1}, "a single row at a time"),
        (0, {"global_batch": 1}, "a single row at a time"),
    ],
)
def test_where_nothing_is_left_to_choose_it_is_the_users_to_change(
    tmp_path: Path, rows: int, train: dict[str, Any], words: str
) -> None:
    case = hungry(tmp_path, ranks.prepared(tmp_path / "prepared", 60), rows, **train)
    (report,) = ranks.run(case.assignment(1), workers=1, folder=tmp_path)[0]
    assert report.failure is not None
    error = report.failure.as_error()
    assert isinstance(error, UserError)
    assert words in error.what
    assert error.where == "train.microbatch"
    assert "microbatch" in error.fix or "train.parallel" in error.fix


def test_a_search_that_finds_no_room_for_one_row_says_so_on_all_ranks(tmp_path: Path) -> None:
    case = hungry(tmp_path, ranks.prepared(tmp_path / "prepared", 60), 0)
    case.model["args"] |= {"rank": 1}
    assert all(isinstance(mine[0], str) for mine in ranks.Ranks([case.assignment(2)], 2, tmp_path).results())
    for mine in ranks.run(case.assignment(2), workers=2, folder=tmp_path):
        assert mine[0].failure is not None
        assert "a single row at a time" in mine[0].failure.text[0]


def refuse_more_than_five() -> None:
    """In a process of its own: our own model, whole and in parts."""
    for kind in (mlp.Mlp, mlp.Stage):
        real = kind.forward

        def forward(self: Any, first: torch.Tensor, *rest: torch.Tensor, real: Any = real) -> torch.Tensor:
            if self.training and len(first) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(self, first, *rest)

        kind.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "way",
    [
        pytest.param({"shard": 2}, marks=pytest.mark.long),
        pytest.param({"tensor": 2}, marks=pytest.mark.long),
        {"pipeline": 2},
    ],
    ids=lambda way: next(iter(way)),
)
def test_ranks_that_share_a_model_halve_until_a_start_goes_on(tmp_path: Path, way: dict[str, int]) -> None:
    prepared = ranks.prepared(tmp_path / "prepared", 60)
    model = {"hidden": [8, 6], "dropout": 0}
    batch = {"global_batch": 48} if "pipeline" in way else {}
    whole = ranks.Case(tmp_path / "whole", prepared, TRAIN | batch | {"parallel": way}, model)
    (expected, _) = ranks.run(whole.assignment(2), workers=2, folder=tmp_path, exact=True)
    case = ranks.Case(tmp_path / "run", prepared, whole.train, model)
    starts = 0
    while True:
        results = ranks.Ranks([case.assignment(2)], 2, tmp_path, exact=True, setup=refuse_more_than_five).results()
        if isinstance(results[0][0], dict):
            break
        starts += 1
        assert all(isinstance(mine[0], str) for mine in results), results
    found = [event["microbatch"] for event in events(case, "microbatch chosen")]
    assert found == ([6, 3] if "pipeline" in way else [12, 6, 3] if "shard" in way else [24, 12, 6, 3])
    assert starts == len(found) - 1
    assert results[0][0]["failure"] is None, results
    assert results[0][0]["microbatch"] == 3
    assert_same(case, results[0][0]["last_checkpoint"], whole, expected[0].last_checkpoint)


@settings(max_examples=20)
@given(most=st.integers(1, 5_000), fits=st.integers(0, 6_000))
def test_a_search_ends_at_the_largest_power_of_two_that_fits_or_at_the_most(most: int, fits: int) -> None:
    module = nn.Linear(1, 1)
    tried: list[int] = []

    def step(rows: Any) -> None:
        tried.append(rows)
        module(torch.ones(1, 1)).sum().backward()
        if rows > fits:
            raise torch.OutOfMemoryError

    found = memory.largest(module, most, lambda count: count, step, copies=2)  # type: ignore[arg-type,return-value]
    assert found == (most if fits >= most else 2 ** (fits.bit_length() - 1) if fits else 0)
    assert len(tried) <= most.bit_length() + 1
    assert module.weight.grad is None


def test_any_other_error_of_a_pass_is_no_matter_of_memory() -> None:
    def step(rows: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        memory.largest(nn.Linear(1, 1), 4, lambda count: count, step, copies=0)  # type: ignore[arg-type,return-value]
