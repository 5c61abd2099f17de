"""When Ray Train's controller got how far with a start, kept in the run's events (`runs.starts` makes stages of them).

The callbacks are an interface inside Ray Train; held by a test.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from raylway import storage
from raylway.runs import starts
from raylway.runs.run import Run


class Milestones(ControllerCallback, WorkerGroupCallback):
    """Called in the controller's process.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def after_controller_start(self, train_run_context: Any) -> None:
        self._log(starts.CONTROLLER)

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self._log(starts.ASKED)

    def before_init_train_context(self, workers: Any) -> dict[str, Any]:
        self._log(starts.ALIVE)
        return {}

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._log(starts.GROUP)

    def _log(self, event: str) -> None:
        Run(storage.place(self._folder)).log(event)
