"""The driver's side of training: starts the workers through Ray Train, shows how far they are, and ends as they did.

Ray Train restarts the group after a fault of a machine; all else about checkpoints and resuming is ours (`checkpoint`,
`worker`). Each command makes a Ray Train run of its own in a scratch folder, so a broken one of Ray's can't stop us.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec

from raylway import storage
from raylway.errors import RunFailed, UserError
from raylway.features.prepared import Prepared
from raylway.job.load import LoadedJob, located
from raylway.runs import starts
from raylway.runs.progress import Reporter, Stage
from raylway.runs.run import Run
from raylway.runs.stop import StopWord
from raylway.train import failures, memory, resizing, watchdog, worker
from raylway.train.failures import Failure
from raylway.train.feed import balanced
from raylway.train.follow import Follower, Waiting
from raylway.train.plan import Plan, plan

_LOOK_EVERY_S = 0.2
_STOP_WITHIN_S = 60.0


class Capacity(Protocol):
    """What the trainer asks of the cluster; `launch.capacity.Capacity` is one."""

    @property
    def gpus(self) -> float: ...

    def refuse_impossible(self, workers: int, cpus: float, gpus: float) -> None: ...

    def free(self) -> tuple[float, float]: ...


class TrainOutcome(msgspec.Struct, frozen=True):
    best_step: int
    best_value: float | None
    """Of the job's metric; None without validation rows."""
    best_checkpoint: str
    """Name of the folder below `checkpoints` whose weights go into the bundle."""
    last_step: int
    last_checkpoint: str
    updates: int
    skipped: int
    """fp16 steps whose gradient overflowed."""
    stopped_early: bool
    attempts: int
    """Starts of the worker group, over all commands."""
    elapsed_s: float
    """Of this command."""
    plan: Plan
    rolled_back: str | None = None
    """When and where, if the job guards against spikes of the loss."""
    balance: str | None = None
    """What `data.balance` made of the largest and the smallest class; of all classes see the event."""
    resized: str | None = None
    """Each change of the number of workers, over all commands."""


def train(loaded: LoadedJob, run: Run, prepared: Prepared, capacity: Capacity, reporter: Reporter) -> TrainOutcome:
    """Train the job's model to the end, from the run's newest checkpoint if there is one.

    Args:
        loaded: The job.
        run: Where checkpoints and metrics are written; every worker must see the folder.
        prepared: The rows.
        capacity: Of the connected cluster.
        reporter: Shows step, loss, rate, learning rate and the remaining time.

    Raises:
        UserError: The job asks for what can't be, or the user's own model raised something.
        RunFailed: The loss is not finite, or the workers failed again and again.
        KeyboardInterrupt: After the checkpoint of the step at hand was written.
        SystemExit: Likewise, on SIGTERM.
    """
    started_at = time.monotonic()
    with reporter.stage("train") as stage, located(loaded):
        planned = _planned(loaded, prepared, capacity)
        _check_model(loaded, prepared)
        balance = _balanced(loaded, run, prepared)
        reporter.note("; ".join(filter(None, [_sentence(planned), balance, _beginning(run)])))
        assigned = worker.assignment(
            loaded.job, planned, run, prepared, loaded.import_paths, secrets.token_hex(6), watchdog.limit_s()
        )
        report = _run(assigned, planned, run, capacity, stage, reporter)
        if report.failure is not None:
            raise report.failure.as_error()
        outcome = TrainOutcome(
            best_step=report.best_step,
            best_value=report.best_value,
            best_checkpoint=report.best_checkpoint,
            last_step=report.step,
            last_checkpoint=report.last_checkpoint,
            updates=report.updates,
            skipped=report.skipped,
            stopped_early=report.stopped_early,
            attempts=failures.attempts(run),
            elapsed_s=time.monotonic() - started_at,
            plan=memory.with_microbatch(planned, report.microbatch),
            rolled_back="; ".join(report.rolled_back) or None,
            balance=balance,
            resized="; ".join(resizing.history(run)) or None,
        )
        stage.finish(_summary(outcome, loaded))
    return outcome


def _planned(loaded: LoadedJob, prepared: Prepared, capacity: Capacity) -> Plan:
    manifest = prepared.manifest
    planned = plan(
        loaded.job,
        manifest.signature.task,
        manifest.account.train,
        manifest.account.validation,
        manifest.transform.num_numeric,
        len(manifest.transform.category_counts),
        capacity.gpus,
    )
    capacity.refuse_impossible(planned.needed_workers, planned.cpus_per_worker, planned.gpus_per_worker)
    return planned


def _balanced(loaded: LoadedJob, run: Run, prepared: Prepared) -> str | None:
    """Record what `data.balance` makes of each class, and say it of two."""
    balance, manifest = loaded.job.data.balance, prepared.manifest
    if balance == "none":
        return None
    found = balanced.shares(balance, manifest.signature.classes, manifest.classes["train"])
    run.log("classes balanced", by=balance, classes=msgspec.to_builtins(found))
    return balanced.sentence(balance, found)


def _check_model(loaded: LoadedJob, prepared: Prepared) -> None:
    """Build the user's own model here once: a mistake in it shows now and not after the workers have started."""
    if loaded.job.model.kind == "mlp":
        return
    from raylway.train.assemble import seeded_model

    try:
        seeded_model(loaded.job, prepared)
    except UserError:
        raise
    except Exception as error:
        error = memory.as_users(error)
        mistake = error if isinstance(error, UserError) else failures.users_mistake(error, loaded.import_paths)
        if mistake is None:
            raise
        raise mistake from None


