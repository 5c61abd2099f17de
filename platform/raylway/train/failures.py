"""Attempts and failures of a run, in `events.jsonl`: who is to blame, and whether to try again.

A mistake in the job or in the user's own model is returned by the worker as a value: raised, it would make Ray Train
start the group again, and again. A fault of a machine is raised, so that Ray Train does start again. The record lets
the peers of a failed rank, who only see their connection break, tell the two apart.
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
_STARTED, _FAILED = "attempt started", "attempt failed"


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
    kind: Literal["user", "run", "fault"]
    """The user's mistake (exit code 2), a run that can't go on (1), or a fault after which to try again."""
    text: list[str]
    """The arguments of the `UserError`, or the one of the `RunFailed`."""

    def as_error(self) -> UserError | RunFailed:
        return UserError(*self.text) if self.kind == "user" else RunFailed(*self.text)


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
    wanted = (launch, from_step, workers)
    same = [start for start in starts(run) if (start.launch, start.from_step, start.workers) == wanted]
    if len(same) >= MOST_STARTS:
        causes = [found.text[-1] for found in _events(run, _FAILED, Failure) if found.attempt == same[-1].attempt]
        cause = causes[0] if causes else "a worker's process ended without a word: killed, or out of memory"
        raise RunFailed(
            f"training started {MOST_STARTS} times from step {from_step} and never reached the next checkpoint; "
            f"the last cause: {cause}"
        )
    attempt = 1 + max(used, latest(run))
    run.log(_STARTED, **msgspec.structs.asdict(Attempt(attempt, launch, from_step, workers)))
    return attempt


def attempts(run: Run) -> int:
    """How many times the worker group was started, over all launches."""
    return len(starts(run))


def starts(run: Run) -> list[Attempt]:
    """Each of them, oldest first."""
    return list(_events(run, _STARTED, Attempt))


def latest(run: Run) -> int:
    """The number of the attempt that began last."""
    return max((start.attempt for start in starts(run)), default=0)


def record(run: Run, failure: Failure) -> None:
    """As far as it goes: a storage that can't be written must not hide the cause of the failure."""
    with suppress(OSError, UserError, RunFailed):
        run.log(_FAILED, **msgspec.structs.asdict(failure))


def of_a_peer(run: Run, attempt: int) -> Failure | None:
    """What another rank recorded about this attempt, if it is no mere fault; waits a moment for it to appear."""
    deadline = time.monotonic() + _LOOK_FOR_S
    while time.monotonic() < deadline:
        for found in _events(run, _FAILED, Failure):
            if found.attempt == attempt and found.kind != "fault":
                return found
        time.sleep(_LOOK_FOR_S / 20)
    return None


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
    if type(error).__name__ == "OutOfMemoryError":
        return UserError(
            "the GPU's memory is not enough for one microbatch",
            where="train.microbatch",
            found=str(error).splitlines()[0],
            fix="lower train.microbatch: the global batch and its gradient stay the same",
        )
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


def _events(run: Run, event: str, kind: type[Any]) -> Iterator[Any]:
    """Records of one kind, oldest first; a line that a power cut left in half is none."""
    for line in journal.read(run.events).splitlines():
        try:
            found = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue
        if found.get("event") == event:
            yield msgspec.convert(found, kind)
