"""Serving over HTTP: the application by itself, behind Ray's own proxy, behind HAProxy; all holds in all three."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asking
import httpx
import leaving
import msgspec
import numpy as np
import pyarrow as pa
import pytest
from asking import GOOD, MISTAKES, Server, ask, strict

from raylway import storage
from raylway.bundle import contents, examples
from raylway.bundle.predictor import Predictor
from raylway.errors import RunFailed
from raylway.job.schema import Serve
from raylway.launch import applications
from serve_app import app as serve_app
from serve_app import service
from serve_app.keys import Keys
from serve_app.service import Service


@pytest.fixture(scope="module")
def haproxy(fruit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with asking.server(fruit, tmp_path_factory.mktemp("haproxy")) as found:
        yield found


@pytest.fixture(scope="module", params=["the application", "Ray's own proxy", "HAProxy"])
def client(request: pytest.FixtureRequest, fruit: Path) -> Iterator[httpx.Client]:
    if request.param == "the application":
        with asking.local(Service(Predictor(fruit), 64, Keys(asking.KEYS, "the test"))) as found:
            yield found
    elif request.param == "HAProxy":
        yield request.getfixturevalue("haproxy").client
    else:
        from ray import serve

        address = request.getfixturevalue("ray_serve")
        keys = fruit.with_name("keys")
        keys.write_text(asking.KEYS)
        application = serve_app.build({"bundle": str(fruit), "max_replicas": "1", "keys": str(keys)})
        serve.run(application, name="fruit", route_prefix="/fruit")
        with httpx.Client(base_url=f"{address}/fruit", timeout=30, headers=asking.ALLOWED) as found:
            yield found
        serve.delete("fruit")


def test_both_forms_of_a_request(client: httpx.Client, fruit: Path) -> None:
    status, answer = ask(client, GOOD, GOOD | {"length": 6})
    assert status == 200
    assert answer["predictions"] == ["yes", "no"]
    record = contents.load(fruit).record
    assert answer["model"] == {"name": "fruit", "version": record.version}
    nested = client.post("/predict", json={"data": [[12.5, 2.0, "red"], [6, 2.0, "red"]]})
    assert strict(nested) == [[row["no"], row["yes"]] for row in answer["probabilities"]]
    assert [set(row) for row in answer["probabilities"]] == [{"no", "yes"}] * 2


def test_rows_with_the_names_that_their_client_gives_them(client: httpx.Client) -> None:
    answer = client.post("/predict", json={"rows": [GOOD, GOOD | {"length": 6}], "ids": ["a/17", 18]})
    assert strict(answer)["ids"] == ["a/17", 18]
    assert strict(answer)["predictions"] == ["yes", "no"]
    refused = client.post("/predict", json={"rows": [GOOD], "ids": ["a", "b"]})
    assert (refused.status_code, strict(refused)["detail"][:18]) == (422, "expected a list of")


def test_the_forms_of_other_servers(client: httpx.Client) -> None:
    """What they may hold is in test_serve_forms; here that their paths, headers and bytes reach the application."""
    right = strict(client.post("/predict", json={"rows": [GOOD]}))
    csv = client.post("/invocations", content="length,width,colour\n12.5,2,red\n", headers={"Content-Type": "text/csv"})
    assert strict(csv) == right
    tensors = [
        {"name": "length", "shape": [1], "datatype": "FP64", "parameters": {"binary_data_size": 8}},
        {"name": "width", "shape": [1], "datatype": "FP64", "data": [2.0]},
        {"name": "colour", "shape": [1], "datatype": "BYTES", "data": ["red"]},
    ]
    head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
    answer = client.post(
        "/v2/models/fruit/infer",
        content=head + np.array([12.5]).tobytes(),
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    described = json.loads(answer.content[: int(answer.headers["inference-header-content-length"])])
    assert described["outputs"][1]["parameters"] == {"binary_data_size": 8}
    assert answer.content[-8:] == np.array(list(right["probabilities"][0].values()), np.float32).tobytes()
    assert answer.headers["content-type"] == "application/octet-stream"
    for path in (
        "/ping",
        "/health",
        "/version",
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/fruit/ready",
    ):
        assert client.get(path).status_code == 200


def test_the_served_bits_are_the_predictors(client: httpx.Client, fruit: Path) -> None:
    rng = np.random.default_rng(9)
    columns = {
        "length": rng.uniform(0, 20, 300),
        "width": rng.uniform(0, 5, 300),
        "colour": rng.choice(["red", "green", "blue"], 300),
    }
    table = pa.table(columns)
    expected = Predictor(fruit).predict(table).probabilities
    rows = table.to_pylist()
    _, together = ask(client, *rows)
    with ThreadPoolExecutor(16) as pool:
        singles = list(pool.map(lambda row: ask(client, row)[1]["probabilities"][0], rows[:100]))
    for found, count in ((together["probabilities"], 300), (singles, 100)):
        bits = np.array([[row["no"], row["yes"]] for row in found], np.float32)
        assert bits.tobytes() == expected[:count].tobytes()  # type: ignore[index]


@pytest.mark.parametrize(("row", "feature"), MISTAKES)
def test_a_callers_mistake_is_named(client: httpx.Client, row: Any, feature: str | None) -> None:
    answer = client.post("/predict", json={"rows": [GOOD, row]})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    problem = strict(answer)
    assert problem["status"] == 422
    assert (problem["errors"][0]["row"], problem["errors"][0]["feature"]) == (1, feature)
    assert problem["detail"].startswith(f"row 1: {feature or 'expected an object'}")
    assert ask(client, GOOD)[1]["predictions"] == ["yes"]


@pytest.mark.parametrize("value", [5, 5.0, True, "blue", "NA", "x" * 5000])
def test_a_category_that_training_did_not_see_is_accepted(client: httpx.Client, value: Any) -> None:
    assert ask(client, GOOD | {"colour": value})[1]["predictions"] == ["yes"]


def test_an_empty_text_is_a_missing_cell_as_in_a_file(client: httpx.Client) -> None:
    status, answer = ask(client, GOOD | {"colour": ""})
    assert status == 422
    assert "colour" in json.dumps(answer)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "null", "1" + "0" * 400])
def test_numbers_that_are_not_finite(client: httpx.Client, number: str) -> None:
    body = b'{"rows":[{"length":%s,"width":2.0,"colour":"red"}]}' % number.encode()
    answer = client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert "length" in strict(answer)["detail"] or "not valid JSON" in strict(answer)["detail"]
    assert ask(client, GOOD)[1]["predictions"] == ["yes"]


@pytest.mark.parametrize("number", [1e308, -1e308, 5e-324, 0])
def test_wild_finite_numbers_are_answered(client: httpx.Client, number: float) -> None:
    status, answer = ask(client, GOOD | {"length": number, "width": number})
    assert status == 200
    assert sum(answer["probabilities"][0].values()) == pytest.approx(1)


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 10_000])
def test_any_number_of_rows_in_their_order(client: httpx.Client, count: int) -> None:
    ripe = [index * index % 7 < 2 for index in range(count)]
    rows = [GOOD | {"length": (11.5 if yes else 5.5) + index % 5 / 4} for index, yes in enumerate(ripe)]
    started = time.monotonic()
    status, answer = ask(client, *rows)
    assert status == 200
    assert answer["predictions"] == ["yes" if yes else "no" for yes in ripe]
    assert len(answer["probabilities"]) == count
    assert time.monotonic() - started < 30
    assert strict(client.post("/predict", json={"data": []})) == []


@pytest.mark.parametrize(
    "bad", [{"length": "two"}, {"length": None}, {"length": [2.0]}, {"length": "nan"}, {"lenght": 1.0}]
)
def test_one_bad_request_among_good_ones(client: httpx.Client, bad: dict[str, Any]) -> None:
    good = [GOOD | {"length": (12.0 if index % 3 else 6.0) + index / 50} for index in range(20)]
    right = [(200, ["yes" if index % 3 else "no"]) for index in range(20)]

    def send(row: dict[str, Any]) -> tuple[int, Any]:
        status, answer = ask(client, row)
        return status, answer.get("predictions")

    with ThreadPoolExecutor(21) as pool:
        together = list(pool.map(send, [*good[:7], GOOD | bad, *good[7:]]))
        assert together.pop(7) == (422, None)
        assert together == right
        assert list(pool.map(send, good)) == right


@pytest.mark.parametrize(
    "body",
    [b"", b"rows", b'{"rows":', b"\xff\xfe", b'{"rows":[{"colour":"\\ud800"}]}', b"[" * 200_000, b'{"a":' * 100_000],
)
def test_what_is_not_json(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "not valid JSON" in strict(answer)["detail"]


def test_media_types(client: httpx.Client) -> None:
    body = json.dumps({"rows": [GOOD]}).encode()
    for kind in ("application/json; charset=utf-8", "application/vnd.own+json", "Application/JSON"):
        assert client.post("/predict", content=body, headers={"Content-Type": kind}).status_code == 200
    assert client.post("/predict", content=body).status_code == 200  # none is named
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = client.post("/predict", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 415
        assert strict(answer)["detail"] == f"expected the header Content-Type: application/json; found {kind}"
    packed = client.post("/predict", content=body, headers={"Content-Encoding": "gzip"})
    assert packed.status_code == 415


def test_a_body_that_is_too_large(client: httpx.Client) -> None:
    whole = service.MAX_BODY_BYTES

    def pieces() -> Iterator[bytes]:
        for _ in range(whole // 2**20 + 1):
            yield b" " * 2**20

    with_length = client.post("/predict", content=b" " * (whole + 1), headers={"Content-Type": "application/json"})
    in_pieces = client.post("/predict", content=pieces(), headers={"Content-Type": "application/json"})
    for answer in (with_length, in_pieces):
        assert answer.status_code == 413
        assert "16,777,216 bytes" in strict(answer)["detail"]
    assert ask(client, GOOD)[0] == 200


def test_paths_and_methods(client: httpx.Client) -> None:
    for path in ("/", "/docs"):
        page = client.get(path)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "predict" in page.text
    assert strict(client.get("/healthz")) == {"status": "ok"}
    assert strict(client.get("/readyz"))["status"] == "ready"
    signature = strict(client.get("/signature"))
    assert [each["name"] for each in signature["inputs"]] == ["length", "width", "colour"]
    assert signature["classes"] == ["no", "yes"]
    assert strict(client.get("/nowhere"))["status"] == 404
    for method, path, allowed in (("GET", "/predict", "POST"), ("POST", "/signature", "GET, HEAD")):
        answer = client.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    head = client.head("/docs")
    assert (head.status_code, head.content) == (200, b"")


def test_who_shows_no_key_learns_nothing(client: httpx.Client) -> None:
    client = httpx.Client(base_url=client.base_url)
    for path in ("/predict", "/invocations", "/v2/models/fruit/infer"):
        answer = client.post(path, json={"rows": [GOOD]})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.headers["content-type"] == "application/problem+json"
    for path in ("/signature", "/openapi.json", "/v2", "/v2/models/fruit", "/nowhere", "/predict", "/version"):
        assert client.get(path).status_code == 401
    for path in ("/", "/docs", "/healthz", "/readyz", "/ping", "/health", "/v2/health/live", "/v2/health/ready"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "fruit" not in answer.text or path == "/readyz"
    for wrong in ({"Authorization": "Bearer wrong"}, {"Authorization": asking.KEY}, {"X-API-Key": asking.KEY[:-1]}):
        assert client.get("/signature", headers=wrong).status_code == 401
    assert client.get("/signature", headers={"X-API-Key": asking.KEY}).status_code == 200


def test_headers_of_every_answer(client: httpx.Client) -> None:
    for answer in (client.get("/docs"), client.get("/nowhere"), client.post("/predict", json={"rows": [GOOD]})):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in client.get("/docs").headers["content-security-policy"]


def test_how_long_a_client_waits(client: httpx.Client) -> None:
    for text in ("0", "-1", "1.5", "soon", "300001", "9" * 400):
        answer = client.post("/predict", json={"rows": [GOOD]}, headers={"X-Request-Timeout-Ms": text})
        assert answer.status_code == 400
        assert "X-Request-Timeout-Ms" in strict(answer)["detail"]
    assert client.post("/predict", json={"rows": [GOOD]}, headers={"X-Request-Timeout-Ms": "20000"}).status_code == 200


def test_a_body_that_does_not_come(client: httpx.Client) -> None:
    address = (client.base_url.host, client.base_url.port)
    head = f"POST {client.base_url.path}predict HTTP/1.1\r\nHost: here\r\nX-API-Key: {asking.KEY}\r\n"
    head += "X-Request-Timeout-Ms: 200\r\nContent-Length: 50\r\nContent-Type: application/json\r\n\r\n"
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(head.encode() + b'{"rows":')
        assert b"408" in connection.recv(4096).splitlines()[0]
    assert ask(client, GOOD)[0] == 200


def test_a_replica_whose_bundle_fails_its_check_does_not_start(fruit: Path, tmp_path: Path, ray_serve: str) -> None:
    bundle = Path(shutil.copytree(fruit, tmp_path / "bundle"))
    recorded = examples.read(bundle)
    storage.write_record(bundle / contents.EXAMPLES, msgspec.structs.replace(recorded, outputs=recorded.outputs[::-1]))
    record = storage.read_record(bundle / contents.RECORD, contents.BundleRecord)
    storage.write_record(bundle / contents.RECORD, msgspec.structs.replace(record, files=contents.listed(bundle)))
    model = applications.Model("wrong", bundle, Serve())
    with pytest.raises(RunFailed) as caught, applications.deployed([model], {}):
        pass
    expected = f"the model does not start: RunFailed: {bundle}: the model's answers to the bundle's own examples differ"
    assert str(caught.value).startswith(expected)


def test_two_replicas_under_load_and_one_after(fruit: Path, ray_serve: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request fails while a replica comes and goes."""
    from ray import serve

    monkeypatch.setattr(serve_app, "UPSCALE_DELAY_S", 1.0)
    monkeypatch.setattr(serve_app, "DOWNSCALE_DELAY_S", 2.0)
    application = serve_app.build({"bundle": str(fruit), "min_replicas": 1, "max_replicas": 2, "max_batch": 2})
    serve.run(application, name="busy", route_prefix="/busy")

    def running() -> int:
        states = serve.status().applications["busy"].deployments["model"].replica_states
        return sum(states.values())

    wrong: list[int] = []
    loaded, quiet = threading.Event(), threading.Event()

    def load(client: httpx.Client, stop: threading.Event) -> None:
        while not stop.is_set():
            status = client.post("/predict", json={"rows": [GOOD]}).status_code
            if status != 200:
                wrong.append(status)

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 90
        while running() != count:
            assert time.monotonic() < deadline, serve.status()
            time.sleep(0.2)

    assert running() == 1
    with httpx.Client(base_url=f"{ray_serve}/busy", timeout=30) as client, ThreadPoolExecutor(9) as pool:
        work = [pool.submit(load, client, loaded) for _ in range(8)]
        try:
            wait_for(2)
        finally:
            loaded.set()
        trickle = pool.submit(load, client, quiet)
        try:
            wait_for(1)
        finally:
            quiet.set()
        for each in (*work, trickle):
            each.result()
    assert wrong == []
    serve.delete("busy")


