"""`raylway verify-resume`: proof that a job killed at random steps ends where the unbroken one does, to the last bit.

The job is trained twice by the same command that users give, on the same prepared data: once whole, once with SIGKILL
sent to the command at random steps and the command given again at once each time. Compared are the rows of every global
batch (as `train.feed.loader` has read them), every loss, rate and gradient norm, and the last checkpoint's weights and
optimizer state. Both are jobs under names of their own in the job's storage, removed at the end.
"""

from __future__ import annotations

import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
import xxhash

from raylway import pipeline, storage
from raylway.errors import RunFailed, UserError
from raylway.job.load import LoadedJob
from raylway.runs import journal, pace, starts
from raylway.runs.pace import Line
from raylway.runs.progress import Reporter, Stage
from raylway.runs.run import Run

if TYPE_CHECKING:
    import torch

_SAVES = 10
"""Checkpoints in the whole of training, so that a resumed run goes on from somewhere."""
_LOOK_EVERY_S, _ASK_EVERY_S = 0.01, 1.0
"""In a folder, and in a bucket, where each look is several requests."""
_FIGURES = {"global batches": "batch", "losses": "loss", "learning rates": "lr", "gradient norms": "grad_norm"}
_LAST_KILL = 0.9
"""Share of the steps before which kills are aimed: the rest is there to be resumed."""
_TAIL_BYTES = 1 << 14
_LONGEST_NAME = 100
"""Of a job."""


class Kill(msgspec.Struct, frozen=True):
    """One SIGKILL."""

    aimed_at: int
    step: int
    """The last step in the metrics when the next command went on."""
    resumed_from: int
    """The step of the checkpoint that it went on from; 0 for the start."""


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
    root = storage.prepare_root(loaded.job.storage)
    pipeline.run(loaded, reporter, "prepare")
    mark = f".verify-{secrets.token_hex(4)}"
    name = loaded.job.name[: _LONGEST_NAME - len(f"{mark}-broken")] + mark
    with storage.scratch(root, name) as logs, _Training(f"{name}-whole", root, job, overrides, logs) as whole:
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
        with _Training(f"{name}-broken", root, job, [*overrides, every], logs) as broken:
            with reporter.stage("broken") as stage:
                for aim in aims:
                    broken.run_and_kill(aim, stage)
                broken.run_to_end(stage)
                done = [Kill(aim, *found) for aim, found in zip(aims, broken.resumed(), strict=True)]
                stage.finish(f"killed after the steps {', '.join(str(kill.step) for kill in done)}")
            return Verification(steps, done, list(_compared(whole.trained, broken.trained)))


class _Training:
    """One of the two: `raylway train` of the job under another name, whose runs are removed at the end of the block.

    Args:
        name: The other name.
        root: The job's storage, where the prepared data is.
        job: The job file.
        overrides: Of the command.
        logs: A folder for what the commands print.
    """

    def __init__(self, name: str, root: storage.Place, job: Path, overrides: list[str], logs: Path) -> None:
        self._folder = root / name
        words = [word for each in [*overrides, f"name={name}"] for word in ("--set", each)]
        self._command = [sys.executable, "-m", "raylway", "train", str(job), *words, "--json"]
        self._log = logs / name
        self._look_every_s = _LOOK_EVERY_S if isinstance(root, Path) else _ASK_EVERY_S
        self._launches: list[str] = []
        """The killed commands, by the name that each has in the run's events."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        storage.remove(self._folder)

    @property
    def trained(self) -> Run:
        (folder,) = storage.children(self._folder)
        return Run(folder)

    def run_to_end(self, stage: Stage) -> None:
        """Give the command and wait.

        Raises:
            RunFailed: It failed; with what it said last.
        """
        with self._started() as process:
            while process.poll() is None:
                self._show(stage)
                time.sleep(self._look_every_s)
        if process.returncode:
            raise RunFailed(f"`raylway train` ended with {process.returncode}: {self._said()}")

    def run_and_kill(self, step: int, stage: Stage) -> None:
        """Give the command, and send SIGKILL once its own workers are at work and a step is made.

        Raises:
            RunFailed: The command ended by itself before.
        """
        with self._started() as process:
            # Workers of the command before may live on for a moment, and what they make is not of this one.
            while not self._is_at_work() and process.poll() is None:
                time.sleep(self._look_every_s)
            while self.last_step() < step and process.poll() is None:
                self._show(stage)
                time.sleep(self._look_every_s)
            process.kill()
        if process.returncode != -signal.SIGKILL:
            raise RunFailed(
                f"`raylway train` ended with {process.returncode} before it could be killed at step {step}: "
                f"{self._said()}"
            )
        self._launches = _launches(self._events())

    def resumed(self) -> Iterator[tuple[int, int]]:
        """For each kill the last step before it, and the step of the checkpoint that the next command went on from."""
        events = self._events()
        for launch in _launches(events)[1:]:
            begun = [line for line in events if line["event"] == pace.STARTED and line["launch"] == launch]
            attempts = [line["attempt"] for line in begun]
            lost = [line for line in events if line["event"] == pace.CONTINUES and line["attempt"] in attempts]
            yield begun[0]["from_step"] + (lost[0]["lost_steps"] if lost else 0), begun[0]["from_step"]

    def last_step(self) -> int:
        """The last step in the metrics; 0 before the first."""
        steps = (line["step"] for run in self._runs() for line in _last_lines(run.metrics) if line["kind"] == "step")
        return max(steps, default=0)

    def _is_at_work(self) -> bool:
        """Whether a command's workers have begun, after all that were killed."""
        events = self._events()
        new = [at for at, line in enumerate(events) if line.get("launch", "") not in ("", *self._launches)]
        return bool(new) and any(line["event"] == starts.ASSEMBLED for line in events[new[0] :])

    def _events(self) -> list[Line]:
        return [line for run in self._runs() for line in pace.lines(run.events)]

    def _runs(self) -> list[Run]:
        """None before the first command has made it."""
        return [Run(folder) for folder in storage.children(self._folder)]

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


def _launches(events: Iterable[Line]) -> list[str]:
    """The commands whose workers have started, oldest first."""
    return list(dict.fromkeys(line["launch"] for line in events if line["event"] == pace.STARTED))


def _last_lines(metrics: storage.Place) -> Iterator[Line]:
    """Of a run's metrics; in a bucket those that the newest start has sent."""
    if isinstance(metrics, Path):
        size = storage.size(metrics) or 0
        text = storage.read_range(metrics, max(0, size - _TAIL_BYTES), size) if size else b""
    else:
        text = journal.newest(metrics)
    yield from pace.decoded(text)


def _compared(whole: Run, broken: Run) -> Iterator[Compared]:
    from raylway.train import checkpoint

    logs = [list(pace.lines(run.metrics)) for run in (whole, broken)]
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
