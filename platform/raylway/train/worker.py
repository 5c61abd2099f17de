"""What Ray Train runs on every worker, and what comes of its failures.

Torch is imported inside: the driver imports this file to name the function.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from raylway import storage
from raylway.features.prepared import Prepared
from raylway.job.schema import Job
from raylway.runs import starts
from raylway.runs.run import Run
from raylway.train import failures, memory, preemption, resizing
from raylway.train.failures import Failure
from raylway.train.memory import Chosen, PassTooLarge
from raylway.train.plan import Plan
from raylway.train.watchdog import Watchdog

if TYPE_CHECKING:
    from raylway.train.strategy import Groups


class Assignment(msgspec.Struct, frozen=True):
    """What a worker is told, as plain values."""

    job: str
    """The job as JSON."""
    plan: Plan
    run: str
    prepared: str
    import_paths: list[str]
    launch: str
    hang_limit_s: float
    """Of the watchdog."""


class Report(msgspec.Struct, frozen=True):
    """What a worker gives back, as plain values: a failure, or where training ended."""

    failure: Failure | None = None
    microbatch: int = 0
    step: int = 0
    updates: int = 0
    skipped: int = 0
    stopped_early: bool = False
    best_step: int = 0
    best_value: float | None = None
    best_checkpoint: str = ""
    last_checkpoint: str = ""
    rolled_back: list[str] = []


class Start(msgspec.Struct, frozen=True):
    """What rank 0 has found out for all ranks."""

    attempt: int
    checkpoint: str
    """The folder to go on from; empty for none."""
    broken: list[str]
    chosen: Chosen


class _Answer(msgspec.Struct, frozen=True):
    """What rank 0 tells the others: one of the two."""

    start: Start | None = None
    failure: Failure | None = None


def assignment(
    job: Job, plan: Plan, run: Run, prepared: Prepared, import_paths: list[str], launch: str, hang_limit_s: float
) -> dict[str, Any]:
    """The argument of `work`."""
    text = job.model_dump_json(by_alias=True, exclude_unset=True)
    return msgspec.to_builtins(
        Assignment(text, plan, str(run.folder), str(prepared.folder), import_paths, launch, hang_limit_s)
    )


def work(config: dict[str, Any]) -> dict[str, Any]:
    """Train, from the newest checkpoint if there is one. Called on all ranks at once, in an initialised process group.

    Args:
        config: From `assignment`.

    Returns:
        A `Report` as plain values. Mistakes of the user and runs that can't go on are in it, on every rank, because
        Ray Train would take an exception for a reason to start again.

    Raises:
        Resized: There is room for another number of workers; the checkpoint is written.
        Exception: A fault after which to start again: lost peers, a failing machine, or a bug of ours.
    """
    task = msgspec.convert(config, Assignment)
    for folder in reversed(task.import_paths):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    from raylway.train.strategy import Groups

    groups = Groups.create(task.plan.division, task.hang_limit_s)
    run, job = Run(storage.place(task.run)), Job.model_validate_json(task.job)
    start = _start(task, job, run, groups)
    if isinstance(start, Failure):
        return msgspec.to_builtins(Report(failure=start))
    try:
        return msgspec.to_builtins(_train(task, job, run, groups, start))
    except resizing.Resized as error:  # no failure
        _leave(error)
        raise
    except Exception as error:
        failure = _failure(error, task, job, run, start, groups.rank)
        _leave(error)
        if failure.ends_run:
            return msgspec.to_builtins(Report(failure=failure))
        raise


def _failure(error: Exception, task: Assignment, job: Job, run: Run, start: Start, rank: int) -> Failure:
    """Whose it is, recorded; of one that only followed from a peer's, the peer's."""
    if isinstance(error, PassTooLarge) and job.train.microbatch == "auto" and error.rows > 1:
        failure = Failure(start.attempt, rank, "memory", [f"rank {rank}: {error}"], error.rows)
    elif isinstance(error, preemption.Preempted):
        failure = Failure(start.attempt, rank, "preempted", [str(error)])
    else:
        users_folders = task.import_paths if job.model.kind != "mlp" else []
        failure = failures.blame(memory.as_users(error), start.attempt, rank, users_folders)
    if failure.kind == "fault" and (of_peer := failures.of_a_peer(run, start.attempt)) is not None:
        return of_peer
    failures.record(run, failure)
    return failure


def _start(task: Assignment, job: Job, run: Run, groups: Groups) -> Start | Failure:
    """Rank 0 looks and decides; all ranks get its answer, and wait for it."""
    from raylway.train import checkpoint, messages

    answer = _Answer()
    if groups.rank == 0:
        try:
            broken: dict[str, str] = {}
            found = checkpoint.newest(run, broken)
            for folder, reason in broken.items():
                run.log("checkpoint skipped", checkpoint=folder, reason=reason)
            from_step = found.manifest.step if found else 0
            used = checkpoint.last_attempt(run.checkpoints)
            attempt = failures.begin(run, task.launch, from_step, groups.workers, used)
            chosen = memory.first(job, task.plan, run, found.state.microbatch if found else None)
            answer = _Answer(start=Start(attempt, found.folder.name if found else "", list(broken), chosen))
        except Exception as error:  # noqa: BLE001 - the other ranks wait for an answer, whatever it is
            answer = _Answer(failure=failures.blame(error, 0, 0, []))
    heard = msgspec.json.decode(messages.from_rank_0(msgspec.json.encode(answer), groups.save), type=_Answer)
    found_by_0 = heard.failure or heard.start
    assert found_by_0 is not None
    return found_by_0


def _train(task: Assignment, job: Job, run: Run, groups: Groups, start: Start) -> Report:
    from raylway.train import assemble, loop

    def tell(words: str) -> None:
        failures.record(run, Failure(start.attempt, groups.rank, "hang", [f"rank {groups.rank} {words}"]))

    with Watchdog(task.hang_limit_s, tell) as watchdog:
        training, progress = assemble.training(task, job, run, groups, start, watchdog.alive)
        training.event(starts.ASSEMBLED)
        is_elastic = task.plan.fewest_workers is not None
        if is_elastic and groups.rank == 0:
            training.log.write("note", step=progress.step, text=resizing.beginning(run, task.plan))
        with contextlib.closing(training.log), contextlib.closing(training.checkpoints):
            progress = loop.train(training, progress)
    if progress.step < task.plan.total_steps and not progress.stopped_early:
        preemption.leave(groups, run)
        if is_elastic:
            resizing.leave(groups, run)
    last = training.checkpoints.written
    return Report(
        microbatch=training.plan.microbatch,
        step=progress.step,
        updates=progress.updates,
        skipped=progress.skipped,
        stopped_early=progress.stopped_early,
        best_step=progress.best.step if progress.best_checkpoint else progress.step,
        best_value=progress.best.value,
        best_checkpoint=progress.best_checkpoint or last,
        last_checkpoint=last,
        rolled_back=[str(found) for found in progress.rollbacks],
    )


def _leave(error: BaseException) -> None:
    """Let go of the process groups, so that peers which wait for this rank fail now and not at the timeout."""
    import gc
    import traceback

    import torch.distributed as dist

    # The frames of the exception hold the model, and DDP holds the group's connections.
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    dist.destroy_process_group()
