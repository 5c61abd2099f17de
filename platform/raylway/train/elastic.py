"""Ray Train's side of a group of workers that grows and shrinks with the cluster (`train.workers: {min: 1, max: 4}`).

Ray Train counts the workers that there is room for. It starts as many, after a failure too: that is how a group shrinks
when a machine is lost. While a group is healthy it looks again now and then, and would end it at once to start another;
ours asks the group to leave by itself (`resizing`), so that no step is lost.

Ray's classes are internal; tests hold what is used of them. Without torch, for the controller imports this.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from ray._private.state import state
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from raylway.errors import RunFailed, UserError
from raylway.runs import starts
from raylway.runs.run import Run
from raylway.storage import Place
from raylway.train.plan import Plan
from raylway.train.resizing import ResizeWord

LOOK_EVERY_S = 30.0
"""How long a group trains before it is looked whether it could be larger; a new start costs about half of that."""

_REFUSALS = (OSError, UserError, RunFailed)
_WAIT_S = 1.0
"""While there is room for too few. Ray asks again without a pause, which would keep a core busy."""


def scaling(planned: Plan) -> ScalingConfig:
    """What Ray Train is asked for."""
    resources = {"CPU": planned.cpus_per_worker, "GPU": planned.gpus_per_worker}
    return ScalingConfig(
        num_workers=(planned.fewest_workers, planned.workers) if planned.fewest_workers else planned.workers,
        use_gpu=planned.gpus_per_worker > 0,
        resources_per_worker={name: amount for name, amount in resources.items() if amount},
        elastic_resize_monitor_interval_s=LOOK_EVERY_S,
    )


class Trainer(DataParallelTrainer):
    """Ray's, with our scaling policy where the number of workers may change.

    Args:
        run_folder: Where the policy and the group leave word for each other.
        given: For Ray's.
    """

    def __init__(self, run_folder: Place, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._run_folder = run_folder

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        config: Any = self.scaling_config  # typed as its class of the version before
        if config.elasticity_enabled:
            given["scaling_policy"] = AskingPolicy(config, self._run_folder)
        return super()._initialize_and_run_controller(**given)


class AskingPolicy(ElasticScalingPolicy):
    """Asks a healthy group to make room for a larger one, instead of having it ended. Lives in Ray Train's controller.

    What a storage may raise is not raised here, where it would end the run.
    """

    def __init__(self, config: ScalingConfig, run_folder: Place) -> None:
        super().__init__(config)
        self._run_folder = run_folder
        self._waits = False

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        """Without the nodes that are about to be taken away: Ray places nothing there any more."""
        leaving = _leaving_nodes()
        there = {node: free for node, free in reserved_resources.items() if node not in leaving}
        return super()._count_possible_workers(there)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        decision = super().make_decision_for_non_running_worker_group()
        waited, self._waits = self._waits, isinstance(decision, NoopDecision)
        if self._waits:
            if not waited:
                with suppress(*_REFUSALS):
                    Run(self._run_folder).log(starts.WAITS)
            time.sleep(_WAIT_S)
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision):
            with suppress(*_REFUSALS):
                ResizeWord(self._run_folder).give()
        return NoopDecision()

    def before_controller_execute_resize_decision(self, resize_decision: ResizeDecision) -> None:
        """Called by Ray before each start of a group, whatever its reason."""
        with suppress(*_REFUSALS):
            ResizeWord(self._run_folder).take_back()


def _leaving_nodes() -> set[str]:
    """Ids of the nodes that someone drains, as on a spot notice."""
    try:
        return set(state.get_draining_nodes())
    except Exception:  # noqa: BLE001 - Ray's head does not answer for a moment; raised, it would end the run
        return set()
