"""From a job, its plan and a checkpoint to everything that the loop works with."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from raylway import storage
from raylway.features.prepared import Prepared
from raylway.job.schema import Job
from raylway.models import registry
from raylway.runs import pace
from raylway.runs.run import Run
from raylway.runs.stop import StopWord
from raylway.train import checkpoint, memory, optim, preemption, strategy
from raylway.train.average import Average
from raylway.train.checkpoint import State
from raylway.train.clock import Clock
from raylway.train.feed import balanced
from raylway.train.feed.balanced import Balanced
from raylway.train.feed.loader import Feed, Microbatch, Share
from raylway.train.feed.order import Order
from raylway.train.guard import Guard
from raylway.train.log import MetricsLog, NoLog
from raylway.train.loop import Training
from raylway.train.plan import Plan
from raylway.train.precision import Precision
from raylway.train.progress import Best, Progress
from raylway.train.resizing import ResizeWord
from raylway.train.saving import Checkpoints
from raylway.train.step import Wish, row_losses
from raylway.train.strategy import Groups
from raylway.train.validate import Validation
from raylway.train.worker import Assignment, Start


def training(
    task: Assignment, job: Job, run: Run, groups: Groups, start: Start, alive: Callable[[], None]
) -> tuple[Training, Progress]:
    """Model, data and settings in the state of the checkpoint that the start names. All ranks call it at once.

    Args:
        task: Of all ranks.
        job: In the task.
        run: In the task.
        groups: All ranks.
        start: What rank 0 has found out.
        alive: Called before each forward pass.

    Raises:
        UserError: The model can't be built or trained.
        RunFailed: The data or the checkpoint is damaged.
    """
    # Rank 0 has just compared its contents (`worker`).
    found = checkpoint.opened(run.checkpoints / start.checkpoint, verify=False) if start.checkpoint else None
    state = found.state if found else None
    plan = msgspec.structs.replace(task.plan, workers=groups.workers)
    plan = memory.with_microbatch(plan, start.chosen.microbatch)
    device = torch.device("cuda", torch.cuda.current_device()) if plan.gpus_per_worker else torch.device("cpu")
    torch.set_num_threads(plan.cpus_per_worker)
    prepared = Prepared(storage.place(task.prepared))
    target = prepared.manifest.transform.target

    module = seeded_model(job, prepared).to(device)
    precision = Precision(plan.precision, device, automatic=job.train.precision == "auto")
    if start.chosen.search:
        plan = _searched(job, plan, prepared, module, precision, groups)
    model = strategy.parallel(module, groups, plan, precision, alive)
    optimizer = optim.optimizer(model.module, job.train.optimizer)
    average = Average(model.module, job.train.optimizer.ema)
    if found and state:
        checkpoint.restore(found, model, optimizer, average)
        precision.scaler.load_state_dict(state.scaler)
    progress = _with_whole(run, state.progress) if state else Progress()
    log = _log(run, start, state) if groups.rank == 0 else NoLog()
    is_auto = groups.rank == 0 and job.train.microbatch == "auto"
    if is_auto and (text := memory.keep(run, start.attempt, task.plan.microbatch, plan)):
        log.write("note", step=progress.step, text=text)
    checkpoints = Checkpoints(run, job.train.checkpoint.keep, start, groups, progress, log.sync)
    share = _share(plan, groups)
    words = [StopWord(run.folder), *([ResizeWord(run.folder)] if plan.fewest_workers else [])]
    assembled = Training(
        job=job.train,
        seed=job.seed,
        task=target.task,
        plan=plan,
        groups=groups,
        device=device,
        model=model,
        optimizer=optimizer,
        average=average,
        guard=Guard(job.train.optimizer.spike, plan, precision.may_skip),
        precision=precision,
        feed=_training_feed(job, plan, prepared, share.filled(plan.rows_train) if plan.compile else share, device),
        validation=_validation(job, plan, prepared, share, groups, device),
        checkpoints=checkpoints,
        log=log,
        clock=Clock(device),
        wish=Wishes(plan, words, checkpoints, groups.rank == 0),
        event=run.log if groups.rank == 0 else _no_event,
    )
    if plan.compile:
        _compile(assembled, run, progress.step)
    return assembled, progress


def _compile(assembled: Training, run: Run, step: int) -> None:
    from raylway.train import compiled

    def tell(reason: str) -> None:
        run.log("not compiled", rank=assembled.groups.rank, reason=reason)
        text = f"model.compile: {reason}; training goes on without it"
        assembled.log.write("note", step=step, text=text)

    began_at = time.monotonic()
    filling = assembled.feed.filling()
    with memory.passing(len(filling.target)):
        compiled.warm_up(assembled.model, filling, tell)
    assembled.event("compiler done", elapsed_s=time.monotonic() - began_at)


def _log(run: Run, start: Start, state: State | None) -> MetricsLog:
    """Where rank 0 writes what happens, behind the steps that the run goes on from."""
    from raylway.train import sinks  # for rank 0 only: it takes a moment

    step = state.progress.step if state else 0
    log = MetricsLog(run, state.metrics_bytes if state else 0, sinks.all_of(run, step))
    if log.lost is not None:
        run.log(pace.CONTINUES, attempt=start.attempt, from_step=step, **msgspec.structs.asdict(log.lost))
    return log


def _searched(
    job: Job, plan: Plan, prepared: Prepared, module: nn.Module, precision: Precision, groups: Groups
) -> Plan:
    """The plan with the largest microbatch that fits on all ranks, up to the one it has."""
    device = next(module.parameters()).device
    task = prepared.manifest.transform.target.task

    def step(rows: Microbatch) -> None:
        with precision.autocast():
            output = module(rows.numeric, rows.categorical)
        (row_losses(task, output, rows.target) * rows.weight).sum().backward()

    feed = _training_feed(job, plan, prepared, _share(plan, groups), device)
    return memory.with_microbatch(plan, memory.agreed(module, plan.microbatch, feed.sample, step, groups))


def _share(plan: Plan, groups: Groups) -> Share:
    return Share(groups.data_rank, plan.data_ranks, plan.global_batch, plan.microbatch)


def _validation(
    job: Job, plan: Plan, prepared: Prepared, share: Share, groups: Groups, device: torch.device
) -> Validation | None:
    if plan.validate_every_steps is None:
        return None
    # Under `resample` training minimises what `weights` does, so validation weighs the classes under both.
    weights = _weights(prepared) if job.data.balance != "none" else None
    target, rows = prepared.manifest.transform.target, prepared.rows("validation", verify=True)
    order = Order([shard.rows for shard in prepared.shards("validation")], None)
    return Validation(Feed(rows, order, share, target, device, weights), target, groups, device)


def _training_feed(job: Job, plan: Plan, prepared: Prepared, share: Share, device: torch.device) -> Feed:
    target, rows = prepared.manifest.transform.target, prepared.rows("train", verify=True)
    order: Order | Balanced
    if job.data.balance == "resample":
        order = Balanced(rows.targets(), len(target.classes), job.seed)
    else:
        order = Order([shard.rows for shard in prepared.shards("train")], job.seed, plan.lanes)
    weights = _weights(prepared) if job.data.balance == "weights" else None
    return Feed(rows, order, share, target, device, weights)


def _weights(prepared: Prepared) -> np.ndarray:
    return balanced.weights(prepared.manifest.classes["train"])


def seeded_model(job: Job, prepared: Prepared) -> nn.Module:
    """The model with the initial weights that the job's seed gives it: the same on every rank and machine.

    Raises:
        UserError: From `registry.build`, or for layers that mix rows.
    """
    random.seed(job.seed)
    np.random.seed(job.seed)
    torch.manual_seed(job.seed)
    module = registry.build(job.model, prepared.manifest.transform)
    strategy.refuse_batch_norm(module)
    return module


class Wishes:
    """When a rank would like a checkpoint, has one written, and whether it was told to stop.

    Args:
        plan: How often.
        words: Each of them is the word to stop.
        checkpoints: Of this attempt.
        is_first: Rank 0 looks for all of this; every rank hears of the end of its own node.
    """

    def __init__(self, plan: Plan, words: Sequence[StopWord], checkpoints: Checkpoints, is_first: bool) -> None:
        self._plan, self._words, self._checkpoints, self._is_first = plan, words, checkpoints, is_first
        self._due_at = time.monotonic() + (plan.checkpoint_every_s or 0.0)

    def __call__(self, progress: Progress) -> Wish:
        """For the step after `progress`."""
        if not self._is_first:
            return Wish(stop=preemption.is_near())
        return Wish(
            save=self._save_is_due(progress.step + 1),
            stop=any(word.is_given() for word in self._words) or preemption.is_near(),
            settle=self._checkpoints.has_ended,
        )

    def _save_is_due(self, step: int) -> bool:
        if self._plan.checkpoint_every_steps is not None:
            return step % self._plan.checkpoint_every_steps == 0
        assert self._plan.checkpoint_every_s is not None
        due = time.monotonic() >= self._due_at
        if due:
            self._due_at = time.monotonic() + self._plan.checkpoint_every_s
        return due


def _no_event(event: str, **details: Any) -> None:
    pass


def _with_whole(run: Run, progress: Progress) -> Progress:
    """Without checkpoints that were damaged since: the next validation makes a new best, and until the next checkpoint
    is due there is no way back."""
    if not _is_whole(run, progress.best_checkpoint):
        progress = msgspec.structs.replace(progress, best=Best(), best_checkpoint="")
    return progress if _is_whole(run, progress.anchor) else msgspec.structs.replace(progress, anchor="")


def _is_whole(run: Run, name: str) -> bool:
    """Nothing is whole too."""
    try:
        if name:
            checkpoint.opened(run.checkpoints / name)
    except checkpoint.Broken:
        return False
    return True
