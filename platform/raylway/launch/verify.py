"""`raylway verify-resume`: proof that a job killed at random steps ends where the unbroken one does, to the last bit.

The job is trained twice by the same command that users give, on the same prepared data: once whole, once with SIGKILL
sent to the command at random steps and the command given again each time. Compared are the rows of every global batch
(as `train.feed.loader` has read them), every loss, rate and gradient norm, and the last checkpoint's weights and
optimizer state.
"""

from __future__ import annotations

import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import xxhash

from raylway import pipeline, storage
from raylway.errors import RunFailed, UserError
from raylway.job.load import LoadedJob
from raylway.runs.progress import Reporter, Stage
from raylway.runs.run import PREPARED, Run, all_runs

if TYPE_CHECKING:
    import torch

_SAVES = 10
"""Checkpoints in the whole of training, so that a resumed run goes on from somewhere."""
_LOOK_EVERY_S = 0.01
_FIGURES = {"global batches": "batch", "losses": "loss", "learning rates": "lr", "gradient norms": "grad_norm"}
_LAST_KILL = 0.9
"""Share of the steps before which kills are aimed: the rest is there to be resumed."""
_TAIL_BYTES = 1 << 14
_GONE_S = 4.0
"""After a SIGKILL of its driver an embedded Ray ends within 3 s."""


class Kill(msgspec.Struct, frozen=True):
    """One SIGKILL."""

    aimed_at: int
    step: int
    """The last step in the metrics when the command was gone."""
    resumed_from: int
    """The step of the checkpoint that the next command went on from; 0 for the start."""


class Compared(msgspec.Struct, frozen=True):
    """One kind of thing in both trainings."""

    what: str
    count: int
    different: int
    first: str = ""
    """Where the first difference is, and both values."""


class Verification(msgspec.Struct, frozen=True):
    """What came out."""

    steps: int
    kills: list[Kill]
    compared: list[Compared]

    @property
    def passed(self) -> bool:
        return not any(each.different for each in self.compared)

    def as_text(self) -> str:
        """A table of the comparisons, and where the kills were."""
        lines = [f"{'compared':<22}{'count':>10}{'different':>12}  first difference"]
        lines += [f"{each.what:<22}{each.count:>10,}{each.different:>12,}  {each.first}" for each in self.compared]
        lines += [f"killed after step {kill.step:,}, resumed from step {kill.resumed_from:,}" for kill in self.kills]
        verdict = "equal to the last bit" if self.passed else "NOT equal"
        return "\n".join([*lines, f"{self.steps:,} steps, killed {len(self.kills)} times: {verdict}"])


def verify_resume(
    loaded: LoadedJob, job: Path, overrides: list[str], kills: int, seed: int | None, reporter: Reporter
) -> Verification:
    """Train a job whole and broken, and compare.

    Args:
        loaded: The job with its overrides.
        job: Its file as the user named it.
        overrides: `KEY=VALUE`, as the user gave them.
        kills: How often the second training is killed.
        seed: For the steps at which it is; drawn and shown if left out.
        reporter: Where progress goes.

    Raises:
        UserError: The job is wrong, or trains for too few steps.
        RunFailed: A training fails, or ends before it could be killed.
    """
    root = storage.prepare_folder(loaded.job.storage)
    pipeline.run(loaded, reporter, "prepare")
    with storage.scratch_folder(root, "verify-resume") as folder:
        whole = _Training(folder / "whole", root, job, overrides)
        with reporter.stage("whole") as stage:
            whole.run_to_end(stage)
            steps = whole.last_step()
            stage.finish(f"{steps:,} steps")
        if steps < 2 * (kills + 1):
            raise UserError(
                "the training is too short to be killed",
                where=loaded.location("train.for"),
                expected=f"at least {2 * (kills + 1)} steps for {kills} kills",
                found=f"{steps} steps",
                fix="train for longer, or ask for fewer --kills",
            )
        seed = secrets.randbelow(1 << 32) if seed is None else seed
        reporter.note(f"kills are drawn with --seed {seed}")
        aims = sorted(random.Random(seed).sample(range(1, max(2 + kills, int(_LAST_KILL * steps))), kills))
        every = f"train.checkpoint.every={-(-steps // _SAVES)} steps"
        broken = _Training(folder / "broken", root, job, [*overrides, every])
        done = []
        with reporter.stage("broken") as stage:
            for aim in aims:
                step = broken.run_and_kill(aim, stage)
                done.append(Kill(aim, step, broken.newest_step()))
            broken.run_to_end(stage)
            stage.finish(f"killed after the steps {', '.join(str(kill.step) for kill in done)}")
        return Verification(steps, done, list(_compared(whole.trained, broken.trained)))