@pytest.mark.parametrize("client", ["Ray's own proxy", "HAProxy"], indirect=True)
def test_what_is_known_of_the_requests_afterwards(
    client: httpx.Client, fruit: Path, request: pytest.FixtureRequest
) -> None:
    """The metrics of one address are those of all its replicas; a line of the log holds no value of a row."""
    is_ours = request.node.callspec.params["client"] == "HAProxy"
    root = request.getfixturevalue("haproxy").process.pid if is_ours else os.getpid()
    leaving.notes(client, root, contents.load(fruit).record.version)


KNOWN = {"gcs_server", "raylet", "python", "ray::DashboardA", "ray::RuntimeEnv"}
KNOWN_OF_SERVE = {"ray::ServeContr", "ray::ProxyActor", "ray::HAProxyMan", "ray::ServeRepli"}


def test_what_listens_elsewhere_than_on_loopback_with_rays_own_proxy(fruit: Path, tmp_path: Path) -> None:
    with asking.server(fruit, tmp_path, RAY_SERVE_ENABLE_HA_PROXY="0") as server:
        assert "through Ray's own proxy" in server.said
        found = only_rays_own_ports(server)
    assert "haproxy" not in {name for name, _, _ in found}


def test_what_listens_elsewhere_than_on_loopback_with_haproxy(haproxy: Server) -> None:
    found = only_rays_own_ports(haproxy)
    assert [name for name, address, _ in found if name == "haproxy" and asking.is_loopback(address)] == ["haproxy"] * 3