def _run(
    assigned: dict[str, Any], planned: Plan, run: Run, capacity: Capacity, stage: Stage, reporter: Reporter
) -> worker.Report:
    """Run the workers in a thread, so that this one can show progress and hear Ctrl-C and SIGTERM."""
    stop = StopWord(run.folder)
    stop.take_back()
    fitting = _Fit(assigned, planned, run)
    follower, waiting = Follower(run, planned, stage, reporter), Waiting(run, planned, capacity.free, reporter)
    try:
        fitting.start()
        while not fitting.ended.wait(_LOOK_EVERY_S):
            follower.look()
            waiting.look()
    except (KeyboardInterrupt, SystemExit) as signal:
        word = "Ctrl-C" if isinstance(signal, KeyboardInterrupt) else "SIGTERM"
        reporter.note(f"stopping: a checkpoint is written first; {word} again stops at once")
        stop.give()
        fitting.ended.wait(_STOP_WITHIN_S)
        raise
    finally:
        fitting.is_left.set()
        with suppress(RunFailed):  # a bucket that is out of reach; a start takes it back too
            stop.take_back()
    return fitting.report()


class _Fit(threading.Thread):
    """`fit` of Ray Train; in the main thread it would take over Ctrl-C and exit with 0."""

    def __init__(self, assigned: dict[str, Any], planned: Plan, run: Run) -> None:
        super().__init__(name="fit", daemon=True)
        self._assigned, self._planned = assigned, planned
        self._run = run
        self._value: Any = None
        self._error: Exception | None = None
        self.is_left = threading.Event()
        """The command ends, and Ray with it: no more starts."""
        self.ended = threading.Event()
        """To wait for instead of `join`: a join that Ctrl-C breaks off takes the thread for ended (Python 3.11)."""

    def run(self) -> None:
        try:
            while self._value is None:
                self._value = self._fit_once()
        except Exception as error:  # noqa: BLE001 - raised again in the main thread
            self._error = error
        finally:
            self.ended.set()

    def report(self) -> worker.Report:
        if self._error is not None:
            raise RunFailed(f"Ray Train ended the run: {failures.of_a_process(self._error)}") from self._error
        return msgspec.convert(self._value, worker.Report)

    def _fit_once(self) -> Any:
        """What the workers return; None if Ray Train's own processes were lost, and all is to be started again."""
        before = failures.latest(self._run)
        try:
            # Ray Train's own folder; nothing of value is ever in it.
            with storage.scratch(self._run.folder, "ray-train") as scratch:
                return self._fit(scratch)
        except Exception as error:
            attempt = failures.latest(self._run)
            # Each start is counted, and refused if there are too many without progress; without one nothing is.
            if attempt == before or self.is_left.is_set():
                raise
            failures.record(self._run, Failure(attempt, -1, "lost", [failures.of_a_process(error)]))
            return None

    def _fit(self, scratch: Path) -> Any:
        # By its own place: to mypy `ray.train` shows the classes of the version before.
        from ray.train.v2.api.config import FailureConfig, RunConfig

        from raylway.train import elastic
        from raylway.train.group import Group
        from raylway.train.milestones import Milestones
        from raylway.train.strategy import TIMEOUT_OVER_LIMIT
        from raylway.train.witness import Witness

        planned = self._planned
        trainer = elastic.Trainer(
            self._run.folder,
            worker.work,
            train_loop_config=self._assigned,
            backend_config=Group(
                # A torch without NCCL refuses to hear of it.
                backend="cpu:gloo,cuda:nccl" if planned.gpus_per_worker else "gloo",
                timeout_s=math.ceil(TIMEOUT_OVER_LIMIT * self._assigned["hang_limit_s"]),
            ),
            scaling_config=elastic.scaling(planned),
            run_config=RunConfig(
                name=secrets.token_hex(6),
                storage_path=str(scratch),
                # Without end here: `failures.begin` ends a run that makes no progress, and knows why.
                failure_config=FailureConfig(max_failures=-1),
                callbacks=[
                    Witness(str(self._run.folder)),
                    Milestones(str(self._run.folder)),  # type: ignore[list-item]  # it takes internal ones too
                ],
                # Else DDP's advice about find_unused_parameters, which is set for another reason, at each start.
                worker_runtime_env={"env_vars": {"TORCH_CPP_LOG_LEVEL": "ERROR"}},
            ),
        )
        self._run.log(starts.FIT)
        return trainer.fit().return_value  # type: ignore[attr-defined]  # likewise


def _sentence(planned: Plan) -> str:
    each = "GPU" if planned.gpus_per_worker else "CPU"
    size = max(planned.gpus_per_worker, planned.cpus_per_worker if each == "CPU" else 0)
    return (
        f"training: {planned.total_steps:,} steps ({planned.epochs:.4g} epochs) of {planned.global_batch:,} rows, "
        f"{planned.group} worker{'s' * (planned.workers > 1)} x {size} {each}, microbatch {planned.microbatch:,} x "
        f"{planned.accumulation}, {planned.precision}"
    )


def _beginning(run: Run) -> str:
    """Said before the workers start, which takes about ten seconds."""
    from raylway.train import checkpoint

    found = checkpoint.newest(run, {}, verify=False)
    return f"going on from step {found.manifest.step:,} ({found.folder.name})" if found else "starting the workers"


def _summary(outcome: TrainOutcome, loaded: LoadedJob) -> str:
    text = f"{outcome.last_step:,} steps"
    if outcome.skipped:
        text += f", {outcome.skipped} skipped"
    if outcome.best_value is not None:
        text += f", best {loaded.job.train.validation.best} {outcome.best_value:.4g} at step {outcome.best_step:,}"
    if outcome.stopped_early:
        text += ", stopped early"
    return text + (f", {outcome.attempts} starts" if outcome.attempts > 1 else "")
