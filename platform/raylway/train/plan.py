"""The derived numbers of training: from what the job asks, the rows and the machine, to steps, batches and workers.

Pure arithmetic, without torch or Ray: `raylway check` prints what the trainer and its workers run on.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from raylway.errors import UserError
from raylway.features.signature import Task
from raylway.job.schema import Job
from raylway.job.training import Elastic, Schedule
from raylway.job.units import Duration
from raylway.train import division
from raylway.train.division import CHUNKS_A_STAGE, Division
from raylway.train.feed.order import num_microbatches

STEPS_PER_EPOCH = 50
"""An automatic global batch leaves about this many updates an epoch, or more."""
SMALLEST_BATCH, LARGEST_BATCH = 16, 1024
"""Bounds of an automatic global batch: powers of two between them."""
EPOCHS, MOST_EPOCHS, FEWEST_STEPS = 20, 200, 1_000
"""Without `for`: 20 epochs, or more so that small data gets 1,000 steps, but never more than 200."""
LARGEST_MICROBATCH = 4_096
DECAY_SHARE = 0.2
"""Of the steps, for the fall of `wsd`: 10% to 20% do (arXiv 2405.18392)."""
SMALL_DATA_BYTES = 1 << 30
LANES = 64
"""Data up to 1 GiB is shuffled as one window; larger data runs in 64 lanes (see `feed.order`)."""

_BEST_METRICS: dict[Task, tuple[str, ...]] = {
    "classification": ("val_loss", "val_accuracy"),
    "regression": ("val_loss", "val_rmse"),
}


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one run of training does; every number follows from the job, the data and the machine."""

    rows_train: int
    rows_validation: int
    steps_per_epoch: int
    """The last one of an epoch is short when the batch does not divide the rows."""
    total_steps: int
    global_batch: int
    """Rows in one optimizer step, over all workers."""
    microbatch: int
    """Most rows of one worker in one forward and backward pass."""
    accumulation: int
    """Microbatches in a full step; with the fewest workers, if their number changes."""
    workers: int
    """At most. On a worker: as many as it has peers, itself included."""
    cpus_per_worker: int
    gpus_per_worker: int
    precision: Literal["fp32", "bf16", "fp16"]
    lanes: int
    warmup_steps: int
    decay_every_steps: int | None
    """Of the `step` schedule."""
    decay_steps: int | None
    """Of the `wsd` schedule."""
    validate_every_steps: int | None
    """None when there are no validation rows; then the newest weights are the best."""
    checkpoint_every_steps: int | None
    checkpoint_every_s: float | None
    """One of the two is set."""
    division: Division = Division()
    compile: bool = False
    """Microbatches then have one shape: short ones are filled up with rows that count nothing."""
    fewest_workers: int | None = None
    """With so many it starts and goes on; None when their number is fixed."""

    @property
    def needed_workers(self) -> int:
        """There must be room for these."""
        return self.fewest_workers or self.workers

    @property
    def group(self) -> str:
        """How many workers, for people."""
        return f"{self.fewest_workers} to {self.workers}" if self.fewest_workers else str(self.workers)

    @property
    def data_ranks(self) -> int:
        """Among how many the rows of a step are divided: the workers, or the groups of them that share their rows."""
        return self.workers // self.division.sharers

    @property
    def epochs(self) -> float:
        return self.total_steps / self.steps_per_epoch

    def rows_in(self, step: int) -> int:
        """Rows of a step, counted from 1, over all workers."""
        index = (step - 1) % self.steps_per_epoch
        return min(self.global_batch, self.rows_train - index * self.global_batch)


