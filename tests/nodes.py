"""A Ray cluster of several nodes on this machine, one raylet each, that can be killed; token authentication is on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from commands import environment

_SERVER = """
import json, sys, time
from raylway.launch import auth
auth.prepare_local()
import ray.cluster_utils
from ray.core.generated import autoscaler_pb2
import psutil
cluster = ray.cluster_utils.Cluster()
settings = {"object_store_memory": 80_000_000, "include_dashboard": False}
cluster.add_node(num_cpus=0, **settings)
nodes = {}
print(json.dumps(cluster.address), flush=True)
for line in sys.stdin:
    word, value = json.loads(line)
    if word == "add":
        node = cluster.add_node(num_cpus=value, **settings)
        nodes[node.node_id] = node
        print(json.dumps(node.node_id), flush=True)
    elif word == "drain":
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + 300) * 1000)
        client = ray._raylet.GcsClient(address=cluster.address)
        accepted, message = client.drain_node(value, reason, "to be taken away", deadline_ms)
        assert accepted, message
        print(json.dumps(value), flush=True)
    else:
        node = nodes.pop(value)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()
        raylet.wait()
        cluster.worker_nodes.remove(node)
        print(json.dumps(value), flush=True)
cluster.shutdown()
"""

_SOON_NOTICED = {
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_timeout_ms": "1000",
}
"""That a node is gone: after 1 instead of 15 seconds."""


@dataclass
class Nodes:
    """A head without CPUs, and nodes."""

    address: str
    server: subprocess.Popen[str]
    ids: list[str]
    """Of the nodes that live, without the head."""

    def have(self, count: int) -> None:
        """Start nodes of one CPU until so many live."""
        while len(self.ids) < count:
            self.ids.append(self._ask("add", 1))

    def kill(self, node: str) -> None:
        """SIGKILL a node's raylet and all that it started."""
        self.ids.remove(self._ask("kill", node))

    def drain(self, node: str) -> None:
        """Tell Ray that a node will be taken away in five minutes, as one does who has got a spot notice for it."""
        self._ask("drain", node)

    def environment(self) -> dict[str, str]:
        """Of a process that joins."""
        return environment() | {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token"}

    def _ask(self, word: str, value: int | str) -> str:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps([word, value]) + "\n")
        self.server.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, "the cluster's server ended"
        return str(json.loads(line))


@contextmanager
def cluster() -> Iterator[Nodes]:
    """A cluster that goes with the block. Ray writes the address of the latest one into its temporary folder, where
    other processes would find it: this one has a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="rw", dir="/tmp") as folder:
        server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            env=environment() | _SOON_NOTICED | {"RAY_TMPDIR": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(log := open(os.path.join(folder, "log"), "w")),  # noqa: SIM115, PTH123, PTH118
            text=True,
        )
        nodes = Nodes("", server, [])
        try:
            nodes.address = nodes.answer()
            yield nodes
        finally:
            assert server.stdin is not None
            server.stdin.close()
            server.wait(60)
            log.close()
