"""A node of the group is about to be taken away (a spot notice): save, leave, and go on elsewhere.

Ray hears of it when someone drains the node, and Ray Train's watcher tells every worker process within 5 seconds
(`RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S`). What it was told is read here where Ray Train keeps it, because its public
question, `ray.train.get_preemption_info`, is a meeting of all ranks by way of an actor, too slow to ask at every step.
An interface inside Ray; held by a test.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from raylway.runs.run import Run
from raylway.runs.stop import StopWord

if TYPE_CHECKING:
    from raylway.train.strategy import Groups


class Preempted(Exception):
    """The checkpoint is written; all ranks raise it, so that Ray Train starts the group again on other nodes."""


def is_near() -> bool:
    """Whether this process was told that a node of its group goes away."""
    context = sys.modules.get("ray.train.v2._internal.execution.context")
    # Not by asking for it: that raises where there is none, in a process that Ray Train has not started.
    mine: Any = getattr(context, "_train_context", None)
    return mine is not None and mine.preemption_context.preemption_info is not None


def leave(groups: Groups, run: Run) -> None:
    """After training has ended before its time. All ranks call it at once.

    Raises:
        Preempted: On all ranks, if one was told of it and the command was not told to stop.
    """
    from raylway.train import messages

    is_stopped = groups.rank == 0 and StopWord(run.folder).is_there()
    heard = messages.gathered(b"stop" if is_stopped else b"leave" if is_near() else b"", groups.save)
    if b"leave" in heard and b"stop" not in heard:
        raise Preempted("a node is about to be taken away: saved, and starting again elsewhere")