def plan(
    job: Job,
    task: Task,
    rows_train: int,
    rows_validation: int,
    num_numeric: int,
    num_categorical: int,
    gpus: float,
) -> Plan:
    """Derive every number that the job leaves open.

    Args:
        job: The job.
        task: As inferred from the data.
        rows_train: Rows to train on.
        rows_validation: Rows to validate on; may be 0.
        num_numeric: Numbers that the model takes for a row.
        num_categorical: Codes that it takes for a row.
        gpus: GPUs of the whole cluster.

    Raises:
        UserError: The job asks for something that these rows can't give; `where` is the dotted key.
    """
    _refuse_misfits(job, task, rows_train, rows_validation)
    train = job.train
    divided = division.division(job)
    workers = division.workers(job, divided, int(gpus))
    batch = _global_batch(train.global_batch, rows_train, workers // divided.sharers)
    fewest = train.workers.min if isinstance(train.workers, Elastic) else None
    data_ranks = (fewest or workers) // divided.sharers
    microbatch = train.microbatch if isinstance(train.microbatch, int) else _microbatch(batch, data_ranks, divided)
    accumulation = num_microbatches(batch, data_ranks, microbatch)
    division.refuse_short_pipeline(divided, accumulation)
    steps_per_epoch = math.ceil(rows_train / batch)
    wanted_gpus = train.resources.gpus
    gpus_per_worker = wanted_gpus if isinstance(wanted_gpus, int) else int(gpus >= 1)
    automatic: Literal["bf16", "fp32"] = "bf16" if gpus_per_worker else "fp32"
    every = train.checkpoint.every
    total_steps = _total_steps(train.duration, steps_per_epoch)
    warmup_steps = train.schedule.warmup.in_steps(steps_per_epoch)
    return Plan(
        rows_train=rows_train,
        rows_validation=rows_validation,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        global_batch=batch,
        microbatch=microbatch,
        accumulation=accumulation,
        workers=workers,
        cpus_per_worker=train.resources.cpus,
        gpus_per_worker=gpus_per_worker,
        precision=automatic if train.precision == "auto" else train.precision,
        lanes=1 if _bytes(rows_train, num_numeric, num_categorical) <= SMALL_DATA_BYTES else LANES,
        warmup_steps=warmup_steps,
        decay_every_steps=train.schedule.every.in_steps(steps_per_epoch) if train.schedule.every else None,
        decay_steps=_decay_steps(train.schedule, total_steps, warmup_steps, steps_per_epoch),
        validate_every_steps=train.validation.every.in_steps(steps_per_epoch) if rows_validation else None,
        checkpoint_every_steps=None if every.is_time else max(1, every.in_steps(steps_per_epoch)),
        checkpoint_every_s=every.seconds if every.is_time else None,
        division=divided,
        compile=job.model.compile,
        fewest_workers=fewest,
    )


def _refuse_misfits(job: Job, task: Task, rows_train: int, rows_validation: int) -> None:
    if not rows_train:
        raise UserError("no rows are left to train on", where="data.split", expected="at least one training row")
    if job.data.balance != "none" and task == "regression":
        raise UserError(
            "only classes can be balanced",
            where="data.balance",
            expected="none, for the target is a number",
            found=job.data.balance,
            fix="leave data.balance out",
        )
    wanted = job.train.validation
    if wanted.best not in _BEST_METRICS[task]:
        raise UserError(
            f"{wanted.best} does not exist for {task}",
            where="train.validate.best",
            expected=" or ".join(_BEST_METRICS[task]),
            found=wanted.best,
        )
    if wanted.patience is not None and not rows_validation:
        raise UserError(
            "patience counts validations, and there are no validation rows",
            where="train.validate.patience",
            expected="a validation share above 0%",
            found=f"data.split.validation of {job.data.split.validation:.0%}",
            fix="raise data.split.validation or leave patience out",
        )


def _global_batch(wanted: int | Literal["auto"], rows: int, workers: int) -> int:
    batch = wanted if isinstance(wanted, int) else SMALLEST_BATCH
    while wanted == "auto" and batch < LARGEST_BATCH and rows // (2 * batch) >= STEPS_PER_EPOCH:
        batch *= 2
    if batch < workers:
        raise UserError(
            "the global batch has fewer rows than there are workers",
            where="train.global_batch",
            expected=f"at least one row for each of the {workers} workers",
            found=f"a global batch of {batch} rows",
            fix="raise train.global_batch or lower train.workers",
        )
    return batch


def _microbatch(batch: int, data_ranks: int, divided: Division) -> int:
    """Of a job that leaves it open: a rank's whole share, or what keeps all stages of a pipeline at work."""
    passes = divided.parts * CHUNKS_A_STAGE if divided.kind == "pipeline" else 1
    return min(math.ceil(math.ceil(batch / data_ranks) / passes), LARGEST_MICROBATCH)


def _total_steps(duration: Duration | Literal["auto"], steps_per_epoch: int) -> int:
    if isinstance(duration, Duration):
        return max(1, duration.in_steps(steps_per_epoch))
    epochs = min(MOST_EPOCHS, max(EPOCHS, math.ceil(FEWEST_STEPS / steps_per_epoch)))
    return epochs * steps_per_epoch


def _decay_steps(schedule: Schedule, total_steps: int, warmup_steps: int, steps_per_epoch: int) -> int | None:
    if schedule.kind != "wsd":
        return None
    if schedule.decay is None:
        return max(1, min(round(DECAY_SHARE * total_steps), total_steps - warmup_steps))
    steps = schedule.decay.in_steps(steps_per_epoch)
    if warmup_steps + steps > total_steps:
        raise UserError(
            "warm-up and decay are longer than training",
            where="train.schedule.decay",
            expected=f"at most {total_steps:,} steps for both",
            found=f"{warmup_steps:,} and {steps:,} steps",
        )
    return steps


def _bytes(rows: int, num_numeric: int, num_categorical: int) -> int:
    """Of the rows in their shards: 4 bytes a feature, 8 for the target, 8 for the row id."""
    return rows * (4 * (num_numeric + num_categorical) + 16)