def only_rays_own_ports(server: Server) -> list[tuple[str, str, int]]:
    """Beyond loopback there are Ray's own ports (docs/serving.md names each), and none answers for the model."""
    found = asking.listening(server.process.pid)
    assert any(port == server.client.base_url.port and asking.is_loopback(address) for _, address, port in found)
    elsewhere = [(name, port) for name, address, port in found if not asking.is_loopback(address)]
    assert {re.sub(r"\d", "", name) for name, _ in elsewhere} <= KNOWN | KNOWN_OF_SERVE
    for _, port in elsewhere:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/signature", timeout=2)
        except httpx.HTTPError:
            continue  # gRPC, or another address of this machine
        assert "inputs" not in answer.text
    return found


def test_haproxy_takes_the_requests_and_the_command_shown_works(haproxy: Server) -> None:
    assert "through HAProxy" in haproxy.said
    command = next(line for line in haproxy.said.splitlines() if line.startswith("try it:"))
    command = command.removeprefix("try it:").replace("Bearer KEY", f"Bearer {asking.KEY}")
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["predictions"][0] in ("yes", "no")


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return leaving.slow_bundle(tmp_path, monkeypatch)


def test_a_client_that_goes_away_from_rays_own_proxy(slow: Path, ray_serve: str) -> None:
    from ray import serve

    keys = slow.with_name("keys")
    keys.write_text(asking.KEYS)
    application = serve_app.build({"bundle": str(slow), "max_replicas": 1, "keys": str(keys)})
    serve.run(application, name="slow", route_prefix="/slow")
    with httpx.Client(base_url=f"{ray_serve}/slow", timeout=30, headers=asking.ALLOWED) as client:
        leaving.frees_its_place(client, slow, os.getpid())
    serve.delete("slow")


def test_a_client_that_goes_away_from_haproxy_and_a_stop_that_lets_requests_end(slow: Path, tmp_path: Path) -> None:
    """The stop is a SIGTERM; the commands that other tests end by Ctrl-C take the same way."""
    hold, passes = slow / contents.CODE / "hold", slow / contents.CODE / "passes"
    with asking.server(slow, tmp_path) as server, ThreadPoolExecutor(1) as pool:
        leaving.frees_its_place(server.client, slow, server.process.pid)
        passes.unlink()
        hold.touch()
        asked = pool.submit(ask, server.client, {"length": 12})
        leaving.until(passes.exists)
        server.process.terminate()
        time.sleep(1)
        hold.unlink()
        assert asked.result()[0] == 200
        assert server.process.wait(60) == 143, server.said
    assert "Traceback" not in server.said
