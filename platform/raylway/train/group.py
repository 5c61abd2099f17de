"""The workers' process group, made as Ray Train's `TorchConfig` makes it, but without torch in Ray Train's controller.

Each start waits for the controller, which needs no torch and would spend most of its own start on importing it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ray.train.backend import Backend, BackendConfig

_LEAVE_WITHIN_S = 30


class _Device:
    """Around the training function: the GPU of this worker is the current one."""

    def __enter__(self) -> None:
        from ray.train.torch.config import TorchConfigContextManager

        TorchConfigContextManager().__enter__()

    def __exit__(self, *_: object) -> None:
        pass


class _Group(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called in the controller when the workers' processes are there."""
        import ray
        from ray.train._internal.utils import get_address_and_port

        address, port = worker_group.execute_single(0, get_address_and_port)
        size = len(worker_group)
        place = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        joined = [
            worker_group.execute_single_async(rank, _join, place, backend_config, rank, size) for rank in range(size)
        ]
        ray.get(joined)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        import ray

        ray.wait(worker_group.execute_async(_leave), num_returns=len(worker_group), timeout=_LEAVE_WITHIN_S)


@dataclass
class Group(BackendConfig):
    """What Ray Train is told.

    Args:
        backend: Of torch.distributed.
        timeout_s: Of its operations.
    """

    backend: str
    timeout_s: int

    @property
    def backend_cls(self) -> type[Backend]:
        return _Group

    @property
    def train_func_context(self) -> type[_Device]:
        return _Device


def _join(place: dict[str, str], group: Group, rank: int, size: int) -> None:
    from ray.train.torch import config

    os.environ.update(place)
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(group.backend, rank, size, "env://", group.timeout_s)


def _leave() -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=True)
