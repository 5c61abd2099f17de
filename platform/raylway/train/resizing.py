"""How a group of workers gets another size (`train.workers: {min: 1, max: 4}`) without losing a step.

Ray Train ends a healthy group without a word to start a larger one. So its scaling policy (`elastic`) asks first:

    policy                                  rank 0
    makes the file `resize`
                                            sees it after a step, as it sees the word to stop: all ranks write a
                                            checkpoint and leave the loop
                                            removes the file and waits to be ended
    sees that it is gone, and has Ray
    end this group and start the next

Nobody waits for ever: a group that fails or finishes meanwhile does so as always, and the next start removes the file.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from raylway.runs.run import Run
from raylway.train import failures
from raylway.train.plan import Plan

FILE = "resize"
"""In the run's folder."""
_LOOK_EVERY_S = 0.1
_END_WITHIN_S = 300.0


def ask(folder: Path) -> None:
    """Ask the group for a checkpoint and its place. `folder` is the run's, here and below."""
    (folder / FILE).touch()


def is_asked(folder: Path) -> bool:
    return (folder / FILE).exists()


def withdraw(folder: Path) -> None:
    (folder / FILE).unlink(missing_ok=True)


def make_room(folder: Path, stop_file: Path) -> None:
    """Say that the checkpoint is whole, and wait to be ended. Called by rank 0, after the loop.

    Returns only when the user stops the run meanwhile.

    Raises:
        RuntimeError: Nobody has ended it, so Ray is told to start the group again.
    """
    withdraw(folder)
    deadline = time.monotonic() + _END_WITHIN_S
    while not stop_file.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the group was asked to make room, and is still there after {_END_WITHIN_S:g} s")
        time.sleep(_LOOK_EVERY_S)


def history(run: Run) -> list[str]:
    """Each change of the number of workers within one command, oldest first, for people."""
    return [
        f"from {before.workers} to {after.workers} workers at step {after.from_step:,}"
        for before, after in itertools.pairwise(failures.starts(run))
        if before.launch == after.launch and before.workers != after.workers
    ]


def beginning(run: Run, plan: Plan, workers: int) -> str:
    """What a start of the group is told as, on the terminal."""
    starts = failures.starts(run)
    if len(starts) > 1 and starts[-2].launch == starts[-1].launch and starts[-2].workers != workers:
        return f"resized {history(run)[-1]}"
    return f"{workers} worker{'s' * (workers > 1)} (of {plan.group}) at step {starts[-1].from_step:,}"
