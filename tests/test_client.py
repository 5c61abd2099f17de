"""The client against the real service over real HTTP, and against servers that are busy, hang up or are silent."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import asking
import made as making
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from asking import GOOD, KEY

from raylway.bundle.predictor import Predictor
from raylway.client import Answers, AsyncClient, Client, RequestFailed
from raylway.client import bodies as cutting
from serve_app import batching
from serve_app.keys import Keys
from serve_app.service import Service

FRAME = pd.DataFrame(
    {"length": [12.5, 6.0, 14.0], "width": [2.0, 2.5, 1.0], "colour": ["red", "green", "blue"]}, index=[7, 8, 9]
)
ROOM = batching.MAX_WAITING_BATCHES
ROWS: list[dict[str, Any]] = FRAME.to_dict("records")


class Recorder:
    """Passes requests on to a service, and keeps what it was asked; an ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.asked: list[dict[str, str]] = []
        self.busy = 0
        """So many of the next requests to `/predict` find the queue of the service full."""
        self.versions: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._service(scope, receive, send)
            return
        self.asked.append({name.decode(): value.decode() for name, value in scope["headers"]} | {"path": scope["path"]})
        full = self.busy > 0
        self.busy -= full
        batching.MAX_WAITING_BATCHES = 0 if full else ROOM
        try:
            await self._service(scope, receive, send)
        finally:
            batching.MAX_WAITING_BATCHES = ROOM


@pytest.fixture(scope="module")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(making.fruit().stage(tmp_path_factory.mktemp("fruit") / "bundle", name="fruit"))


@pytest.fixture(scope="module")
def server(fruit: Predictor) -> Iterator[tuple[Recorder, str]]:
    recorder = Recorder(Service(fruit, 64))
    with asking.local(recorder) as found:
        yield recorder, str(found.base_url)


@pytest.fixture
def recorder(server: tuple[Recorder, str]) -> Recorder:
    server[0].asked.clear()
    server[0].busy = 0
    return server[0]


@pytest.fixture
def client(server: tuple[Recorder, str]) -> Iterator[Client]:
    with Client(server[1], timeout_s=20) as found:
        yield found


def expected(fruit: Predictor) -> Any:
    return fruit.predict(pa.table({name: FRAME[name].tolist() for name in FRAME}))


TABLES: list[Callable[[], Any]] = [
    lambda: ROWS,
    lambda: iter(ROWS),
    lambda: FRAME,
    lambda: FRAME.astype({"colour": "category", "length": "float32"}),
    lambda: pa.Table.from_pylist(ROWS),
    lambda: pa.RecordBatch.from_pylist(ROWS),
    lambda: pl.DataFrame(ROWS),
    lambda: [row | {"length": np.float32(row["length"]), "width": Decimal(str(row["width"]))} for row in ROWS],
    lambda: [row | {"length": np.float64(row["length"]), "width": np.int64(row["width"])} for row in ROWS[::2]],
]


@pytest.mark.parametrize("table", TABLES)
def test_rows_of_whatever_holds_some(client: Client, fruit: Predictor, table: Callable[[], Any]) -> None:
    answers = client.predict(table())
    right = expected(fruit)
    rows = slice(None, None, 2) if len(answers.predictions) == 2 else slice(None)
    assert answers.predictions == right.labels[rows]
    found = np.array([[row["no"], row["yes"]] for row in answers.probabilities or ()], np.float32)
    assert found.tobytes() == np.ascontiguousarray(right.probabilities[rows]).tobytes()
    (model,) = answers.models
    assert (model.name, model.version) == ("fruit", fruit.bundle.record.version)
    assert answers.ids is None


def test_ids_and_no_rows(client: Client) -> None:
    assert client.predict(FRAME, ids=["a", 2, "c"]).ids == ["a", 2, "c"]
    assert client.predict([]).predictions == []
    with pytest.raises(ValueError, match="expected an id for each of 3 rows; found 1"):
        client.predict(FRAME, ids=["a"])


