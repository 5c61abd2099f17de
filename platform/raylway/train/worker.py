"""What Ray Train runs on every worker. Everything heavy is imported inside, so the driver may import this file freely."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from raylway.errors import UserError
from raylway.features.prepared import Prepared
from raylway.job.schema import Job
from raylway.runs.run import Run
from raylway.train import failures
from raylway.train.failures import Failure
from raylway.train.plan import Plan

if TYPE_CHECKING:
    from raylway.train.checkpoint import Checkpoint, Progress
    from raylway.train.loop import Training
    from raylway.train.strategy import Groups

STOP_FILE = "stop"
"""In the run's folder: training writes a checkpoint after the step at hand and ends."""


class Assignment(msgspec.Struct, frozen=True):
    """What a worker is told, as plain values."""

    job: str
    """The job as JSON."""
    plan: Plan
    run: str
    prepared: str
    import_paths: list[str]
    launch: str


class Report(msgspec.Struct, frozen=True):
    """What a worker gives back, as plain values: a failure, or where training ended."""

    failure: Failure | None = None
    step: int = 0
    updates: int = 0
    skipped: int = 0
    stopped_early: bool = False
    best_step: int = 0
    best_value: float | None = None
    best_checkpoint: str = ""
    last_checkpoint: str = ""


class _Start(msgspec.Struct, frozen=True):
    """What rank 0 has found out for all ranks."""

    attempt: int
    checkpoint: str
    """The folder to go on from; empty for none."""
    broken: list[str]


def assignment(
    job: Job, plan: Plan, run: Run, prepared: Prepared, import_paths: list[str], launch: str
) -> dict[str, Any]:
    """The argument of `work`."""
    text = job.model_dump_json(by_alias=True, exclude_unset=True)
    return msgspec.to_builtins(Assignment(text, plan, str(run.folder), str(prepared.folder), import_paths, launch))


def work(config: dict[str, Any]) -> dict[str, Any]:
    """Train, from the newest checkpoint if there is one. Called on all ranks at once, in an initialised process group.

    Args:
        config: From `assignment`.

    Returns:
        A `Report` as plain values. Mistakes of the user and runs that can't go on are in it, on every rank, because
        Ray Train would take an exception for a reason to start again.

    Raises:
        Exception: A fault after which to start again: lost peers, a failing machine, or a bug of ours.
    """
    task = msgspec.convert(config, Assignment)
    for folder in reversed(task.import_paths):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    from raylway.train.strategy import Groups

    groups, run, job = Groups.create(), Run(Path(task.run)), Job.model_validate_json(task.job)
    start = _start(task, run, groups)
    if isinstance(start, Failure):
        return msgspec.to_builtins(Report(failure=start))
    try:
        return msgspec.to_builtins(_train(task, job, run, groups, start))
    except Exception as error:  # noqa: BLE001 - every failure is judged here, and raised again if it is a fault
        users_folders = task.import_paths if job.model.kind != "mlp" else []
        failure = failures.blame(error, start.attempt, groups.rank, users_folders)
        if failure.kind == "fault":
            found = failures.of_a_peer(run, start.attempt)
            if found is None:
                failures.record(run, failure)
                _leave(error)
                raise
            failure = found
        else:
            failures.record(run, failure)
        _leave(error)
        return msgspec.to_builtins(Report(failure=failure))


def _start(task: Assignment, run: Run, groups: Groups) -> _Start | Failure:
    """Rank 0 looks and decides; all ranks get its answer, and wait for it."""
    import torch.distributed as dist

    from raylway.train import checkpoint

    answer: list[Any] = [None]
    if groups.rank == 0:
        broken: dict[str, str] = {}
        found = checkpoint.newest(run.checkpoints, broken)
        for folder, reason in broken.items():
            run.log("checkpoint skipped", checkpoint=folder, reason=reason)
        from_step = found.manifest.step if found else 0
        try:
            used = checkpoint.last_attempt(run.checkpoints)
            attempt = failures.begin(run, task.launch, from_step, groups.workers, used)
            answer = [_Start(attempt, found.folder.name if found else "", list(broken))]
        except Exception as error:  # noqa: BLE001 - the other ranks wait for an answer, whatever it is
            answer = [failures.blame(error, 0, 0, [])]
    dist.broadcast_object_list(answer, group=groups.save, group_src=0)
    return answer[0]


def _train(task: Assignment, job: Job, run: Run, groups: Groups, start: _Start) -> Report:
    from raylway.train import checkpoint, loop

    found = checkpoint.opened(run.checkpoints / start.checkpoint) if start.checkpoint else None
    training, progress = _assembled(task, job, run, groups, start, found)
    progress = loop.train(training, progress)
    last = training.checkpoints.written or start.checkpoint
    return Report(
        step=progress.step,
        updates=progress.updates,
        skipped=progress.skipped,
        stopped_early=progress.stopped_early,
        best_step=progress.best.step if progress.best_checkpoint else progress.step,
        best_value=progress.best.value,
        best_checkpoint=progress.best_checkpoint or last,
        last_checkpoint=last,
    )


