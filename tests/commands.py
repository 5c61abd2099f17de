"""Run the command line as a user does: a process of its own, in a folder of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """Without the session's own Ray, so that the command decides for itself."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTEST_"))}


def raylway(*arguments: str | Path, folder: Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """`raylway ARGUMENTS` in `folder`; returns with code and both outputs."""
    return subprocess.run(
        [sys.executable, "-m", "raylway", *map(str, arguments)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@contextmanager
def serving(*arguments: str | Path, folder: Path) -> Iterator[httpx.Client]:
    """`raylway serve ARGUMENTS` on a free port; yields a client and ends it as Ctrl-C does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / f"serve-{port}.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "raylway", "serve", *map(str, arguments), "--port", str(port)],
            cwd=folder,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                _wait_until_ready(client, server, log)
                yield client
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 130, log.read_text()


def _wait_until_ready(client: httpx.Client, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not ready: {log.read_text()}")