def test_signature_and_readiness(client: Client, fruit: Predictor) -> None:
    signature = client.signature()
    assert [(each.name, each.type, each.required) for each in signature.inputs] == [
        ("length", "number", True),
        ("width", "number", True),
        ("colour", "category", True),
    ]
    assert (signature.task, signature.target, signature.classes) == ("classification", "ripe", ["no", "yes"])
    assert signature.model.version == fruit.bundle.record.version
    assert client.ready()
    with Client(f"http://127.0.0.1:{asking.free_port()}") as nobody:
        assert not nobody.ready()


def test_a_regression_with_missing_cells(tmp_path: Path) -> None:
    table = pa.table({"size": [20.0, 80.0], "rooms": [1, 3], "place": ["NA", "EU"], "price": [20_000.0, 130_000.0]})
    kinds = {"size": "number", "rooms": "number?", "place": "category?"}
    predictor = Predictor(making.made(table, "price", kinds, steps=3).stage(tmp_path / "bundle"))
    frame = pd.DataFrame({"size": [100, 50], "rooms": [np.nan, 2.0], "place": ["EU", None]})
    right = predictor.predict(pa.Table.from_pandas(frame)).values
    with asking.local(Service(predictor, 64)) as server, Client(str(server.base_url)) as client:
        for rows in (frame, pl.from_pandas(frame), frame.to_dict("records")):
            answers = client.predict(rows)
            assert answers.probabilities is None
            assert answers.predictions == right.tolist()


def test_a_large_table_is_cut_and_comes_back_in_order(
    client: Client, recorder: Recorder, fruit: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "MOST_ROWS", 100)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"length": rng.uniform(5, 15, 950), "width": 2.0, "colour": "red"})
    right = fruit.predict(pa.Table.from_pandas(frame))
    answers = client.predict(frame, ids=range(950))
    assert answers.predictions == right.labels
    assert answers.ids == list(range(950))
    assert len(recorder.asked) == len({each["x-request-id"] for each in recorder.asked}) == 10
    recorder.asked.clear()
    monkeypatch.setattr(cutting, "MOST_BYTES", 2_000)
    assert client.predict(frame.head(300)).predictions == right.labels[:300]
    sizes = [int(each["content-length"]) for each in recorder.asked]
    assert len(sizes) > 3 and max(sizes) <= 2_000 + 20
    frame.loc[731, "length"] = np.nan
    with pytest.raises(RequestFailed) as caught:
        client.predict(frame)
    assert [(each.row, each.feature) for each in caught.value.problems] == [(731, "length")]


def test_mistakes_are_named_with_row_and_feature(client: Client) -> None:
    with pytest.raises(RequestFailed, match=r"(?s)422: row 1: length.*\n  row 2: colour is missing") as caught:
        client.predict([GOOD, GOOD | {"length": "long"}, {"length": 1, "width": 2}])
    failed = caught.value
    assert (failed.status, len(failed.request_id)) == (422, 32)
    assert [(each.row, each.feature) for each in failed.problems] == [(1, "length"), (2, "colour")]
    again = pickle.loads(pickle.dumps(failed))
    assert (again.status, again.problems, str(again)) == (422, failed.problems, str(failed))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.float32(np.inf)])
def test_what_json_can_not_say_is_not_sent(client: Client, recorder: Recorder, value: Any) -> None:
    with pytest.raises(RequestFailed, match="infinite") as caught:
        client.predict([GOOD, GOOD | {"width": value}])
    assert caught.value.status is None
    with pytest.raises(RequestFailed, match="the rows can't be sent: .*object is no number"):
        client.predict([GOOD | {"width": object()}])
    with pytest.raises(RequestFailed, match="infinite"):
        client.predict(FRAME.assign(width=np.inf))
    assert recorder.asked == []


def test_a_full_queue_is_waited_for_as_it_says(client: Client, recorder: Recorder, fruit: Predictor) -> None:
    recorder.busy = 2
    started = time.monotonic()
    assert client.predict(ROWS).predictions == expected(fruit).labels
    assert time.monotonic() - started >= 2  # Retry-After: 1, twice
    ids, patience = zip(
        *((each["x-request-id"], int(each["x-request-timeout-ms"])) for each in recorder.asked), strict=True
    )
    assert len(ids) == 3 and len(set(ids)) == 1
    assert 20_000 >= patience[0] > patience[1] + 999 > patience[2] + 1998


