"""How a group of workers gets another size (`train.workers: {min: 1, max: 4}`) without losing a step.

Ray Train ends a healthy group without a word to start a larger one. Ours never lets it; its scaling policy (`elastic`)
asks the group instead:

    policy     sees room for more workers, and gives the word
    rank 0     hears it at a step, as it hears the word to stop: all ranks write a checkpoint and leave the loop
    all ranks  raise `Resized`, so that Ray Train starts the group again, with as many workers as there is room for

The policy takes the word back before each start, whatever its reason.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from raylway.runs.run import Run
from raylway.runs.stop import StopWord
from raylway.train import failures
from raylway.train.plan import Plan

if TYPE_CHECKING:
    from raylway.train.strategy import Groups


class ResizeWord(StopWord):
    """The word to stop and to start again with another number of workers."""

    name = "resize"


class Resized(Exception):
    """The checkpoint is written, and there is room for a group of another size."""


def leave(groups: Groups, run: Run) -> None:
    """After training has ended before its time. All ranks call it at once.

    Raises:
        Resized: On all ranks, if the group was asked to make room and the command was not told to stop.
    """
    from raylway.train import messages

    is_asked = groups.rank == 0 and ResizeWord(run.folder).is_there() and not StopWord(run.folder).is_there()
    if messages.from_rank_0(b"resize" if is_asked else b"", groups.save):
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
