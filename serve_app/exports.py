"""Where a replica's metrics and access log go: to Ray, and from there to whoever asks."""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from logging.handlers import RotatingFileHandler
from pathlib import Path

import ray
from ray import serve
from ray.serve._private.logging_utils import get_serve_logs_dir

_LOG_BYTES, _OLD_LOGS = 64 << 20, 4
_TIMEOUT_S = 5
_PREFIX = "ray_raylway_"


def access_log() -> Callable[[bytes], None]:
    """Writes lines to `access_APPLICATION_REPLICA.jsonl` among Ray's logs of Serve; 64 MiB a file, four old ones."""
    context = serve.get_replica_context()
    folder = Path(get_serve_logs_dir())
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"access_{context.app_name}_{context.replica_tag}.jsonl"
    handler = RotatingFileHandler(file, maxBytes=_LOG_BYTES, backupCount=_OLD_LOGS, delay=True)
    handler.terminator = ""

    def write(lines: bytes) -> None:
        handler.emit(logging.LogRecord("access", logging.INFO, "", 0, lines.decode(), None, None))

    return write


def metrics() -> bytes:
    """What all replicas of this application have counted, in Prometheus' text form.

    Each node's metrics agent is asked, which the replicas there report to every 10 seconds.
    """
    application = f'application="{serve.get_replica_context().app_name}"'
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(min(16, len(nodes))) as pool:
        texts = pool.map(lambda node: _of_node(node["NodeManagerAddress"], node["MetricsExportPort"]), nodes)
    families: dict[str, list[str]] = {}
    for text in texts:
        family: list[str] = []
        for line in text.splitlines():
            if line.startswith("# HELP "):
                family = families.setdefault(line, [])
            elif (line.startswith("# TYPE ") and not family) or (line.startswith(_PREFIX) and application in line):
                family.append(line)
    told = {head: lines for head, lines in families.items() if len(lines) > 1}
    return "".join(f"{line}\n" for head, lines in told.items() for line in (head, *lines)).encode()


def _of_node(address: str, port: int) -> str:
    """A node that can't be reached has nothing to tell; the next scrape may find it again."""
    host = f"[{address}]" if ":" in address else address
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=_TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""