def test_nobody_waits_longer_than_the_deadline(server: tuple[Recorder, str], recorder: Recorder) -> None:
    recorder.busy = 100
    with (
        Client(server[1], timeout_s=0.5) as client,
        pytest.raises(RequestFailed, match="503: .* rows are waiting") as caught,
    ):
        client.predict(ROWS)
    assert caught.value.status == 503
    assert len(recorder.asked) == 1  # the second would have come a second later


def test_keys(fruit: Predictor) -> None:
    text = f"tests {KEY} 2/s; slow another-key-for-the-tests 0.1/s"
    with asking.local(Service(fruit, 64, Keys(text, "the test"))) as server:
        url = str(server.base_url)
        with Client(url) as client, pytest.raises(RequestFailed, match="401"):
            client.predict(ROWS)
        with Client(url, key=KEY, timeout_s=20) as client:  # two at once, the third when Retry-After says
            assert [len(client.predict(ROWS).predictions) for _ in range(3)] == [3, 3, 3]
        with Client(url, key="another-key-for-the-tests", timeout_s=3) as client:
            client.signature()
            with pytest.raises(RequestFailed, match="429: the key slow may send 0.1 requests a second"):
                client.signature()


def whole_request(line: socket.socket) -> bytes:
    heard = b""
    while not (found := re.search(rb"(?i)content-length: (\d+)(?s:.*?)\r\n\r\n", heard)) or (
        len(heard) < found.end() + int(found[1])
    ):
        heard += line.recv(1 << 16)
    return heard


@contextmanager
def cutting_line(port: int, cuts: int) -> Iterator[tuple[str, list[bytes]]]:
    """A line to a server that is cut so often in the middle of a request's answer; then it holds."""
    listener = socket.create_server(("127.0.0.1", 0))
    heard: list[bytes] = []

    def relay() -> None:
        while True:
            try:
                incoming, _ = listener.accept()
            except OSError:
                return
            with incoming:
                incoming.settimeout(10)
                heard.append(whole_request(incoming))
                if len(heard) <= cuts:
                    incoming.sendall(b"HTTP/1.1 200 OK\r\nContent-Le" if len(heard) % 2 else b"")
                    continue
                with socket.create_connection(("127.0.0.1", port)) as outgoing:
                    head, _, body = heard[-1].partition(b"\r\n\r\n")
                    outgoing.sendall(head + b"\r\nConnection: close\r\n\r\n" + body)
                    while part := outgoing.recv(1 << 16):
                        incoming.sendall(part)

    thread = threading.Thread(target=relay)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", heard
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(20)


def test_a_line_that_is_cut(server: tuple[Recorder, str], recorder: Recorder, fruit: Predictor) -> None:
    port = int(server[1].rpartition(":")[2])
    with cutting_line(port, cuts=3) as (url, heard), Client(url, timeout_s=20) as client:
        assert client.predict(ROWS).predictions == expected(fruit).labels
        assert len(heard) == 4


def test_a_server_that_comes_late_and_one_that_never_comes(fruit: Predictor) -> None:
    port = asking.free_port()
    url, words = f"http://127.0.0.1:{port}", "no answer: ConnectError"
    with Client(url, timeout_s=1) as client, pytest.raises(RequestFailed, match=words) as caught:
        client.predict(ROWS)
    assert caught.value.status is None
    with (
        Client("nowhere", timeout_s=20) as client,
        pytest.raises(RequestFailed, match="no answer: UnsupportedProtocol"),
    ):
        client.predict(ROWS)


@pytest.mark.parametrize("status", [502, 504])
def test_a_proxy_without_its_server(recorder: Recorder, fruit: Predictor, status: int) -> None:
    tries = 0

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        nonlocal tries
        tries += scope["type"] == "http"
        if scope["type"] == "http" and tries < 3:
            await send({"type": "http.response.start", "status": status, "headers": [(b"retry-after", b"soon")]})
            await send({"type": "http.response.body", "body": b"<html>Bad gateway</html>"})
            return
        await recorder(scope, receive, send)

    with asking.local(proxy) as found:
        with Client(f"{found.base_url}", timeout_s=20) as client:
            assert client.predict(ROWS).predictions == expected(fruit).labels
        tries = -1_000
        words = f"{status}: <html>Bad gateway</html>"
        with Client(f"{found.base_url}", timeout_s=0.2) as client, pytest.raises(RequestFailed, match=words):
            client.predict(ROWS)


