"""Attempts and failures of a run, in `events.jsonl`: who is to blame, and whether to try again.

A mistake in the job or in the user's own model is returned by the worker as a value: raised, it would make Ray Train
start the group again, and again. A fault of a machine is raised, so that Ray Train does start again. The record lets
the peers of a failed rank, who only see their connection break, tell the two apart.

    user, run          end the run
    fault, hang, lost  start again; without progress `MOST_STARTS` times. `hang` is written by a rank's watchdog, `lost`
                       by Ray Train's controller, which sees how a process ended that could not say it itself
    memory, preempted  start again, with a smaller microbatch or on another node; they don't count as failures
"""

from __future__ import annotations

import sysconfig
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec

import raylway
from raylway.errors import RunFailed, UserError
from raylway.runs import journal
from raylway.runs.run import Run

MOST_STARTS = 3
"""Starts from one step within one launch, of as many workers: without progress a fourth would fail as well. Another
number of workers has tries of its own: machines that come and go are no failure."""
_LOOK_FOR_S = 1.0
"""How long a rank that lost its peers looks for their record. It is written before the connection breaks."""
_OUT_OF_MEMORY = ("low on memory", "memory pressure", "(OOM)", "out-of-memory")
"""In what Ray says about processes that it, or the kernel, has killed."""
_STARTED, _FAILED, _PREEMPTED = "attempt started", "attempt failed", "attempt preempted"
_EXCUSED = ("memory", "preempted")
_TELLING = ("hang", "lost", "fault")
"""Whose word is the cause, where an attempt has several: a peer of what hung or died knows of a broken connection."""


class Attempt(msgspec.Struct, frozen=True):
    """One start of the worker group."""

    attempt: int
    launch: str
    """Names one `raylway` command: a new command has tries of its own."""
    from_step: int
    workers: int


class Failure(msgspec.Struct, frozen=True):
    """Why a rank ended. JSON-able: it is what the worker function returns."""

    attempt: int
    rank: int
    """-1: Ray Train's controller."""
    kind: Literal["user", "run", "fault", "hang", "lost", "memory", "preempted"]
    """The user's mistake (exit code 2), a run that can't go on (1), or one of those after which to start again."""
    text: list[str]
    """The arguments of the `UserError`, or the one of the `RunFailed`."""
    microbatch: int = 0
    """With `memory`: the one that did not fit."""

    @property
    def ends_run(self) -> bool:
        return self.kind in ("user", "run")

    def as_error(self) -> UserError | RunFailed:
        return UserError(*self.text) if self.kind == "user" else RunFailed(*self.text)


# Looked up before there are threads: where several are the first to decode a type, msgspec 0.22 ends the process.
msgspec.json.Decoder(tuple[Attempt, Failure])


def begin(run: Run, launch: str, from_step: int, workers: int, used: int) -> int:
    """Record a start and return its attempt number. Called by rank 0 only.

    Args:
        run: The run.
        launch: This command.
        from_step: The step of the checkpoint it goes on from.
        workers: Ranks.
        used: The highest attempt that left a checkpoint folder; a number is never used twice, even if the record of
            its start was lost with the power.

    Raises:
        RunFailed: This launch has started often enough from this step with as many workers; carries the last cause.
    """
    excused = {found.attempt for found in recorded(run) if found.kind in _EXCUSED}
    counted = [start for start in starts(run) if start.attempt not in excused]
    wanted = (launch, from_step, workers)
    same = [start for start in counted if (start.launch, start.from_step, start.workers) == wanted]
    if len(same) >= MOST_STARTS:
        raise RunFailed(
            f"training started {MOST_STARTS} times from step {from_step} and never reached the next checkpoint; "
            f"the last cause: {_cause(run, same[-1].attempt)}"
        )
    attempt = 1 + max(used, latest(run))
    run.log(_STARTED, **msgspec.structs.asdict(Attempt(attempt, launch, from_step, workers)))
    return attempt


def attempts(run: Run) -> int:
    """How many times the worker group was started, over all launches."""
    return len(starts(run))


