"""The training loop: the article's, with the engineering out of sight.

    for data, target in loader:            feed.step: this rank's rows of the global batch, in microbatches
        optimizer.zero_grad()
        output = model(data)               forward_backward: accumulated over microbatches, summed over ranks
        loss = criterion(output, target)
        loss.backward()
        optimizer.step()                   once all ranks agree that the step is sound
    scheduler.step()                       the rate is a function of the updates made

All ranks run it side by side. Whatever decides what happens next is agreed by all of them, or computed by each from
the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch

from raylway.errors import RunFailed
from raylway.features.signature import Task
from raylway.job.training import Train
from raylway.train import optim, validate
from raylway.train.average import Average
from raylway.train.checkpoint import State, restore, settings_of, tensors_of
from raylway.train.clock import Clock
from raylway.train.feed.loader import Feed
from raylway.train.feed.order import random_seed
from raylway.train.guard import Guard, Verdict
from raylway.train.log import MetricsLog, NoLog
from raylway.train.plan import Plan
from raylway.train.precision import Precision
from raylway.train.progress import Progress
from raylway.train.saving import Checkpoints
from raylway.train.step import Agreed, Wish, agree, forward_backward, seed_random
from raylway.train.strategy import Groups, Parallel
from raylway.train.validate import Validation

_LONG_WAIT_S = 1.0
"""A wait for a checkpoint that is worth a word."""


@dataclass(frozen=True)
class Training:
    """Everything that the loop works with, put together by `worker`."""

    job: Train
    seed: int
    task: Task
    plan: Plan
    groups: Groups
    device: torch.device
    model: Parallel
    optimizer: torch.optim.Optimizer
    average: Average
    guard: Guard
    precision: Precision
    feed: Feed
    validation: Validation | None
    """None without validation rows."""
    checkpoints: Checkpoints
    log: MetricsLog | NoLog
    clock: Clock
    wish: Callable[[Progress], Wish]
    """What this rank would like after a step: a checkpoint, or an end."""
    event: Callable[..., None]
    """Keeps a record of what happened, on rank 0."""


def train(run: Training, progress: Progress) -> Progress:
    """Train from `progress` to the end of the plan, or until validation says that it gets no better.

    Called by all ranks at once.

    Args:
        run: Model, data and settings; the model and optimizer are in the state of `progress`.
        progress: Where to go on.

    Returns:
        Where it ended, which is before the plan's end if someone wished for it. Its checkpoint is written.

    Raises:
        RunFailed: Loss or gradient are not finite, or the loss jumps and the job says to stop then; on all ranks alike,
            before the weights are touched. Or checkpoints can't be written.
    """
    plan, optimizer, scaler, clock = run.plan, run.optimizer, run.precision.scaler, run.clock
    parameters = [parameter for parameter in run.model.module.parameters() if parameter.requires_grad]
    clip = run.job.clip or float("inf")
    wish = Wish()
    while progress.step < plan.total_steps and not progress.stopped_early and not wish.stop:
        clock.start()
        batch = run.feed.step(progress.step)
        clock.fed()
        seed_random(run.device, random_seed(run.seed, progress.step, run.groups.random_rank))
        rate = optim.learning_rate(run.job, plan, progress.updates)
        optim.set_learning_rate(optimizer, rate)

        optimizer.zero_grad()
        loss_sum = forward_backward(run.model, batch, run.task, clock)
        scaler.unscale_(optimizer)
        norm = run.model.gradient_norm()
        digest = batch.digest if run.groups.counts_rows else 0
        agreed = agree(run.groups, loss_sum, norm, batch.num_rows, digest, run.wish(progress), clock.own())
        wish = agreed.wish
        if wish.settle or wish.save:
            with clock.stopped():
                progress = _settled(run, progress)
        verdict = run.guard.judge(progress, agreed, norm)
        if verdict is Verdict.UPDATE:
            optim.clip(parameters, clip, norm)
            scaler.step(optimizer)
            run.average.update(progress.updates + 1)
        scaler.update()
        progress = progress.after_step(verdict is Verdict.UPDATE, run.guard.remembered(progress, agreed))
        if verdict is Verdict.ROLL_BACK:
            progress = _rolled_back(run, progress, agreed.loss)

        _log_step(run, progress, agreed, rate, norm.item())
        is_last = progress.step == plan.total_steps
        improved = False
        if run.validation and plan.validate_every_steps and (progress.step % plan.validate_every_steps == 0 or is_last):
            progress, improved = _validated(run, run.validation, progress)
        if wish.save or wish.stop or improved or is_last or progress.stopped_early:
            progress = _saved(run, progress)
    return _ended(run, progress)


def _log_step(run: Training, progress: Progress, agreed: Agreed, rate: float, norm: float) -> None:
    rows, elapsed_s = run.plan.rows_in(progress.step), run.clock.elapsed_s()
    run.log.write(
        "step",
        step=progress.step,
        epoch=(progress.step - 1) // run.plan.steps_per_epoch + 1,
        batch=f"{agreed.batch:014x}",
        loss=agreed.loss,
        lr=rate,
        grad_norm=norm,
        rows=rows,
        rows_per_s=rows / elapsed_s,
        step_s=elapsed_s,
        **agreed.times(),
        updates=progress.updates,
        skipped=progress.skipped,
    )
    is_last = progress.step == run.plan.total_steps
    run.log.pace(progress.step, is_last or progress.step % run.plan.steps_per_epoch == 0)


def _rolled_back(run: Training, progress: Progress, loss: float) -> Progress:
    """Put back the last checkpoint that was due, and leave out the batches since. All ranks call it at once."""
    progress = _settled(run, progress)
    if not progress.anchor:
        raise RunFailed(
            f"training stopped at step {progress.step}: loss {loss:g}, and the checkpoint to go back to could not be "
            f"written. Lower train.optimizer.lr, set train.clip, or add a warm-up"
        )
    found = run.checkpoints.opened(progress.anchor)
    progress = run.guard.rolled_back(progress, found.state.progress, loss)
    restore(found, run.model, run.optimizer, run.average)
    run.precision.scaler.load_state_dict(found.state.scaler)
    made = progress.rollbacks[-1]
    run.log.write("note", step=progress.step, text=f"rolled back {made}", undone_from=made.first_step)
    run.event("rolled back", checkpoint=found.folder.name, **msgspec.to_builtins(made))
    return progress


def _validated(run: Training, validation: Validation, progress: Progress) -> tuple[Progress, bool]:
    """Progress after a validation, and whether these weights are the best so far. All ranks call it at once."""
    started_at = time.monotonic()
    with run.average.in_place():
        figures = validation.figures(run.model)
    metric = run.job.validation.best
    best = validate.judge(progress.best, metric, figures[metric], progress.step)
    improved = best.step == progress.step
    run.log.write("validation", step=progress.step, **figures, best=improved, elapsed_s=time.monotonic() - started_at)
    progress = msgspec.structs.replace(
        progress,
        best=best,
        best_checkpoint=run.checkpoints.name_of(progress.step) if improved else progress.best_checkpoint,
        stopped_early=validate.out_of_patience(best, run.job.validation.patience),
    )
    return progress, improved


def _saved(run: Training, progress: Progress) -> Progress:
    """Progress after a copy for the checkpoint of this step was made; it is written while training goes on. All ranks
    call it at once."""
    progress = _settled(run, progress)
    if run.plan.checkpoint_every_steps and progress.step % run.plan.checkpoint_every_steps == 0:
        progress = msgspec.structs.replace(progress, anchor=run.checkpoints.name_of(progress.step))
    run.checkpoints.save(
        tensors_of(run.model.module, run.optimizer, run.average),
        State(
            progress=progress,
            microbatch=run.plan.microbatch,
            workers=run.groups.workers,
            metrics_bytes=run.log.mark(),
            scaler=run.precision.scaler.state_dict(),
            optimizer=settings_of(run.optimizer),
        ),
    )
    run.log.write("checkpoint", step=progress.step, stall_s=run.checkpoints.stalled_s())
    return progress


def _settled(run: Training, progress: Progress) -> Progress:
    """Progress once the checkpoint in flight, if there is one, is whole, or else without it. All ranks call it at once.

    Raises:
        RunFailed: It could not be written, and neither could the one before.
    """
    ended = run.checkpoints.settle()
    if ended is None:
        return progress
    if ended.waited_s > _LONG_WAIT_S:
        text = f"waited {ended.waited_s:.1f} s for the checkpoint of step {ended.step:,}"
        run.log.write("note", step=progress.step, text=text)
    if not ended.error:
        return progress
    left = f"the last whole one is {run.checkpoints.written}" if run.checkpoints.written else "there is none before it"
    text = f"the checkpoint of step {ended.step:,} can't be written: {ended.error}; {left}"
    if ended.in_a_row > 1:
        raise RunFailed(f"{text}. {ended.in_a_row} in a row failed: make room or mend the storage, and run this again")
    run.log.write("note", step=progress.step, text=f"{text}; going on")
    return progress.without(ended.name, ended.kept)


def _ended(run: Training, progress: Progress) -> Progress:
    """Progress when the last checkpoint is whole; what could not be written is tried once more."""
    settled = _settled(run, progress)
    if run.checkpoints.again():
        settled = _settled(run, progress)
    if stalled_s := run.checkpoints.stalled_s():
        run.log.write("checkpoint", step=progress.step, stall_s=stalled_s)
    return settled