def _assembled(
    task: Assignment, job: Job, run: Run, groups: Groups, start: _Start, found: Checkpoint | None
) -> tuple[Training, Progress]:
    """Everything that the loop works with, in the state of the checkpoint. All ranks call it at once."""
    import torch

    from raylway.models import registry
    from raylway.train import checkpoint, optim, strategy
    from raylway.train.feed.loader import Feed, Share
    from raylway.train.feed.order import Order
    from raylway.train.log import MetricsLog, NoLog
    from raylway.train.loop import Training
    from raylway.train.precision import Precision
    from raylway.train.validate import Validation

    state = found.state if found else None
    plan = msgspec.structs.replace(task.plan, microbatch=state.microbatch) if state else task.plan
    device = torch.device("cuda", torch.cuda.current_device()) if plan.gpus_per_worker else torch.device("cpu")
    torch.set_num_threads(plan.cpus_per_worker)
    prepared = Prepared(Path(task.prepared))
    transform = prepared.manifest.transform

    module = seeded_model(job, prepared).to(device)
    optimizer = optim.optimizer(module, job.train.optimizer)
    precision = Precision(plan.precision, device, automatic=job.train.precision == "auto")
    if found and state:
        checkpoint.restore(found, module, optimizer)
        precision.scaler.load_state_dict(state.scaler)

    def feed(split: str, seed: int | None) -> Feed:
        rows = [shard.rows for shard in prepared.shards(split)]
        share = Share(groups.rank, groups.workers, plan.global_batch, plan.microbatch)
        order = Order(rows, seed, plan.lanes if seed is not None else 1)
        return Feed(prepared.rows(split, verify=True), order, share, transform.target, device)

    validates = plan.validate_every_steps is not None
    training = Training(
        job=job.train,
        seed=job.seed,
        task=transform.target.task,
        plan=plan,
        groups=groups,
        device=device,
        model=strategy.parallel(module, groups),
        optimizer=optimizer,
        precision=precision,
        feed=feed("train", job.seed),
        validation=Validation(feed("validation", None), transform.target, precision, groups) if validates else None,
        checkpoints=checkpoint.Checkpoints(
            run.checkpoints, job.train.checkpoint.keep, start.attempt, groups, start.broken
        ),
        log=MetricsLog(run.metrics, state.metrics_bytes if state else 0) if groups.rank == 0 else NoLog(),
        wish=_Wishes(plan, groups.rank, run.folder / STOP_FILE),
    )
    return training, _progress(run, state.progress if state else checkpoint.Progress())


def seeded_model(job: Job, prepared: Prepared) -> Any:
    """The model with the initial weights that the job's seed gives it: the same on every rank and machine.

    Raises:
        UserError: From `registry.build`, or for layers that mix rows.
    """
    import random

    import numpy as np
    import torch

    from raylway.models import registry
    from raylway.train.strategy import refuse_batch_norm

    random.seed(job.seed)
    np.random.seed(job.seed)
    torch.manual_seed(job.seed)
    module = registry.build(job.model, prepared.manifest.transform)
    refuse_batch_norm(module)
    return module


def _progress(run: Run, progress: Progress) -> Progress:
    """The checkpoint's progress; a best checkpoint that is damaged since is forgotten, and the next validation counts."""
    from raylway.errors import RunFailed
    from raylway.train import checkpoint
    from raylway.train.validate import Best

    try:
        if progress.best_checkpoint:
            checkpoint.opened(run.checkpoints / progress.best_checkpoint)
    except RunFailed:
        return msgspec.structs.replace(progress, best=Best(), best_checkpoint="")
    return progress


class _Wishes:
    """When rank 0 would like a checkpoint, and when it was told to stop; the other ranks wish for nothing."""

    def __init__(self, plan: Plan, rank: int, stop_file: Path) -> None:
        import time

        self._plan, self._rank, self._stop_file = plan, rank, stop_file
        self._clock = time.monotonic
        self._saved_at = self._clock()

    def __call__(self, progress: Progress) -> Any:
        from raylway.train.step import Wish

        if self._rank:
            return Wish()
        return Wish(save=self._save_is_due(progress.step + 1), stop=self._stop_file.exists())

    def _save_is_due(self, step: int) -> bool:
        if self._plan.checkpoint_every_steps is not None:
            return step % self._plan.checkpoint_every_steps == 0
        assert self._plan.checkpoint_every_s is not None
        if self._clock() - self._saved_at < self._plan.checkpoint_every_s:
            return False
        self._saved_at = self._clock()
        return True


def _leave(error: BaseException) -> None:
    """Let go of the process groups, so that peers which wait for this rank fail now and not at the timeout."""
    import gc
    import traceback

    import torch.distributed as dist

    # The frames of the exception hold the model, and DDP holds the group's connections.
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    dist.destroy_process_group()
