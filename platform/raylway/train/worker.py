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
from raylway.train import failures, resizing
from raylway.train.failures import Failure
from raylway.train.plan import Plan

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
    rolled_back: list[str] = []


class Start(msgspec.Struct, frozen=True):
    """What rank 0 has found out for all ranks."""

    attempt: int
    checkpoint: str
    """The folder to go on from; empty for none."""
    broken: list[str]


class _Answer(msgspec.Struct, frozen=True):
    """What rank 0 tells the others: one of the two."""

    start: Start | None = None
    failure: Failure | None = None


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
        Resized: There is room for another number of workers; the checkpoint is written.
        Exception: A fault after which to start again: lost peers, a failing machine, or a bug of ours.
    """
    task = msgspec.convert(config, Assignment)
    for folder in reversed(task.import_paths):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    from raylway.train.strategy import Groups

    groups, run, job = (
        Groups.create(task.plan.division),
        Run(storage.place(task.run)),
        Job.model_validate_json(task.job),
    )
    start = _start(task, run, groups)
    if isinstance(start, Failure):
        return msgspec.to_builtins(Report(failure=start))
    try:
        return msgspec.to_builtins(_train(task, job, run, groups, start))
    except resizing.Resized as error:  # no failure
        _leave(error)
        raise
    except Exception as error:
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


def _start(task: Assignment, run: Run, groups: Groups) -> Start | Failure:
    """Rank 0 looks and decides; all ranks get its answer, and wait for it."""
    from raylway.train import checkpoint, messages

    answer = _Answer()
    if groups.rank == 0:
        broken: dict[str, str] = {}
        found = checkpoint.newest(run, broken)
        for folder, reason in broken.items():
            run.log("checkpoint skipped", checkpoint=folder, reason=reason)
        from_step = found.manifest.step if found else 0
        try:
            used = checkpoint.last_attempt(run.checkpoints)
            attempt = failures.begin(run, task.launch, from_step, groups.workers, used)
            answer = _Answer(start=Start(attempt, found.folder.name if found else "", list(broken)))
        except Exception as error:  # noqa: BLE001 - the other ranks wait for an answer, whatever it is
            answer = _Answer(failure=failures.blame(error, 0, 0, []))
    heard = msgspec.json.decode(messages.from_rank_0(msgspec.json.encode(answer), groups.save), type=_Answer)
    found_by_0 = heard.failure or heard.start
    assert found_by_0 is not None
    return found_by_0


def _train(task: Assignment, job: Job, run: Run, groups: Groups, start: Start) -> Report:
    from raylway.train import assemble, loop

    training, progress = assemble.training(task, job, run, groups, start)
    training.event(starts.ASSEMBLED)
    is_elastic = task.plan.fewest_workers is not None
    if is_elastic and groups.rank == 0:
        training.log.write("note", step=progress.step, text=resizing.beginning(run, task.plan))
    with contextlib.closing(training.log), contextlib.closing(training.checkpoints):
        progress = loop.train(training, progress)
    if is_elastic and progress.step < task.plan.total_steps and not progress.stopped_early:
        resizing.leave(groups, run)
    last = training.checkpoints.written
    return Report(
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
