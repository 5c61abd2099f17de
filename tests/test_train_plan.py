"""The derived numbers, and what is refused before anything starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylway.errors import UserError
from raylway.job.schema import Job
from raylway.train.plan import Plan, plan


def planned(rows: int, validation: int = 10, gpus: int = 0, task: Any = "classification", **train: Any) -> Plan:
    job = Job.model_validate({"name": "case", "data": {"source": "a.csv", "target": "t"}, "train": train})
    return plan(job, task, rows, validation, 4, 1, gpus)


@given(rows=st.integers(1, 10_000_000))
def test_defaults_give_every_size_of_data_a_sensible_length(rows: int) -> None:
    found = planned(rows)
    assert found.global_batch in {16, 32, 64, 128, 256, 512, 1024}
    assert found.steps_per_epoch == math.ceil(rows / found.global_batch)
    assert found.steps_per_epoch >= 50 or found.global_batch == 16
    assert 20 <= found.epochs <= 200
    assert found.total_steps >= 1_000 or found.epochs == 200
    assert (found.workers, found.accumulation, found.precision) == (1, 1, "fp32")
    assert sum(found.rows_in(step) for step in range(1, min(found.steps_per_epoch, 20_000) + 1)) == rows


@given(batch=st.integers(8, 5_000), workers=st.integers(1, 8), microbatch=st.integers(1, 600))
def test_accumulation_covers_the_largest_share(batch: int, workers: int, microbatch: int) -> None:
    found = planned(100_000, global_batch=batch, workers=workers, microbatch=microbatch)
    share = math.ceil(batch / workers)
    assert (found.accumulation - 1) * microbatch < share <= found.accumulation * microbatch
    assert planned(100_000, global_batch=batch, workers=workers).microbatch == min(share, 4_096)


def test_lengths_are_counted_in_steps() -> None:
    found = planned(
        1_000,
        **{
            "for": "10 epochs",
            "global_batch": 64,
            "checkpoint": {"every": "2 epochs"},
            "validate": {"every": "5 steps"},
        },
        schedule={"kind": "step", "every": "3 epochs", "gamma": 0.1, "warmup": "1 epoch"},
    )
    assert (found.steps_per_epoch, found.total_steps, found.warmup_steps, found.decay_every_steps) == (16, 160, 16, 48)
    assert (found.checkpoint_every_steps, found.checkpoint_every_s, found.validate_every_steps) == (32, None, 5)
    assert planned(1_000).checkpoint_every_s == 300.0
    stable = {"for": "200 steps", "schedule": {"kind": "wsd", "warmup": "30 steps"}}
    assert planned(1_000, **stable).decay_steps == 40
    assert planned(1_000, **{**stable, "for": "32 steps"}).decay_steps == 2
    stable["schedule"]["decay"] = "2 epochs"
    assert planned(1_000, **stable, global_batch=50).decay_steps == 40
    assert planned(1_000, validation=0).validate_every_steps is None


def test_gpus_decide_what_is_left_open() -> None:
    found = planned(100_000, gpus=4)
    assert (found.workers, found.gpus_per_worker, found.precision) == (4, 1, "bf16")
    assert planned(100_000, gpus=4, resources={"gpus": 0}, workers=2).precision == "fp32"
    assert planned(100_000, gpus=4, precision="fp16").precision == "fp16"


def test_only_large_data_has_lanes() -> None:
    a_row = 4 * 5 + 16
    assert planned(2**30 // a_row).lanes == 1
    assert planned(2**30 // a_row + 1).lanes == 64


@pytest.mark.parametrize(
    ("arguments", "where", "words"),
    [
        ({"rows": 0}, "data.split", "no rows are left"),
        ({"rows": 100, "global_batch": 3, "workers": 4}, "train.global_batch", "each of the 4 workers"),
        ({"rows": 100, "workers": 20}, "train.global_batch", "global batch of 16"),
        ({"rows": 100, "validate": {"best": "val_rmse"}}, "train.validate.best", "val_loss or val_accuracy"),
        (
            {"rows": 100, "task": "regression", "validate": {"best": "val_accuracy"}},
            "train.validate.best",
            "val_loss or val_rmse",
        ),
        (
            {"rows": 100, "for": "9 steps", "schedule": {"kind": "wsd", "warmup": "4 steps", "decay": "6 steps"}},
            "train.schedule.decay",
            "at most 9 steps for both",
        ),
        ({"rows": 100, "validation": 0, "validate": {"patience": 3}}, "train.validate.patience", "no validation rows"),
    ],
)
def test_what_can_not_be_is_refused_with_its_key(arguments: dict[str, Any], where: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(**arguments)
    assert caught.value.where == where
    assert words in str(caught.value)
