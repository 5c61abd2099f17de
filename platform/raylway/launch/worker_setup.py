"""What every worker process of a cluster that we join does first; it imports little, because each of them waits for it.

- The user's own modules become importable: they are in the job's folder, which Ray unpacks elsewhere on every node.
- Training workers of several hosts find each other. PyTorch's gloo backend binds to the address that the host's own
  name resolves to; where that is the loopback address (a common `/etc/hosts`) the others can't reach it: `Gloo
  connectFullMesh failed ... remote=[127.0.0.1]`.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HOOK = "raylway.launch.worker_setup.prepare_worker"
_IMPORT_PATHS = "RAYLWAY_IMPORT_PATHS"
_SIOCGIFADDR = 0x8915
"""Linux: ask an interface for its IPv4 address."""


def runtime_env(import_paths: Sequence[str]) -> dict[str, Any]:
    """What the driver asks of its workers; inside a Ray job, Ray adds it to what the job asked for.

    Args:
        import_paths: Folders of the user's modules, absolute. In a job, those below the current folder travel with it
            and are found below the worker's current folder; else they must be the same on every node.
    """
    asked: dict[str, Any] = {"worker_process_setup_hook": _HOOK}
    paths = [Path(path) for path in import_paths]
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        here = Path.cwd()
        paths = [path.relative_to(here) if path.is_relative_to(here) else path for path in paths]
    else:
        asked["py_modules"] = packages()
    asked["env_vars"] = {_IMPORT_PATHS: os.pathsep.join(map(str, paths))}
    return asked


def packages() -> list[str]:
    """The folders of Raylway's two packages, to travel where they are not installed (or in another version)."""
    found = (importlib.util.find_spec(name) for name in ("raylway", "serve_app"))
    return [str(Path(str(spec.origin)).parent) for spec in found if spec is not None]


def prepare_worker() -> None:
    """Run by Ray in each new worker process, before its first task."""
    for path in reversed(os.environ.get(_IMPORT_PATHS, "").split(os.pathsep)):
        if path and str(Path(path).absolute()) not in sys.path:
            sys.path.insert(0, str(Path(path).absolute()))
    prefer_node_address()


def prefer_node_address() -> None:
    """Tell gloo the interface of the address by which Ray knows this host, if its name leads to loopback only.

    A user's own GLOO_SOCKET_IFNAME stays as it is.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or not _name_is_loopback():
        return
    import ray

    address = ray.util.get_node_ip_address()
    interface = interface_of(address)
    if interface is not None and not address.startswith("127."):
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def interface_of(address: str) -> str | None:
    """The name of the network interface that holds an IPv4 address; None if none does (IPv6: not looked for)."""
    try:
        wanted = socket.inet_aton(address)
    except OSError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # an interface without an IPv4 address
            if answer[20:24] == wanted:
                return name
    return None


def _name_is_loopback() -> bool:
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    except socket.gaierror:
        return True  # gloo takes loopback then
    return all(str(entry[4][0]).startswith("127.") for entry in found)