def starts(run: Run) -> list[Attempt]:
    """Each of them, oldest first."""
    return list(events_of(run, _STARTED, Attempt))


def latest(run: Run) -> int:
    """The number of the attempt that began last."""
    return max((start.attempt for start in starts(run)), default=0)


def record(run: Run, failure: Failure) -> None:
    """As far as it goes: a storage that can't be written must not hide the cause of the failure."""
    with suppress(OSError, UserError, RunFailed):
        run.log(_PREEMPTED if failure.kind == "preempted" else _FAILED, **msgspec.structs.asdict(failure))


def recorded(run: Run) -> list[Failure]:
    """Over all launches, oldest first, those of preempted attempts last."""
    return [*events_of(run, _FAILED, Failure), *events_of(run, _PREEMPTED, Failure)]


def of_a_peer(run: Run, attempt: int) -> Failure | None:
    """What another rank recorded about this attempt, if it is no mere fault; waits a moment for it to appear."""
    deadline = time.monotonic() + _LOOK_FOR_S
    while time.monotonic() < deadline:
        for found in recorded(run):
            if found.attempt == attempt and found.kind != "fault":
                return found
        time.sleep(_LOOK_FOR_S / 20)
    return None


def _cause(run: Run, attempt: int) -> str:
    """Of an attempt's end."""
    found = [failure for failure in recorded(run) if failure.attempt == attempt and failure.kind in _TELLING]
    if not found:
        return "a worker's process ended without a word"
    return min(found, key=lambda failure: _TELLING.index(failure.kind)).text[-1]


def of_a_process(error: Exception) -> str:
    """How Ray says that a process ended, in fewer words."""
    text = str(error)
    if any(words in text for words in _OUT_OF_MEMORY):
        return (
            "killed, because the machine ran out of memory. Lower train.microbatch (the gradient stays the same) or "
            "the workers on a machine (more train.resources.cpus for each), or use machines with more memory"
        )
    if "worker process has died" in text:
        return (
            "its process ended without a word: it crashed, or was killed, perhaps by the kernel for its memory (dmesg)"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"the process is gone: {' '.join(lines[-1:]) or type(error).__name__}"


def blame(error: Exception, attempt: int, rank: int, user_folders: list[str]) -> Failure:
    """Whose failure an exception is.

    Args:
        error: As caught.
        attempt: Of this start.
        rank: Of this process.
        user_folders: Where the user's own modules are; empty when the model is ours.
    """
    if isinstance(error, UserError):
        return Failure(attempt, rank, "user", list(error.args))
    if isinstance(error, RunFailed):
        return Failure(attempt, rank, "run", [str(error)])
    if (mistake := users_mistake(error, user_folders)) is not None:
        return Failure(attempt, rank, "user", list(mistake.args))
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno} in {last.name}"
    return Failure(attempt, rank, "fault", [f"rank {rank}: {type(error).__name__}: {error} ({place})"])


def users_mistake(error: Exception, user_folders: list[str]) -> UserError | None:
    """An exception that passed through the user's own module, as an error that shows the user's frame only."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename, user_folders)]
    if not frames:
        return None
    frame = frames[-1]
    return UserError(
        f"your module raised {type(error).__name__}: {error}",
        where=f"{frame.filename}:{frame.lineno} ({frame.name})",
        found=frame.line or "",
    )


def _is_users(filename: str, user_folders: list[str]) -> bool:
    """Below one of the folders, but neither installed nor ours: the current folder may hold a virtual environment."""
    path = Path(filename)
    paths = sysconfig.get_paths()
    others = [paths["purelib"], paths["platlib"], paths["stdlib"], str(Path(raylway.__file__).parent)]
    inside = any(path.is_relative_to(folder) for folder in user_folders)
    return inside and not any(path.is_relative_to(folder) for folder in others)


def events_of(run: Run, event: str, kind: type[Any]) -> Iterator[Any]:
    """A run's records of one event, oldest first; a line that a power cut left in half is none."""
    for line in journal.read(run.events).splitlines():
        try:
            found = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue
        if found.get("event") == event:
            yield msgspec.convert(found, kind)
