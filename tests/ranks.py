"""Training on bare torch processes: the real worker function over real gloo, without Ray.

The processes are forked from a server that has imported torch once, so a group of ranks starts in no time.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from made_prepared import make

from raylway.features.prepared import Prepared
from raylway.job.schema import Job
from raylway.runs import journal
from raylway.runs.run import Run
from raylway.storage import Place, buckets
from raylway.train import worker
from raylway.train.plan import Plan, plan

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "ranks"])


@dataclass
class Case:
    """One job on prepared rows, in a folder of its own."""

    folder: Place
    prepared: Prepared
    train: dict[str, Any]
    """The job's section."""
    model: dict[str, Any] = field(default_factory=dict)
    import_paths: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    """Further keys of the job's section."""
    seed: int = 42
    hang_limit_s: float = 240

    @property
    def run(self) -> Run:
        run = Run(self.folder)
        if isinstance(run.folder, Path):
            run.folder.mkdir(parents=True, exist_ok=True)
        return run

    @property
    def job(self) -> Job:
        return Job.model_validate(
            {
                "name": "case",
                "seed": self.seed,
                "data": {"source": "rows.csv", "target": self.prepared.manifest.signature.target, **self.data},
                "model": self.model,
                "train": self.train,
            }
        )

    def plan(self, workers: int | None) -> Plan:
        """None: what the job says of workers."""
        manifest = self.prepared.manifest
        given = {} if workers is None else {"workers": workers}
        return plan(
            self.job.model_copy(update={"train": self.job.train.model_copy(update=given)}),
            manifest.signature.task,
            manifest.account.train,
            manifest.account.validation,
            manifest.transform.num_numeric,
            len(manifest.transform.category_counts),
            0,
        )

    def assignment(self, workers: int | None, launch: str = "launch") -> dict[str, Any]:
        return worker.assignment(
            self.job, self.plan(workers), self.run, self.prepared, self.import_paths, launch, self.hang_limit_s
        )

    def steps(self) -> list[dict[str, Any]]:
        """The step lines of metrics.jsonl."""
        return self.lines("step")

    def validations(self) -> list[dict[str, Any]]:
        """The validation lines."""
        return self.lines("validation")

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Those of one kind."""
        lines = [msgspec.json.decode(line) for line in journal.read(self.run.metrics).splitlines()]
        return [line for line in lines if line["kind"] == kind]

    def weights(self, checkpoint: str) -> dict[str, np.ndarray]:
        from raylway.train.checkpoint import load_model

        return {name: tensor.numpy() for name, tensor in load_model(self.run.checkpoints / checkpoint).items()}


def table(rows: int, seed: int = 0) -> pa.Table:
    """Two numbers, a category, and a label that follows from them."""
    draw = np.random.default_rng(seed)
    u, v = draw.normal(size=rows), draw.normal(size=rows)
    kind = np.array(["a", "b", "c"])[draw.integers(0, 3, rows)]
    label = np.where(u + v + (kind == "a") > 0, "yes", "no")
    label[:2] = ["yes", "no"]
    return pa.table({"u": u, "v": v, "kind": kind, "label": label})


def prepared(folder: Path, train: int, validation: int = 0, target: str = "label") -> Prepared:
    """Rows as `table` makes them; with target `v` it is a regression."""
    splits = {"train": table(train, 1), "validation": table(max(2, validation), 2), "test": table(2, 3)}
    splits["validation"] = splits["validation"].slice(0, validation)
    if target != "label":
        splits = {name: part.drop_columns(["label"]) for name, part in splits.items()}
    return make(folder, splits, target)


class Ranks:
    """The processes of one group.

    Args:
        assignments: Done one after the other by every rank.
        workers: How many ranks.
        folder: For the rendezvous.
        exact: Our own model computes in float64.
        setup: Called first on every rank.
    """

    def __init__(
        self,
        assignments: list[dict[str, Any]],
        workers: int,
        folder: Path,
        exact: bool = False,
        setup: Callable[[], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        store = f"file://{folder}/rendezvous-{uuid.uuid4().hex}"
        self._pipes, self.processes = [], []
        for rank in range(workers):
            mine, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(
                target=_rank, args=(assignments, rank, workers, store, theirs, exact, setup), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self.processes.append(process)

    def results(self, timeout_s: float = 120) -> list[list[Any]]:
        """For each rank its reports; an exception's text instead of the report where one was raised, `None` where the
        process died."""
        found: list[list[Any]] = []
        deadline = time.monotonic() + timeout_s
        for pipe, process in zip(self._pipes, self.processes, strict=True):
            try:
                assert pipe.poll(max(0.0, deadline - time.monotonic())), "a rank hangs"
                found.append(pipe.recv())
            except EOFError:
                found.append([None])
            process.join(30)
        return found


def run(*assignments: dict[str, Any], workers: int, folder: Path, exact: bool = False) -> list[list[worker.Report]]:
    """Do the assignments on a fresh group; for each rank its reports."""
    results = Ranks(list(assignments), workers, folder, exact).results()
    assert all(isinstance(report, dict) for reports in results for report in reports), results
    return [[msgspec.convert(report, worker.Report) for report in reports] for reports in results]


def done(case: Case, workers: int = 1, launch: str = "launch") -> worker.Report:
    """Train a case to its end; every rank must report the same."""
    reports = [mine[0] for mine in run(case.assignment(workers, launch), workers=workers, folder=case.folder)]
    assert all(report.failure is None for report in reports), reports[0].failure
    assert len({(report.step, report.updates, report.best_step) for report in reports}) == 1
    return reports[0]


def reach(variables: dict[str, str]) -> None:
    """A setup: a bucket by the variables of the environment; this rank gives it up after two seconds."""
    os.environ.update(variables)
    buckets.GIVE_UP_AFTER_S = 2.0


def _rank(
    assignments: list[dict[str, Any]],
    rank: int,
    workers: int,
    store: str,
    pipe: Any,
    exact: bool,
    setup: Callable[[], None] | None,
) -> None:
    import torch
    import torch.distributed as dist

    if setup:
        setup()
    if exact:
        torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)
    reports: list[Any] = []
    for assignment in assignments:
        try:
            reports.append(worker.work(assignment))
        except Exception as error:  # noqa: BLE001 - the test judges it
            reports.append(f"{type(error).__name__}: {error}")
            break
    pipe.send(reports)
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()
