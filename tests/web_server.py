"""A web server of the standard library whose files behave as they are told, over https or http."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


@dataclass
class Served:
    """One file and how the server gives it."""

    content: bytes = b""
    ranges: bool = True
    stamps: bool = True
    """Whether the server says ETag."""
    size: str = "length"
    """`length`, `chunks`, or `nothing`: the end of the connection is the end of the file."""
    statuses: list[int] = field(default_factory=list)
    """Of the next answers, which give nothing."""
    headers: dict[str, str] = field(default_factory=dict)
    cuts: int = 0
    """So many of the next answers are cut in their middle."""
    login: str = ""
    """The Authorization header that it takes."""
    before: Callable[[Served], None] = lambda served: None
    """Called with each request."""


@dataclass
class Web:
    """A running server."""

    address: str
    files: dict[str, Served] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Path and range of each request."""

    def put(self, path: str, content: bytes = b"", **how: object) -> str:
        """Serve a file; returns its address."""
        self.files[path] = Served(content, **how)  # type: ignore[arg-type]
        return f"{self.address}/{path}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(self.path.removeprefix("http://made.example").partition("?")[0].lstrip("/"))
        self.web.asked.append((path, self.headers.get("Range", "")))
        served = self.web.files.get(path)
        if served is None:
            self._empty(404)
            return
        served.before(served)
        if served.statuses:
            self._empty(served.statuses.pop(0), served.headers)
        elif served.login and self.headers.get("Authorization") != served.login:
            self._empty(401)
        else:
            self._give(served)

    def _empty(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def _give(self, served: Served) -> None:
        body, status, headers = served.content, 200, dict(served.headers)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if served.ranges else None
        if asked:
            first, last = int(asked[1]), min(int(asked[2]), len(body) - 1)
            status = 206 if first <= last else 416
            shown = f"{first}-{last}" if first <= last else "*"
            headers["Content-Range"] = f"bytes {shown}/{len(body)}"
            body = body[first : last + 1] if status == 206 else b""
        if served.stamps:
            headers["ETag"] = f'"{hashlib.md5(served.content).hexdigest()}"'
        is_cut = served.cuts > 0 and len(body) > 1
        served.cuts -= is_cut
        if served.size == "length":
            headers["Content-Length"] = str(len(body))
        elif served.size == "chunks":
            headers["Transfer-Encoding"] = "chunked"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        body = body[: len(body) // 2] if is_cut else body
        if served.size == "chunks":
            body = f"{len(body):x}\r\n".encode() + body + b"\r\n" + (b"" if is_cut else b"0\r\n\r\n")
        self.wfile.write(body)
        self.close_connection = self.close_connection or is_cut or served.size == "nothing"


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that do not trust the certificate, or hang up."""


@contextmanager
def serving(certificate: Path | None = None) -> Iterator[Web]:
    """A server on a free port; with a certificate (and its key in the same file) over https."""
    web = Web("")
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"web": web}))
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    web.address = f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def certify(path: Path) -> None:
    """Write a certificate of 127.0.0.1, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "made")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
