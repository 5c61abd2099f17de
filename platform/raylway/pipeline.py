"""The stages of a job in their order, and the record that lets the same command go on where it stopped."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from raylway import storage
from raylway.data import engine
from raylway.data import prepare as data_prepare
from raylway.job.load import LoadedJob
from raylway.runs.hold import hold
from raylway.runs.progress import Reporter
from raylway.runs.run import PREPARED, STAGES, Run, run_id
from raylway.storage import Place

if TYPE_CHECKING:
    import ray

    from raylway.features.prepared import Prepared
    from raylway.launch.capacity import Capacity

_FREE_TO_CHANGE: Any = {"storage": True, "serve": True, "train": {"workers", "resources", "parallel", "checkpoint"}}
"""Keys that may differ between two starts of one run: they change where and how it runs, not its result's meaning."""


def run(loaded: LoadedJob, reporter: Reporter, last: str = "report") -> Run | None:
    """Do every unfinished stage of a job, up to and including `last`.

    Args:
        loaded: The job.
        reporter: Where progress goes.
        last: One of `runs.run.STAGES`.

    Returns:
        The run; None when `last` is `prepare`, which makes no run.

    Raises:
        UserError: Something that the user can fix.
        RunFailed: The run can't end well although the job is well formed.
    """
    root = storage.prepare_root(loaded.job.storage)
    wanted = STAGES[: STAGES.index(last) + 1]
    fingerprint = data_prepare.fingerprint(loaded, root)
    found = Run(root / loaded.job.name / _id(loaded, fingerprint))
    if _is_finished(found, wanted, root / PREPARED / fingerprint):
        reporter.note(f"{loaded.job.name}: run {found.folder.name} is finished; nothing to do. Results: {found.folder}")
        return found
    from raylway.launch import start
    from raylway.launch.check import check

    check(loaded)
    prepared, prepare_s = None, 0.0
    if start.is_embedded() and engine.is_enough_here():
        # Ray has nothing to do yet, and what is wrong with the data is told before the 4 s that it takes to start.
        prepared, prepare_s = _prepared(loaded, root, reporter, here=True)
        if last == "prepare":
            return None
    ahead = () if last == "prepare" else ("torch",)
    began_at = time.monotonic()
    with start.connect(reporter, loaded.import_paths, ahead) as capacity:
        ray_s = time.monotonic() - began_at
        if isinstance(root, Path):
            capacity.require_shared(root)
        if prepared is None:
            here = capacity.is_one_machine and capacity.cpus <= engine.MOST_THREADS
            prepared, prepare_s = _prepared(loaded, root, reporter, here)
        if last == "prepare":
            return None
        found.create(loaded, fingerprint)
        with hold(found.folder):
            found.add_prepare(prepare_s, ray_s)
            work = Work(loaded, found, prepared, capacity, reporter, last)
            for stage in wanted[1:]:
                if not found.is_done(stage):
                    _STAGES[stage](work)
    return found


def _prepared(loaded: LoadedJob, root: Place, reporter: Reporter, here: bool) -> tuple[Prepared, float]:
    """The prepared data, made by threads of this process if `here` and by Ray otherwise; and how long it took."""
    began_at = time.monotonic()
    prepared = data_prepare.prepare(loaded, root, reporter, engine.ALL if here else None)
    return prepared, time.monotonic() - began_at


@dataclass
class Work:
    """What every stage needs."""

    loaded: LoadedJob
    run: Run
    prepared: Prepared
    capacity: Capacity
    reporter: Reporter
    last: str
    """The stage after which to stop."""
    boosting: ray.ObjectRef | None = None
    """The gradient-boosting baseline, fitted while the training workers start."""


def _train(work: Work) -> None:
    from raylway.evaluate import baselines
    from raylway.train import trainer

    with work.run.stage("train") as facts:
        if work.last != "train":
            work.boosting = baselines.start(work.prepared, work.loaded.job.seed)
        outcome = trainer.train(work.loaded, work.run, work.prepared, work.capacity, work.reporter)
        facts.update(msgspec.to_builtins(outcome))


def _evaluate(work: Work) -> None:
    from raylway.bundle import artefact
    from raylway.evaluate import evaluate
    from raylway.models.registry import spec
    from raylway.train import checkpoint

    run = work.run
    with run.stage("evaluate") as facts:
        weights = checkpoint.load_model(run.checkpoints / run.record.stages["train"].facts["best_checkpoint"])
        artefact.stage(run.staged_bundle, weights, spec(work.loaded.job.model), work.prepared.manifest, run.record)
        found = evaluate.evaluate(run, work.prepared, run.staged_bundle, work.reporter, work.boosting)
        facts.update(found.metrics)


def _bundle(work: Work) -> None:
    from raylway.bundle import artefact

    with work.run.stage("bundle"), work.reporter.stage("bundle") as shown:
        metrics = work.run.record.stages["evaluate"].facts
        artefact.publish(work.run.staged_bundle, work.run.bundle, metrics)
        shown.finish(str(work.run.bundle))


def _report(work: Work) -> None:
    from raylway.report import report

    with work.run.stage("report"), work.reporter.stage("report") as shown:
        shown.finish(str(report.write(work.run, work.prepared)))


_STAGES = {"train": _train, "evaluate": _evaluate, "bundle": _bundle, "report": _report}


def _id(loaded: LoadedJob, fingerprint: str) -> str:
    from raylway.models.registry import source

    meaning = loaded.job.model_dump_json(by_alias=True, exclude=_FREE_TO_CHANGE)
    return run_id(meaning.encode(), fingerprint.encode(), source(loaded.job.model.kind))


def _is_finished(run: Run, wanted: tuple[str, ...], prepared: Place) -> bool:
    if wanted == ("prepare",) or not (prepared / "manifest.json").exists() or not run.exists:
        return False
    return all(run.is_done(stage) for stage in wanted[1:])
