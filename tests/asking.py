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
from raylway.job.schema import Replicas, Serve
from raylway.launch import serving
from raylway.runs.progress import Reporter

options = Serve(replicas=Replicas(min=1, max=1))
serving.serve(Path(sys.argv[1]), options, "127.0.0.1", int(sys.argv[2]), Reporter("lines"))
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
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
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
def server(bundle: Path, folder: Path, **variables: str) -> Iterator[Server]:
    """`raylway serve` of a bundle; yields once it is ready, and ends it as Ctrl-C in a terminal does."""
    port, log = free_port(), folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(bundle), str(port)],
            env=environment() | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
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
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (status := _read(folder / "stat")):
            parent = int(status.rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    family = [root]
    for process in family:
        family += children.get(process, [])
    owners = {inode: process for process in family for inode in _sockets(process)}
    found = []
    for table in ("tcp", "tcp6"):
        for line in _read(Path("/proc/net") / table).splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in owners:  # LISTEN
                address, port = fields[1].split(":")
                found.append((_read(Path(f"/proc/{owners[fields[9]]}/comm")).strip(), address, int(port, 16)))
    return found


def is_loopback(address: str) -> bool:
    """Of an address as /proc/net/tcp and tcp6 write it."""
    return address in ("0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F")


def _sockets(process: int) -> list[str]:
    names = []
    try:
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            try:
                target = str(descriptor.readlink())
            except OSError:
                continue  # closed meanwhile
            if target.startswith("socket:["):
                names.append(target[8:-1])
    except OSError:
        return []  # the process has ended
    return names


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # the process has ended
