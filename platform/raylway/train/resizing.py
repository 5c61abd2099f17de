"""How a group of workers gets another size (`train.workers: {min: 1, max: 4}`) without losing a step.

Ray Train ends a healthy group without a word to start a larger one. Ours never lets it; its scaling policy (`elastic`)
asks the group instead:

    policy     sees room for more workers, and makes the file `resize`
    rank 0     sees it after a step, as it sees the word to stop: all ranks write a checkpoint and leave the loop
    all ranks  raise `Resized`, so that Ray Train starts the group again, with as many workers as there is room for

and removes the file before each start, whatever its reason.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from raylway.runs.run import Run
from raylway.train import failures
from raylway.train.plan import Plan

if TYPE_CHECKING:
    from raylway.train.strategy import Groups

FILE = "resize"
"""In the run's folder."""


class Resized(Exception):
    """The checkpoint is written, and there is room for a group of another size."""


def ask(folder: Path) -> None:
    """Ask the group for a checkpoint and its place. `folder` is the run's, here and below."""
    (folder / FILE).touch()


def withdraw(folder: Path) -> None:
    (folder / FILE).unlink(missing_ok=True)


def leave(groups: Groups, folder: Path, stopped: bool) -> None:
    """After training has ended before its time. All ranks call it at once.

    Args:
        groups: All ranks.
        folder: The run's.
        stopped: The command was told to stop: then it ends.

    Raises:
        Resized: On all ranks, if the group was asked and the command was not.
    """
    from raylway.train import messages

    word = b"resize" if groups.rank == 0 and not stopped and (folder / FILE).exists() else b""
    if messages.from_rank_0(word, groups.save):
        raise Resized("there is room for another number of workers: saved, and starting again with it")


def history(run: Run) -> list[str]:
    """Each change of the number of workers within one command, oldest first, for people."""
    return [
        f"from {before.workers} to {after.workers} workers at step {after.from_step:,}"
        for before, after in itertools.pairwise(failures.starts(run))
        if before.launch == after.launch and before.workers != after.workers
    ]


def beginning(run: Run, plan: Plan) -> str:
    """What the newest start of the group is told as, on the terminal."""
    starts = failures.starts(run)
    last = starts[-1]
    if any(before.launch == last.launch and before.workers != last.workers for before in starts[-2:-1]):
        return f"resized {history(run)[-1]}"
    return f"{last.workers} worker{'s' * (last.workers > 1)} (of {plan.group}) at step {last.from_step:,}"
