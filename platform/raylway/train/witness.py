"""What Ray Train's controller sees of processes that ended without a word of their own, kept in the run's events.

A worker that was killed, or whose node is gone, records nothing; its peers know of a broken connection only.
"""

from __future__ import annotations

from ray.train import UserCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.context import TrainRunContext

from raylway import storage
from raylway.runs.run import Run
from raylway.train import failures
from raylway.train.failures import Failure


class Witness(UserCallback):
    """Called in the controller's process.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._seen: set[tuple[int, int]] = set()

    def after_exception(self, run_context: TrainRunContext, worker_exceptions: dict[int, Exception]) -> None:
        """Record the ranks of this attempt whose process is gone, each once."""
        run = Run(storage.place(self._folder))
        attempt = failures.latest(run)
        for rank, error in worker_exceptions.items():
            is_gone = isinstance(error, WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError)
            if is_gone and (attempt, rank) not in self._seen:
                self._seen.add((attempt, rank))
                failures.record(run, Failure(attempt, rank, "lost", [f"rank {rank}: {failures.of_a_process(error)}"]))