class _Training:
    """One of the two: `raylway train` with a storage folder of its own and the prepared data of the other.

    Args:
        folder: Its storage folder, made here.
        root: The job's own, where the prepared data is.
        job: The job file.
        overrides: Of the command.
    """

    def __init__(self, folder: Path, root: Path, job: Path, overrides: list[str]) -> None:
        folder.mkdir()
        (folder / PREPARED).symlink_to(root / PREPARED)
        self._folder = folder
        words = [word for each in [*overrides, f"storage={folder}"] for word in ("--set", each)]
        self._command = [sys.executable, "-m", "raylway", "train", str(job), *words, "--json"]
        self._log = folder / "log"

    @property
    def trained(self) -> Run:
        (run,) = all_runs(self._folder)
        return run

    def run_to_end(self, stage: Stage) -> None:
        """Give the command and wait.

        Raises:
            RunFailed: It failed; with what it said last.
        """
        with self._started() as process:
            while process.poll() is None:
                self._show(stage)
                time.sleep(_LOOK_EVERY_S)
        if process.returncode:
            raise RunFailed(f"`raylway train` ended with {process.returncode}: {self._said()}")

    def run_and_kill(self, step: int, stage: Stage) -> int:
        """Give the command, send SIGKILL once a step is made, and wait until Ray is gone; returns the last step made.

        Raises:
            RunFailed: The command ended by itself before.
        """
        with self._started() as process:
            while self.last_step() < step and process.poll() is None:
                self._show(stage)
                time.sleep(_LOOK_EVERY_S)
            process.kill()
        if process.returncode != -signal.SIGKILL:
            raise RunFailed(
                f"`raylway train` ended with {process.returncode} before it could be killed at step {step}: "
                f"{self._said()}"
            )
        time.sleep(_GONE_S)
        return self.last_step()

    def last_step(self) -> int:
        """The last step in the metrics; 0 before the first."""
        for run in all_runs(self._folder):
            if size := storage.size(run.metrics):
                tail = storage.read_range(run.metrics, max(0, size - _TAIL_BYTES), size)
                lines = _lines(tail.partition(b"\n")[2])
                return next((line["step"] for line in reversed(lines) if line["kind"] == "step"), 0)
        return 0

    def newest_step(self) -> int:
        """The step of the newest whole checkpoint; 0 for none."""
        from raylway.train import checkpoint

        found = checkpoint.newest(self.trained, {})
        return found.manifest.step if found else 0

    @contextmanager
    def _started(self) -> Iterator[subprocess.Popen[bytes]]:
        with self._log.open("wb") as log:
            process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                yield process
            except BaseException:
                process.send_signal(signal.SIGINT)
                raise
            finally:
                process.wait()

    def _show(self, stage: Stage) -> None:
        step = self.last_step()
        if step:
            stage.update(step, None, "steps")

    def _said(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return " ".join(lines[-3:])[-2000:]


def _lines(text: bytes) -> list[dict[str, Any]]:
    """The whole lines of metrics."""
    return [msgspec.json.decode(line) for line in text.rpartition(b"\n")[0].splitlines()]


def _compared(whole: Run, broken: Run) -> Iterator[Compared]:
    from raylway.train import checkpoint

    logs = [_lines(run.metrics.read_bytes()) for run in (whole, broken)]
    steps = [[line for line in lines if line["kind"] == "step"] for lines in logs]
    yield _difference("steps, each once", *({place: line["step"] for place, line in enumerate(each)} for each in steps))
    for what, key in _FIGURES.items():
        yield _difference(what, *({f"step {line['step']}": line[key] for line in each} for each in steps))
    ends = [checkpoint.newest(run, {}) for run in (whole, broken)]
    for what, prefix in (("weights", checkpoint.MODEL), ("optimizer's tensors", checkpoint.OPTIMIZER)):
        tensors = [end.tensors(prefix) if end else {} for end in ends]
        yield _difference(what, *({name: _bits(tensor) for name, tensor in each.items()} for each in tensors))


def _bits(tensor: torch.Tensor) -> str:
    import torch

    content = tensor.contiguous().reshape(-1).view(torch.uint8)
    return f"{tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(content.numpy().tobytes())}"


def _difference(what: str, whole: Mapping[Any, Any], broken: Mapping[Any, Any]) -> Compared:
    every = [*whole, *(key for key in broken if key not in whole)]
    differ = [key for key in every if whole.get(key) != broken.get(key)]
    first = f"{differ[0]}: {whole.get(differ[0])} whole, {broken.get(differ[0])} broken" if differ else ""
    return Compared(what, len(every), len(differ), first)
