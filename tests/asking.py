"""Serve a bundle in a process of its own, and look at what that process and its children listen on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx
import uvicorn
from commands import environment

GOOD = {"length": 12.5, "width": 2.0, "colour": "red"}
"""A ripe fruit."""

MISTAKES = [
    ({"width": 2.0, "colour": "red"}, "length"),
    (GOOD | {"length": None}, "length"),
    (GOOD | {"colour": None}, "colour"),
    (GOOD | {"length": "12.5"}, "length"),
    (GOOD | {"length": "twelve"}, "length"),
    (GOOD | {"length": ""}, "length"),
    (GOOD | {"length": [12.5]}, "length"),
    (GOOD | {"length": {"v": 12.5}}, "length"),
    (GOOD | {"length": True}, "length"),
    (GOOD | {"note": "hand picked"}, "note"),
    (GOOD | {"ripe": "no"}, "ripe"),
    ({}, "length"),
    ([12.5, 2.0, "red"], None),
    (None, None),
]
"""What is no fruit, and the feature that is named."""

KEY = "a-key-for-the-tests-only"
KEYS = f"tests {KEY}; others another-key-for-the-tests"
ALLOWED = {"Authorization": f"Bearer {KEY}"}


def _refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def strict(answer: httpx.Response) -> Any:
    """The JSON of an answer; NaN and Infinity are none."""
    return json.loads(answer.text, parse_constant=_refuse)


def ask(client: httpx.Client, *rows: Any) -> tuple[int, Any]:
    """Status and answer of one request."""
    answer = client.post("/predict", json={"rows": list(rows)})
    return answer.status_code, strict(answer)


_SERVE = """
import sys
from pathlib import Path
from raylway.bundle import contents
from raylway.job.schema import Replicas, Serve
from raylway.launch import serving
from raylway.runs.progress import Reporter

port, low, high, *bundles = sys.argv[1:]
options = Serve(replicas=Replicas(min=int(low), max=int(high)))
models = [serving.Model(contents.load(Path(each)).record.name, Path(each), options) for each in bundles]
serving.serve(models, "127.0.0.1", int(port), Reporter("lines"))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def local(application: Any) -> Iterator[httpx.Client]:
    """An ASGI application by itself, over real HTTP, in a thread of this process."""
    port = free_port()
    running = uvicorn.Server(uvicorn.Config(application, "127.0.0.1", port, log_level="critical"))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, headers=ALLOWED) as client:
            yield client
    finally:
        running.should_exit = True
        thread.join()


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text()


@contextmanager
def server(
    bundle: Path | list[Path], folder: Path, replicas: tuple[int, int] = (1, 1), **variables: str
) -> Iterator[Server]:
    """`raylway serve` of a bundle, or of several; yields once it is ready, and ends it as Ctrl-C in a terminal does."""
    port, log = free_port(), folder / "serve.log"
    words = [port, *replicas, *(bundle if isinstance(bundle, list) else [bundle])]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, *map(str, words)],
            env=environment() | {"RAYLWAY_API_KEYS": KEYS} | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, headers=ALLOWED) as client:
            found = Server(process, client, log)
            deadline = time.monotonic() + 120
            while "stop it: Ctrl-C" not in found.said:
                assert process.poll() is None, found.said
                assert time.monotonic() < deadline, found.said
                time.sleep(0.1)
            yield found
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)


def listening(root: int) -> list[tuple[str, str, int]]:
    """The TCP listeners of a process and its children: process name, address in hex as the kernel has it, port."""
    family = _family(root)
    owners = {inode: process for process in family for inode in _sockets(process)}
    found = []
    for table in ("tcp", "tcp6"):
        for line in _read(Path("/proc/net") / table).splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in owners:  # LISTEN
                address, port = fields[1].split(":")
                found.append((_read(Path(f"/proc/{owners[fields[9]]}/comm")).strip(), address, int(port, 16)))
    return found


def access_log(root: int, application: str) -> list[dict[str, Any]]:
    """What the replicas of an application, among the children of a process, have written to their access logs."""
    files = {
        _target(descriptor)
        for process in _family(root)
        for descriptor in _descriptors(process)
        if f"/access_{application}_" in _target(descriptor)
    }
    return [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]


def named(root: int, title: str) -> list[int]:
    """The children of a process, and theirs, whose command line begins so; Ray's processes say there what they are."""
    return [process for process in _family(root) if _read(Path(f"/proc/{process}/cmdline")).startswith(title)]


def programs(root: int) -> list[tuple[int, str]]:
    """The children of a process, and theirs, with the names of their programs."""
    return [(process, _read(Path(f"/proc/{process}/comm")).strip()) for process in _family(root)]


def is_loopback(address: str) -> bool:
    """Of an address as /proc/net/tcp and tcp6 write it."""
    return address in ("0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F")


def _family(root: int) -> list[int]:
    """A process and its children, and theirs."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (status := _read(folder / "stat")):
            parent = int(status.rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    family = [root]
    for process in family:
        family += children.get(process, [])
    return family


def _descriptors(process: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        return []  # the process has ended


def _target(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except OSError:
        return ""  # closed meanwhile


def _sockets(process: int) -> list[str]:
    targets = map(_target, _descriptors(process))
    return [target[8:-1] for target in targets if target.startswith("socket:[")]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # the process has ended
