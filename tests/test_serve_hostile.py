"""Whatever comes over the wire: nothing is answered with a failure of ours, nothing stops, and no memory is filled.

The service runs in a process of its own behind the HTTP server that Ray Serve uses in its replicas, so that its memory
can be looked at and its end would be seen.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import asking
import made as making
import pytest
from asking import GOOD
from commands import environment
from hypothesis import given, settings
from hypothesis import strategies as st

_SERVER = """
import sys
from pathlib import Path
import uvicorn
from raylway.bundle.predictor import Predictor
from serve_app.service import Service

uvicorn.run(Service(Predictor(Path(sys.argv[1])), 64), host="127.0.0.1", port=int(sys.argv[2]), log_level="critical")
"""
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
MOST_GROWTH_MIB = 150
BODY = json.dumps({"rows": [GOOD]}).encode()
INFINITE_HEADERS = b"X-Filler: " + b"x" * 1000 + b"\r\n"


@dataclass(frozen=True)
class Target:
    """A running server."""

    port: int
    process: int

    def talk(self, *parts: bytes | float, silence_s: float = 5.0) -> bytes:
        """Send parts on one connection, a number between them being a pause in seconds, and hear until the server
        closes or says nothing for so long."""
        heard = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as line:
            with suppress(ConnectionError, TimeoutError):  # the server may hang up while we speak
                for part in parts:
                    if isinstance(part, float):
                        time.sleep(part)
                    else:
                        line.sendall(part)
            line.settimeout(silence_s)
            with suppress(ConnectionError, TimeoutError):
                while part := line.recv(1 << 16):
                    heard += part
        return heard

    def lives(self) -> None:
        """A good request is answered."""
        heard = self.talk(post(BODY))
        assert statuses(heard) == [200], heard[:500]
        answer = json.loads(heard.partition(b"\r\n\r\n")[2])
        assert answer["predictions"] == ["yes"]

    @property
    def most_mib(self) -> int:
        """The most memory that the process ever had."""
        text = Path(f"/proc/{self.process}/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", text)[0]) >> 10


def statuses(heard: bytes) -> list[int]:
    return [int(each) for each in _STATUS.findall(heard)]


def post(body: bytes, *fields: str, path: str = "/predict", length: int | str | None = None) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: here", "Connection: close", *fields]
    if length != "":
        head.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


def chunked(*chunks: bytes) -> bytes:
    return post(b"", "Transfer-Encoding: chunked", length="") + b"".join(chunks)


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    bundle = making.fruit().stage(tmp_path_factory.mktemp("fruit") / "bundle", name="fruit")
    port = asking.free_port()
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(bundle), str(port)], env=environment())
    try:
        found = Target(port, server.pid)
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None and time.monotonic() < deadline
            with suppress(ConnectionRefusedError):
                found.talk(post(BODY))
                break
            time.sleep(0.1)
        yield found
        assert server.poll() is None
    finally:
        server.terminate()
        server.wait(20)


DEEP = 100_000
BODIES: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "no JSON": (b"rows", 400),
    "a number": (b"1.0", 422),
    "true": (b"true", 422),
    "text": (b'"rows"', 422),
    "null": (b"null", 422),
    "invalid UTF-8": (b'{"rows": [{"length": 1, "width": 2, "colour": "\xff\xfe"}]}', 400),
    "UTF-16": ('{"rows": []}'.encode("utf-16"), 400),
    "a byte order mark": (b"\xef\xbb\xbf" + BODY, 400),
    "a zero byte": (BODY + b"\0", 400),
    "a zero byte in text": (BODY.replace(b"red", b"r\0d"), 400),
    "an escaped zero byte": (BODY.replace(b"red", b"r\\u0000d"), 200),
    "a lone surrogate": (BODY.replace(b"red", b"\\ud800"), 400),
    "half a pair as a name": (BODY.replace(b"colour", b"\\udfff"), 400),
    "nested lists": (b"[" * DEEP, 400),
    "nested objects": (b'{"rows":' * DEEP, 400),
    "nested in a row": (BODY.replace(b'"red"', b"[" * DEEP + b"]" * DEEP), 400),
    "a number beyond floats": (BODY.replace(b"12.5", b"1e999"), 422),
    "a number of many digits": (BODY.replace(b"12.5", b"9" * 5_000), 400),
    "a fraction of many digits": (BODY.replace(b"12.5", b"0." + b"9" * 100_000), 200),
    "an exponent of many digits": (BODY.replace(b"12.5", b"1e" + b"9" * 100_000), 422),
    "NaN": (BODY.replace(b"12.5", b"NaN"), 400),
    "a number with a zero before it": (BODY.replace(b"12.5", b"012.5"), 400),
    "one name twice": (BODY.replace(b'"length": 12.5', b'"length": "x", "length": 12.5'), 422),
    "one name twice, both good": (BODY.replace(b'"length": 12.5', b'"length": 1, "length": 12.5'), 200),
    "rows twice": (b'{"rows": [{}], "rows": []}', 422),
    "many names": (b'{"rows": [{' + b",".join(b'"%d": 1' % each for each in range(50_000)) + b"}]}", 422),
    "a long name": (b'{"rows": [{"' + b"x" * 1_000_000 + b'": 1}]}', 422),
    "many empty rows": (b'{"rows": [' + b",".join([b"{}"] * 200_000) + b"]}", 422),
    "many commas": (b"[" + b"," * 1_000_000, 400),
    "a long text": (BODY.replace(b"red", b"r" * 10_000_000), 200),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body(target: Target, name: str) -> None:
    body, status = BODIES[name]
    heard = target.talk(post(body))
    assert statuses(heard) == [status], heard[:500]
    json.loads(heard.partition(b"\r\n\r\n")[2])
    for path in ("/invocations", "/v2/models/fruit/infer"):
        assert statuses(target.talk(post(body, path=path)))[0] in (400, 422)
    assert statuses(target.talk(post(body, "Content-Type: text/csv", path="/invocations")))[0] in (400, 422)
    target.lives()


MANY = 10_000
NO_REQUEST = (400, 431, 505)
WIRE: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "many headers": (post(BODY, *(f"X-{place}: 1" for place in range(MANY))), (200, 400, 431)),
    "one header of a mebibyte": (post(BODY, "X-Long: " + "x" * (1 << 20)), (200, 400, 431)),
    "one header again and again": (post(BODY, *["X-Request-ID: 1"] * MANY), (200, 400, 431)),
    "a header that is no text": (post(BODY, "X-Request-ID: \xff\xfe\xfd"), (200, 400)),
    "a header with a zero byte": (post(BODY, "X-Request-ID: a\0b"), NO_REQUEST),
    "a header without a colon": (post(BODY, "hello"), NO_REQUEST),
    "a folded header": (post(BODY, "X-Folded: a\r\n b"), (200, 400)),
    "a strange patience": (post(BODY, "X-Request-Timeout-Ms: \xb2"), (400,)),
    "an endless patience": (post(BODY, "X-Request-Timeout-Ms: " + "9" * 10_000), (400,)),
    "a path of a mebibyte": (post(BODY, path="/" + "x" * (1 << 20)), (400, 404, 414)),
    "a path that is no text": (post(BODY, path="/predict\xff"), (400, 404)),
    "a path with a zero byte": (post(BODY, path="/predict%00"), (404,)),
    "a path with half a character": (post(BODY, path="/%ff%fe"), (404,)),
    "a path that climbs": (post(BODY, path="/../../etc/passwd"), (404,)),
    "a path with the name of a host": (post(BODY, path="http://elsewhere/predict"), (200, 400, 404)),
    "no path": (b"POST  HTTP/1.1\r\n\r\n", NO_REQUEST),
    "the asterisk": (b"OPTIONS * HTTP/1.1\r\nConnection: close\r\n\r\n", (400, 404, 405)),
    "another method": (post(BODY).replace(b"POST", b"PATCH", 1), (405,)),
    "a method that nobody knows": (post(BODY).replace(b"POST", b"BREW", 1), (400, 405)),
    "a tunnel": (b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: elsewhere\r\nConnection: close\r\n\r\n", (400, 404, 405)),
    "no version": (b"GET /readyz\r\n\r\n", (200, 400, 505)),
    "the version of tomorrow": (post(BODY).replace(b"HTTP/1.1", b"HTTP/9.9", 1), NO_REQUEST),
    "the version of yesterday": (post(BODY).replace(b"HTTP/1.1", b"HTTP/1.0", 1), (200,)),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 100, NO_REQUEST),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), NO_REQUEST),
    "noise": (bytes(range(256)) * 400, NO_REQUEST),
    "a length that is no number": (post(BODY, length="many"), NO_REQUEST),
    "a negative length": (post(BODY, length=-1), NO_REQUEST),
    "a length beyond 64 bits": (post(BODY, length=1 << 70), (*NO_REQUEST, 413)),
    "a length of 200 MB": (post(BODY, length=200_000_000), (413,)),
    "a length that is too short": (post(BODY, length=10), (400,)),
    "two lengths": (post(BODY, "Content-Length: 1"), NO_REQUEST),
    "a length and chunks": (post(chunk(BODY) + b"0\r\n\r\n", "Transfer-Encoding: chunked"), (200, 400)),
    "chunks": (chunked(*(chunk(BODY[place : place + 1]) for place in range(len(BODY))), b"0\r\n\r\n"), (200,)),
    "chunks and more headers": (chunked(chunk(BODY), b"0\r\nX-Later: 1\r\n\r\n"), (200, 400)),
    "a chunk of no size": (chunked(b"size\r\n", BODY), NO_REQUEST),
    "a chunk beyond 64 bits": (chunked(b"f" * 40 + b"\r\n", BODY), NO_REQUEST),
    "a chunk with a long remark": (chunked(b"1;" + b"x" * (1 << 20) + b"\r\nx\r\n0\r\n\r\n"), (200, 400, 413)),
    "unknown coding": (post(b"", "Transfer-Encoding: gzip", length="") + BODY, (400, 415, 501)),
    "a compressed body": (post(BODY, "Content-Encoding: gzip"), (415,)),
    "another type": (post(BODY, "Content-Type: text/plain; charset=\xff"), (415,)),
    "an upgrade": (post(BODY, "Connection: Upgrade", "Upgrade: h2c"), (200, 400)),
    "first a question": (post(BODY, "Expect: 100-continue"), (100, 200)),
    "a strange question": (post(BODY, "Expect: the Spanish inquisition"), (200, 417)),
    "a binary part that is not there": (
        post(BODY, "Inference-Header-Content-Length: 99999999999999999999", path="/v2/models/fruit/infer"), (400,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WIRE)
def test_on_the_wire(target: Target, name: str) -> None:
    sent, allowed = WIRE[name]
    heard = target.talk(sent)
    found = statuses(heard)
    assert found, heard
    assert set(found) <= set(allowed), heard[:500]
    target.lives()


def test_a_web_socket(target: Target) -> None:
    fields = ("Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
    sent = post(b"", "Connection: Upgrade", *fields).replace(b"POST", b"GET").replace(b"Connection: close\r\n", b"")
    assert statuses(target.talk(sent)) == [403]
    target.lives()


def test_bodies_that_do_not_end(target: Target) -> None:
    """Neither the length that was said nor the bytes that come are kept."""
    filler = bytes(1 << 20)
    before = target.most_mib
    for sent in (
        [post(b"", length=200_000_000), *[filler] * 200],
        [chunked(), *[chunk(filler)] * 200],
        [chunked(), *[chunk(filler[:1000])] * 40_000],
    ):
        heard = target.talk(*sent, silence_s=2)
        # the answer may be lost where the server hangs up on what we still send
        assert set(statuses(heard)) <= {413}
        target.lives()
    assert target.most_mib - before < MOST_GROWTH_MIB


def test_who_speaks_slowly_is_told_so(target: Target) -> None:
    slow = "X-Request-Timeout-Ms: 300"
    for sent in (
        [post(b"", slow, length=50)],
        [post(b"", slow, length=50), *(part for _ in range(8) for part in (b" ", 0.05))],
        [post(b"", slow, "Transfer-Encoding: chunked", length=""), b"1\r\n \r\n"],
    ):
        assert statuses(target.talk(*sent)) == [408]
        target.lives()


def test_who_hangs_up_harms_nobody(target: Target) -> None:
    whole = post(BODY)
    for place in range(1, len(whole)):
        with socket.create_connection(("127.0.0.1", target.port)) as line:
            line.sendall(whole[:place])
    for _ in range(50):  # all of the request, and gone before the answer
        with socket.create_connection(("127.0.0.1", target.port)) as line:
            line.sendall(whole)
    target.lives()


def test_many_who_never_speak(target: Target) -> None:
    lines = [socket.create_connection(("127.0.0.1", target.port)) for _ in range(300)]
    for place, line in enumerate(lines):
        line.sendall(post(BODY)[: place % 100])
    target.lives()
    for line in lines:
        line.close()
    target.lives()


def test_requests_behind_each_other_on_one_line(target: Target) -> None:
    keep = post(BODY).replace(b"Connection: close", b"X-Filler: none")
    bad = post(b"{", length=1).replace(b"Connection: close", b"X-Filler: none")
    heard = target.talk(keep * 50 + bad + keep * 50 + post(BODY))
    assert statuses(heard) == [200] * 50 + [400] + [200] * 51
    # what comes behind a request that can't be read in form is not read
    heard = target.talk(keep + post(BODY, length="many") + keep)
    assert statuses(heard) in ([200, 400], [400])
    target.lives()


WORDS = st.sampled_from(
    ["rows", "data", "ids", "inputs", "instances", "dataframe_split", "columns", *GOOD, "", "\0", "é"]
)
SCALARS = st.none() | st.booleans() | st.floats() | st.integers() | WORDS | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=12
)
ROWISH = st.dictionaries(WORDS, SCALARS, max_size=4) | st.lists(SCALARS, max_size=4)
REQUESTS = st.dictionaries(WORDS, st.lists(ROWISH, max_size=4) | VALUES, max_size=3)
PATHS = st.sampled_from(["/predict", "/invocations", "/v2/models/fruit/infer"])


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """JSON that is nearly a request, and then perhaps bytes changed."""
    body = bytearray(json.dumps(draw(VALUES | REQUESTS)).encode())
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(body)))
        body[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(body)


def drawn(target: Target, sent: Iterable[tuple[str, bytes]]) -> None:
    """Send requests on one line, each answered without a failure."""
    with socket.create_connection(("127.0.0.1", target.port), timeout=20) as line:
        answers = line.makefile("rb")
        for path, body in [*sent, ("/predict", BODY)]:
            line.sendall(post(body, path=path).replace(b"Connection: close", b"X-Filler: none"))
            status = int(answers.readline().split()[1])
            length = 0
            while (field := answers.readline()) != b"\r\n":
                if field.lower().startswith(b"content-length:"):
                    length = int(field.partition(b":")[2])
            content = json.loads(answers.read(length), parse_constant=asking._refuse)
            assert status in (200, 400, 422), (status, path, body, content)
        assert (status, content["predictions"]) == (200, ["yes"])


@given(st.lists(st.tuples(PATHS, bodies()), min_size=1, max_size=10))
@settings(max_examples=40)
def test_drawn_bodies(target: Target, sent: list[tuple[str, bytes]]) -> None:
    drawn(target, sent)
