"""What the connected cluster has, and what it could have: asked before anyone waits for it."""

from __future__ import annotations

import math
import sys
import uuid
from pathlib import Path
from typing import Any

import msgspec
from ruamel.yaml import YAML

from raylway.errors import UserError

_PROBE_TIMEOUT_S = 60
_BOOTSTRAP = "ray_bootstrap_config.yaml"
"""What `ray up` calls the cluster's configuration in the head's home folder (`--autoscaling-config` in `cluster/`)."""


class Node(msgspec.Struct, frozen=True):
    """One machine, or one that the autoscaler may start."""

    address: str
    cpus: float
    gpus: float
    is_head: bool = False
    id: str = ""
    """Ray's, of a running one."""

    def workers(self, cpus: float, gpus: float) -> int:
        """How many workers of this size fit at once."""
        most = min(have / need for have, need in ((self.cpus, cpus), (self.gpus, gpus)) if need > 0)
        return sys.maxsize if most == math.inf else math.floor(most)


class NodeType(msgspec.Struct, frozen=True):
    """A kind of machine that the autoscaler may start."""

    name: str
    node: Node
    most: int
    """How many there may be in all, the running ones included."""


class Capacity(msgspec.Struct, frozen=True):
    """The cluster as a whole.

    `cpus` and `gpus` are there now; `most_workers` counts what the autoscaler may add as well.
    """

    nodes: list[Node]
    types: list[NodeType] = []
    most_nodes: int = 0
    """The autoscaler's bound on all machines that it starts, the running ones included."""

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    def free(self) -> tuple[float, float]:
        """CPUs and GPUs of the connected Ray that nobody has taken now."""
        import ray

        now = ray.available_resources()
        return now.get("CPU", 0.0), now.get("GPU", 0.0)

    @property
    def hosts(self) -> int:
        """Machines, by address: two Ray nodes on one machine count once."""
        return len({node.address for node in self.nodes})

    @property
    def is_one_machine(self) -> bool:
        """Whether there is one machine, and stays so."""
        return len(self.nodes) == 1 and not self.types

    def most_workers(self, cpus: float, gpus: float) -> int:
        """How many workers of this size the cluster could ever hold at once."""
        now = sum(node.workers(cpus, gpus) for node in self.nodes)
        best = sorted(
            ((kind.node.workers(cpus, gpus), kind.most) for kind in self.types), key=lambda pair: pair[0], reverse=True
        )
        ever = sum(node.workers(cpus, gpus) for node in self.nodes if node.is_head)
        free = self.most_nodes
        for fits, most in best:
            taken = min(most, free)
            ever += fits * taken
            free -= taken
        return max(now, ever)

    def refuse_impossible(self, workers: int, cpus: float, gpus: float, where: str = "train.workers") -> None:
        """Stop before a wait that can't end.

        Args:
            workers: How many workers must run at once.
            cpus: CPUs of one worker.
            gpus: GPUs of one worker.
            where: The job file's line and key.

        Raises:
            UserError: Not all of them can ever be placed.
        """
        most = self.most_workers(cpus, gpus)
        if workers <= most:
            return
        each = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        raise UserError(
            f"{workers} workers of {each} each can never run at once here",
            where=where,
            expected=f"at most {most}" if most else "workers that fit on a machine",
            found=self.describe(),
            fix="ask for fewer or smaller workers (train.workers, train.resources), or use a larger cluster",
        )

    def require_shared(self, folder: Path) -> None:
        """Prove that every machine of the cluster sees a folder of this one; at once where there is one machine.

        Checkpoints are written by the workers and put together by one of them, so a folder on the driver's own disk
        would end in half a checkpoint.

        Raises:
            UserError: A machine doesn't see it.
        """
        import ray

        here = ray.util.get_node_ip_address()
        others = {node.address: node.id for node in self.nodes if node.address != here}
        if not others:
            return
        probe = folder / f".probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"")
        try:
            for address, seen in _ask(others, str(probe)).items():
                if not seen:
                    raise UserError(
                        "the storage folder isn't shared by all machines of the cluster",
                        where="storage",
                        expected="a folder on a file system that every machine mounts at the same place",
                        found=f"{folder}, which {address} doesn't see",
                        fix="name such a folder: --set storage=/shared/runs",
                    )
        finally:
            probe.unlink(missing_ok=True)

    def describe(self) -> str:
        """One line: what is there, and what may come."""
        machines = f"{len(self.nodes)} nodes" if len(self.nodes) > 1 else "one node"
        text = f"{machines}, {self.cpus:g} CPUs, {self.gpus:g} GPUs"
        kinds = [kind for kind in self.types if kind.most]
        if kinds:
            listed = (
                f"up to {kind.most} {kind.name} ({kind.node.cpus:g} CPUs, {kind.node.gpus:g} GPUs)" for kind in kinds
            )
            text += f"; may start {', '.join(listed)}"
        return text


def capacity(joined: bool) -> Capacity:
    """Ask the connected Ray; milliseconds.

    Args:
        joined: Whether it is a running cluster, which may grow, and not one that this process started.
    """
    import ray

    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            have = node["Resources"]
            is_head = "node:__internal_head__" in have
            nodes.append(
                Node(node["NodeManagerAddress"], have.get("CPU", 0.0), have.get("GPU", 0.0), is_head, node["NodeID"])
            )
    types, most = _autoscaler() if joined else ([], 0)
    return Capacity(nodes, types, most)


def _ask(nodes: dict[str, str], path: str) -> dict[str, bool]:
    """Whether each node, an id by address, sees a path; all are asked at once."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    sees = ray.remote(num_cpus=0)(_sees)
    asked = {
        address: sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(path)
        for address, node in nodes.items()
    }
    found = {}
    for address, answer in asked.items():
        try:
            found[address] = ray.get(answer, timeout=_PROBE_TIMEOUT_S)
        except RayError as error:  # it has no answer in time, too
            raise UserError(
                "a machine of the cluster can't run Raylway's workers",
                where=address,
                found=str(error).strip().splitlines()[-1],
                fix="look at its log with `ray logs`, or start the job without that machine",
            ) from None
    return found


def _sees(path: str) -> bool:
    # Listing the folder first makes a network file system look again instead of answering from its cache.
    folder = Path(path).parent
    return folder.is_dir() and any(file.name == Path(path).name for file in folder.iterdir())


def _autoscaler() -> tuple[list[NodeType], int]:
    """The node types that the cluster launcher may start, and its bound on machines.

    Ray shows running nodes only and publishes no configuration; `ray up` leaves it on the head node, which is where the
    drivers of Ray jobs run. Elsewhere, and under another autoscaler, nothing is known and only running nodes count.
    """
    file = Path.home() / _BOOTSTRAP
    if not file.exists():
        return [], 0
    config: dict[str, Any] = YAML(typ="safe", pure=True).load(file.read_text())
    types = []
    for name, kind in config.get("available_node_types", {}).items():
        resources = kind.get("resources", {})
        node = Node("", resources.get("CPU", math.inf), resources.get("GPU", 0))
        types.append(NodeType(name, node, kind.get("max_workers", 0)))
    return types, config.get("max_workers", 0)