def test_the_client_that_awaits(server: tuple[Recorder, str], recorder: Recorder, fruit: Predictor) -> None:
    async def ask() -> list[Answers]:
        async with AsyncClient(server[1], timeout_s=20) as client:
            assert await client.ready()
            assert (await client.signature()).target == "ripe"
            with pytest.raises(RequestFailed, match="422"):
                await client.predict([{}])
            recorder.busy = 1
            return await asyncio.gather(*(client.predict(FRAME) for _ in range(20)))

    for answers in asyncio.run(ask()):
        assert answers.predictions == expected(fruit).labels
    assert recorder.busy == 0


def test_the_client_that_awaits_and_hears_nothing(server: tuple[Recorder, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:

        async def ask() -> None:
            async with AsyncClient(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3) as client:
                with pytest.raises(RequestFailed, match="no answer: ReadTimeout"):
                    await client.predict(ROWS)

        asyncio.run(ask())
        url, words = f"http://127.0.0.1:{silent.getsockname()[1]}", "no answer: ReadTimeout"
        with Client(url, timeout_s=0.3) as client, pytest.raises(RequestFailed, match=words):
            client.predict(ROWS)


def test_an_answer_that_comes_byte_by_byte_is_not_waited_for_longer() -> None:
    sent = 0

    def trickle() -> None:
        nonlocal sent
        connection, _ = slow.accept()
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        with suppress(OSError):
            for _ in range(1000):
                connection.sendall(b" ")
                sent += 1
                time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as slow:
        threading.Thread(target=trickle, daemon=True).start()
        url = f"http://127.0.0.1:{slow.getsockname()[1]}"
        with Client(url, timeout_s=0.3) as client, pytest.raises(RequestFailed, match="no answer"):
            client.predict(ROWS)
    assert 0 < sent < 1000


@pytest.mark.parametrize(
    "value",
    [
        pd.Timestamp("2013-01-01T05:00"),
        np.datetime64("2013-01-01T05:00", "ns"),
        np.datetime64("2013-01-01T05:00", "s"),
        datetime(2013, 1, 1, 5),
    ],
)
def test_dates_in_whatever_form(value: Any) -> None:
    (body,) = cutting.bodies([{"when": value}], None)
    assert json.loads(body.content) == {"rows": [{"when": "2013-01-01T05:00:00"}]}


@pytest.mark.parametrize("value", [pd.NaT, pd.NA, np.datetime64("NaT"), np.float32("nan"), float("nan"), None])
def test_what_is_missing_in_whatever_form(value: Any) -> None:
    (body,) = cutting.bodies([{"when": value}], None)
    assert json.loads(body.content) == {"rows": [{"when": None}]}


def test_tables_with_dates() -> None:
    frame = pd.DataFrame({"when": pd.to_datetime(["2013-01-01T05:00", None])})
    for rows in (frame, frame.to_dict("records"), pl.from_pandas(frame), pa.Table.from_pandas(frame)):
        (body,) = cutting.bodies(cutting.records(rows), None)
        assert json.loads(body.content) == {"rows": [{"when": "2013-01-01T05:00:00"}, {"when": None}]}


def test_the_client_needs_neither_ray_nor_torch() -> None:
    script = "import sys, raylway.client\nprint({'ray', 'torch', 'pandas', 'pyarrow', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_an_answer_of_a_later_version(tmp_path: Path) -> None:
    content = {"predictions": [1.5], "model": {"name": "m", "version": "v", "colour": "red"}, "spread": [0.5]}

    async def later(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for _ in range(2):
                await send({"type": f"{(await receive())['type']}.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(content).encode()})

    with asking.local(later) as found, Client(str(found.base_url)) as client:
        assert client.predict([{}]).predictions == [1.5]
