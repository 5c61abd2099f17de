"""The run directory, `<storage>/<job>/<run id>/`: its files by name, and the run record.

The run id follows from the resolved job and the prepared data, so the same command finds its run again.
"""

from __future__ import annotations

import datetime
import getpass
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
import xxhash

from raylway import __version__, storage
from raylway.errors import RunFailed, UserError
from raylway.job.load import LoadedJob
from raylway.runs import journal
from raylway.storage import Place

STAGES = ("prepare", "train", "evaluate", "bundle", "report")
_RECORD = "run.json"
_ASKED_AT_ONCE = 16
PREPARED = "prepared"
"""The folder of prepared data, beside those of the jobs."""


class StageRecord(msgspec.Struct, forbid_unknown_fields=True):
    status: Literal["running", "done", "failed", "interrupted"]
    started_at: str
    """UTC, ISO 8601."""
    elapsed_s: float = 0.0
    """Of the last attempt at the stage."""
    facts: dict[str, Any] = {}
    """What the stage wants remembered, such as the best step."""


class RunRecord(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    id: str
    job: str
    created_at: str
    fingerprint: str
    seed: int
    command: list[str]
    user: str
    host: str
    commit: str | None
    """Of the folder that holds the job file, with `+` when it has uncommitted changes."""
    versions: dict[str, str]
    stages: dict[str, StageRecord] = {}


# Looked up before there are threads: where several are the first to decode a type, msgspec 0.22 ends the process.
msgspec.json.Decoder(RunRecord)


class Run:
    """One run directory.

    Args:
        folder: `<storage>/<job>/<run id>`; of a bucket the two files of lines are segments (`journal`).
    """

    def __init__(self, folder: Place) -> None:
        self.folder = folder
        self.job = folder / "job.yaml"
        self.metrics = folder / "metrics.jsonl"
        """Written by rank 0 of training: `kind` is `step` or `validation`; one line a step, each step once."""
        self.events = folder / "events.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.evaluation = folder / "evaluation.json"
        self.predictions = folder / "predictions.parquet"
        self.bundle = folder / "bundle"
        self.staged_bundle = folder / "bundle.staged"
        """The bundle while it is being evaluated; renamed to `bundle` with its metrics."""
        self.report = folder / "report.html"

    @property
    def exists(self) -> bool:
        return (self.folder / _RECORD).exists()

    @property
    def record(self) -> RunRecord:
        return storage.read_record(self.folder / _RECORD, RunRecord)

    def is_done(self, stage: str) -> bool:
        found = self.record.stages.get(stage)
        return found is not None and found.status == "done"

    def create(self, loaded: LoadedJob, fingerprint: str) -> None:
        """Make the directory and its record; of one that is there only `job.yaml` is written anew."""
        if isinstance(self.folder, Path):
            self.folder.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(self.job, loaded.to_yaml())
        if self.exists:
            return
        record = RunRecord(
            format=1,
            id=self.folder.name,
            job=loaded.job.name,
            created_at=_now(),
            fingerprint=fingerprint,
            seed=loaded.job.seed,
            command=["raylway", *sys.argv[1:]],
            user=_user(),
            host=platform.node(),
            commit=_commit(loaded.folder),
            versions=_versions(),
        )
        storage.write_record(self.folder / _RECORD, record)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Record a stage from start to end; yields the facts to fill in. Called by the driver only."""
        started, clock = _now(), time.monotonic()
        facts: dict[str, Any] = {}
        self._set(name, StageRecord("running", started))
        try:
            yield facts
        except BaseException as error:
            status: Literal["failed", "interrupted"] = "failed" if isinstance(error, Exception) else "interrupted"
            with suppress(RunFailed):  # a bucket that is out of reach; what brought us here is told
                self._set(name, StageRecord(status, started, time.monotonic() - clock, facts))
            raise
        self._set(name, StageRecord("done", started, time.monotonic() - clock, facts))

    def add_prepare(self, elapsed_s: float, ray_s: float) -> None:
        """Record the stage that ends before there is a run, and how long Ray took to start or join before it; a resumed
        run keeps the first times, not the cache's."""
        if not self.is_done("prepare"):
            started = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=elapsed_s)
            self._set(
                "prepare", StageRecord("done", started.isoformat(timespec="milliseconds"), elapsed_s, {"ray_s": ray_s})
            )

    def log(self, event: str, **details: Any) -> None:
        """Append one line to events.jsonl. From any process; lines of several never mix."""
        journal.append(self.events, msgspec.json.encode({"time": _now(), "event": event, **details}) + b"\n")

    def _set(self, name: str, stage: StageRecord) -> None:
        record = self.record
        record.stages[name] = stage
        storage.write_record(self.folder / _RECORD, record)
        self.log(f"{name} {stage.status}", elapsed_s=round(stage.elapsed_s, 3))


def run_id(*parts: bytes) -> str:
    """Twelve hex digits that follow from what decides a run's result."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:12]


def all_runs(root: Place) -> list[Run]:
    """Runs of a storage folder, oldest first."""
    jobs = [job for job in storage.children(root) if job.name != PREPARED]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:  # of a bucket each question is a request
        runs = [Run(folder) for folders in pool.map(storage.children, jobs) for folder in folders]
        there = [run for run, exists in zip(runs, pool.map(_exists, runs), strict=True) if exists]
        began = list(pool.map(lambda run: run.record.created_at, there))
    return [run for _, _, run in sorted(zip(began, (str(run.folder) for run in there), there, strict=True))]


def find_run(root: Place, name: str, with_bundle: bool = False) -> Run:
    """The run that a person means: a folder, a run id (or its beginning), a job's name, or `latest`.

    Args:
        root: The storage folder.
        name: What the person typed.
        with_bundle: Of a job's runs and for `latest`, only those that have ended in a bundle count.

    Raises:
        UserError: There is none, or more than one.
    """
    if (named := Run(storage.place(name))).exists:
        return named
    runs = all_runs(root)
    usable = [run for run in runs if (run.bundle / "bundle.json").exists()] if with_bundle else runs
    if name == "latest":
        matches = usable[-1:]
    else:
        of_job = [run for run in usable if run.folder.parent.name == name]
        matches = of_job[-1:] or [run for run in runs if run.folder.name.startswith(name)]
    if len(matches) != 1:
        listed = ", ".join(f"{run.folder.parent.name}/{run.folder.name}" for run in runs[-8:]) or "none"
        raise UserError(
            "no such run" if not matches else "more than one run begins like this",
            where=name,
            expected=f"a run folder, a run id below {root}, a job's name, or 'latest'"
            + (", of a run that has finished" if with_bundle else ""),
            found=f"runs there: {listed}",
            fix="start one with: raylway run JOB, or name the folder with --storage",
        )
    return matches[0]


def _exists(run: Run) -> bool:
    return run.exists


def summary(run: Run) -> dict[str, str]:
    """One run in a line: when, which, how far."""
    record = run.record
    done = [stage for stage in STAGES if run.is_done(stage)]
    at = next((f"{name} {stage.status}" for name, stage in record.stages.items() if stage.status != "done"), "")
    status = "finished" if "report" in done else at or f"{done[-1]} done" if done or at else "not started"
    return {
        "created_at": record.created_at,
        "run": f"{record.job}/{record.id}",
        "status": status,
        "folder": str(run.folder),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container the user may have a number and no name
        return str(os.getuid())


def _versions() -> dict[str, str]:
    packages = ("ray", "torch", "numpy", "pyarrow", "scikit-learn", "safetensors")
    return {"raylway": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def _commit(folder: Path) -> str | None:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
