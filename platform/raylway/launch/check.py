"""What a job comes to before anything starts: every inferred and derived value, without Ray and torch.

`raylway check` prints it, and `raylway run` makes the same checks first, so that a mistake is told at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from raylway.data import sources
from raylway.data.report import Reported
from raylway.data.sources import Sample
from raylway.job.load import LoadedJob, located
from raylway.launch.capacity import Capacity, Node
from raylway.models import registry
from raylway.train.plan import Plan, plan


@dataclass(frozen=True)
class Findings:
    """What `check` found: the data as its first rows show it, and the plan that follows."""

    loaded: LoadedJob
    sample: Sample
    plan: Plan

    def as_dict(self) -> dict[str, Any]:
        """For machines: `job`, `data` and `plan`."""
        return {
            "job": self.loaded.job.model_dump(mode="json", by_alias=True),
            "data": msgspec.to_builtins(self.sample),
            "plan": msgspec.to_builtins(self.plan),
        }

    def as_text(self, whole_report: bool = False) -> str:
        """For people; of the columns in a few words, or the whole report."""
        parts = [self._data(whole_report), self._model(), self._training(), self._serving(), self._storing()]
        return "\n\n".join(text for part in parts if (text := "\n".join(part)))

    def _data(self, whole_report: bool) -> Iterator[str]:
        data = self.sample
        about = "" if data.exact else "about "
        yield from _columns(data, whole_report)
        for decision in data.decisions:
            yield f"  {decision}"
        for warning in data.warnings:
            yield f"  warning: {warning}"
        yield f"task        {data.task} of {data.target!r}" + (f": {', '.join(data.classes)}" if data.classes else "")
        yield f"split       {about}{data.train:,} training, {data.validation:,} validation, {data.test:,} test"

    def _model(self) -> Iterator[str]:
        model = self.loaded.job.model
        dates = f" and {len(self.sample.date)} date" if self.sample.date else ""
        inputs = f"{len(self.sample.numeric)} numeric and {len(self.sample.categorical)} categorical{dates} features"
        shape = f"hidden {model.hidden}, dropout {model.dropout:g}" if model.kind == "mlp" else f"args {model.args}"
        about = "" if self.sample.fitted == self.sample.rows else "about "
        widths = f"{about}{self.sample.numbers:,} numbers and {self.sample.codes:,} codes for a row"
        yield f"model       {model.kind} ({shape}) over {inputs}: {widths}"

    def _training(self) -> Iterator[str]:
        found, job = self.plan, self.loaded.job.train
        size = f"{found.cpus_per_worker} CPU" + (f" and {found.gpus_per_worker} GPU" if found.gpus_per_worker else "")
        room = ", as many as there is room for" if found.fewest_workers else ""
        yield f"workers     {found.group} with {size} each{room}, {found.precision}{', compiled' * found.compile}"
        yield f"parallel    {found.division}"
        sharing = f"groups of {found.division.sharers}" if found.division.sharers > 1 else "workers"
        among = f"{found.group} workers x at most" if found.fewest_workers else f"{found.data_ranks} {sharing} x"
        yield (
            f"step        global batch {found.global_batch:,} = {among} {found.accumulation} "
            f"microbatches of at most {found.microbatch:,} rows"
        )
        yield f"length      {found.total_steps:,} steps = {found.epochs:g} epochs of {found.steps_per_epoch:,} steps"
        yield (
            f"optimizer   {job.optimizer.kind}, lr {job.optimizer.lr:g}, {job.schedule.kind} schedule"
            f" with {found.warmup_steps} steps of warm-up, clip {job.clip}"
            + (f", averaged with {job.optimizer.ema:g}" if job.optimizer.ema else "")
            + (f", {job.optimizer.spike.then} at a spike" if job.optimizer.spike.then != "ignore" else "")
        )
        if self.loaded.job.data.balance == "weights":
            yield "balance     the loss of a row weighs rows / (classes x rows of its class)"
        if self.loaded.job.data.balance == "resample":
            drawn = self.sample.train // max(1, len(self.sample.classes))
            yield f"balance     an epoch draws about {drawn:,} rows of each of {len(self.sample.classes)} classes"
        patience = f", stop after {job.validation.patience} without a better one" if job.validation.patience else ""
        every = f"{found.validate_every_steps:,} steps" if found.validate_every_steps else "never (no validation rows)"
        yield f"validation  every {every}, best by {job.validation.best}{patience}"
        often = f"{found.checkpoint_every_steps:,} steps" if found.checkpoint_every_steps else job.checkpoint.every
        yield f"checkpoint  every {often}, the newest {job.checkpoint.keep} and the best are kept"

    def _serving(self) -> Iterator[str]:
        serve = self.loaded.job.serve
        yield f"serving     {serve.replicas.min} to {serve.replicas.max} replicas, up to {serve.max_batch} rows a batch"

    def _storing(self) -> Iterator[str]:
        """Of a bucket, what is copied of it."""
        if "://" in self.loaded.job.storage:
            data = self.sample
            rows, row_bytes = data.train + data.validation + data.test, 4 * (data.numbers + data.codes) + 16
            about = "" if data.exact else "about "
            yield f"cache       {about}{1e-9 * rows * row_bytes:.2g} GB of shards, on each machine those of its workers"


def _columns(data: Sample, whole: bool) -> Iterator[str]:
    """The column report: a line a column, as wide as its widest cells; the first cells of each line, or all."""
    rows = [("column", "type", "role", "different", "missing", "range or examples", "why")]
    for column in data.columns:
        different = f"{'' if column.distinct_is_exact else '~'}{column.distinct:,}"
        missing = f"{column.missing / column.rows:.1%}" if column.missing else "-"
        rows.append((column.name, column.type, column.role, different, missing, _held(column), column.why))
    widths = [max(len(row[place]) for row in rows) for place in range(6)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, (*widths, 0), strict=True)]
        yield "  " + "  ".join(cells if whole else cells[:5]).rstrip()


def _held(column: Reported) -> str:
    """What stands in a column, in at most 40 characters."""
    if column.mean is not None and column.minimum is not None:
        text = f"{column.minimum:.6g} to {column.maximum:.6g}, mean {column.mean:.4g}"
    else:
        text = ", ".join(list(column.frequent) or column.examples)
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= 40 else text[:37] + "..."


def check(loaded: LoadedJob) -> Findings:
    """Look at a job's data, model and workers without starting anything.

    Against a cluster (`RAY_ADDRESS`) the number of workers can't be judged here; `run` does it once connected.

    Raises:
        UserError: Whatever is wrong and can be seen from here.
    """
    with located(loaded):
        registry.source(loaded.job.model.kind)
        sample = sources.sample(loaded)
        machine = _machine()
        found = plan(
            loaded.job,
            sample.task,
            sample.train,
            sample.validation,
            sample.numbers,
            sample.codes,
            machine.gpus if machine else 0,
        )
        if machine:
            machine.refuse_impossible(found.needed_workers, found.cpus_per_worker, found.gpus_per_worker)
    return Findings(loaded, sample, found)


def _machine() -> Capacity | None:
    """What an embedded Ray would have; None when the job will run on a cluster, which can't be known from here."""
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        return None
    cpus, gpus = len(os.sched_getaffinity(0)), len(list(Path("/dev").glob("nvidia[0-9]*")))
    return Capacity([Node("this machine", cpus, gpus)])
