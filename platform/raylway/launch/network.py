"""Which network interface the training workers of several hosts talk over.

PyTorch's gloo backend binds to the address that the host's own name resolves to. Where that is the loopback address (a
common `/etc/hosts`) workers on other hosts can't reach it: `Gloo connectFullMesh failed ... remote=[127.0.0.1]`. This
module runs in every worker process of a cluster that we join, before anything else, so it imports the standard library
only.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

HOOK = "raylway.launch.network.prefer_node_address"
_SIOCGIFADDR = 0x8915
"""Linux: ask an interface for its IPv4 address."""


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
