"""Longer campaigns with servers under load, run by `make test-long`: replacements, kills, stuck models, none at all.

Each says what it has seen in a line of JSON (`pytest -s`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asking
import httpx
import leaving
import loading
import made as making
import pytest
import torch
from asking import GOOD, Server, ask
from commands import environment

from raylway.bundle import contents

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
REPLACEMENTS = int(os.environ.get("RAYLWAY_TEST_REPLACEMENTS", "30"))
PROXIES = {"HAProxy": "1", "Ray's own proxy": "0"}
NAME = "campaign"
"""No other service of this machine has it."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two versions that answer otherwise."""
    folder = tmp_path_factory.mktemp("campaign")
    made = making.fruit()
    first = made.stage(folder / "first", name=NAME)
    with torch.no_grad():
        for parameter in list(made.model.parameters())[-2:]:
            parameter.copy_(parameter.flip(0))
    return [first, made.stage(folder / "second", name=NAME)]


@pytest.fixture(params=PROXIES)
def proxy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def served(bundle: Path | list[Path], folder: Path, proxy: str, replicas: tuple[int, int] = (1, 1)) -> Iterator[Server]:
    with asking.server(bundle, folder, replicas, RAY_SERVE_ENABLE_HA_PROXY=PROXIES[proxy]) as server:
        assert f"through {proxy}" in server.said
        yield server
        assert "Traceback" not in server.said


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


_OTHER = """
import json, sys
from pathlib import Path
from raylway.errors import RunFailed
from raylway.job.schema import Replicas, Serve
from raylway.launch import applications, replacing, services, start
from raylway.launch.applications import Model
from raylway.runs.progress import Reporter

def at(name):
    return next(each.address for each in services.running() if name in each.names)

for line in sys.stdin:
    word, name, *rest = json.loads(line)
    try:
        if word == "replace":
            options = Serve(replicas=Replicas(min=rest[1], max=rest[1]))
            replacing.replace([Model(name, Path(rest[0]), options)], Reporter("lines"))
        elif word == "rollback":
            replacing.rollback(name, Reporter("lines"))
        else:
            with start.visit(at(name)):
                from serve_app import app
                app.TO_ZERO_DELAY_S = 3.0
                found = applications.running()[name]
                if word == "to zero":
                    applications.put(name, found.route, found.arguments | {"min_replicas": 0}, {})
                print(json.dumps(found.replicas), flush=True)
                continue
        print(json.dumps("done"), flush=True)
    except RunFailed as error:
        print(json.dumps(str(error)), flush=True)
"""


@contextmanager
def another_terminal(log: Path) -> Iterator[Callable[..., Any]]:
    """A process beside that of the server, which finds it as `raylway serve --replace` does."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _OTHER],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )

        def say(*words: Any) -> Any:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, log.read_text()
            return json.loads(line)

        try:
            yield say
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)


def version(bundle: Path) -> str:
    return contents.load(bundle).record.version


def answers(server: Server) -> tuple[int, Any]:
    status, answer = ask(server.client, GOOD)
    return status, answer.get("model", {}).get("version")


def test_replacements_under_load(bundles: list[Path], tmp_path: Path, proxy: str) -> None:
    """No request fails, the sample of recorded requests is tried each time, and the way back is known."""
    took = []
    with served(bundles[0], tmp_path, proxy) as server, another_terminal(tmp_path / "other.log") as say:
        with loading.load(str(server.client.base_url)) as load:
            for turn in range(1, REPLACEMENTS + 1):
                started = time.monotonic()
                assert say("replace", NAME, str(bundles[turn % 2]), 1) == "done"
                took.append(time.monotonic() - started)
                assert answers(server) == (200, version(bundles[turn % 2]))
            assert say("rollback", NAME) == "done"
            assert answers(server) == (200, version(bundles[(REPLACEMENTS + 1) % 2]))
        slowest, middle = max(took), sorted(took)[len(took) // 2]
        tell(proxy=proxy, replacements=len(took), median_s=middle, longest_s=slowest, **load.facts())
        assert load.failed == {}, load.failures
        assert load.answered > REPLACEMENTS * 50
        told = (tmp_path / "other.log").read_text()
        assert told.count("rows get another label (100.0%)") == REPLACEMENTS


VICTIMS = {
    "HAProxy": ["ray::ServeReplica", "ray::ServeController", "ray::HAProxyManager", "haproxy"],
    "Ray's own proxy": ["ray::ServeReplica", "ray::ServeController", "ray::ProxyActor"],
}


def test_what_a_kill_under_load_costs(bundles: list[Path], tmp_path: Path, proxy: str) -> None:
    """All comes back; a replica costs at most the requests in it, and the controller nothing."""
    with served(bundles[0], tmp_path, proxy, (2, 2)) as server:
        for title in VICTIMS[proxy]:
            with loading.load(str(server.client.base_url)) as load:
                leaving.until(lambda load=load: load.answered > 100)
                found = _found(server, title)
                killed_at = time.monotonic()
                os.kill(found[0], signal.SIGKILL)
                leaving.until(lambda found=found: not Path(f"/proc/{found[0]}").exists())
                leaving.until(lambda title=title, found=found: len(_found(server, title)) >= len(found))
                back_s = time.monotonic() - killed_at
                time.sleep(15)  # whatever comes late
                assert load.last_answer_at > time.monotonic() - 5
            outage_s = max((ended - killed_at for _, ended, _ in load.failures), default=0.0)
            tell(proxy=proxy, killed=title, back_s=round(back_s, 1), outage_s=round(outage_s, 2), **load.facts())
            if title == "ray::ServeController":
                assert load.failed == {}
            elif title == "ray::ServeReplica":
                assert sum(load.failed.values()) <= 8  # clients, one request each
            else:
                assert outage_s < 30
            assert answers(server) == (200, version(bundles[0]))


def _found(server: Server, title: str) -> list[int]:
    """The processes that have this title; of HAProxy, which has none, the newest that runs."""
    if title != "haproxy":
        return asking.named(server.process.pid, title)
    return [process for process, name in asking.programs(server.process.pid) if name == "haproxy"][-1:]


@pytest.mark.parametrize("kind", ["in its batch", "in its event loop"])
def test_a_stuck_replica_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, proxy: str) -> None:
    bundle = leaving.slow_bundle(tmp_path, monkeypatch)
    hold = bundle / contents.CODE / "hold"
    with served(bundle, tmp_path, proxy) as server:
        root = server.process.pid
        (stuck,) = asking.named(root, "ray::ServeReplica:slow")
        started = time.monotonic()
        if kind == "in its batch":
            hold.touch()
        else:
            os.kill(stuck, signal.SIGSTOP)
        with loading.load(str(server.client.base_url), clients=1):
            deadline = time.monotonic() + 180
            while not set(asking.named(root, "ray::ServeReplica:slow")) - {stuck}:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            found_s = time.monotonic() - started
            hold.unlink(missing_ok=True)
        leaving.until(lambda: not Path(f"/proc/{stuck}").exists())
        leaving.until(lambda: ask(server.client, {"length": 12})[0] == 200)
        tell(proxy=proxy, stuck=kind, replaced_after_s=round(found_s, 1), back_after_s=time.monotonic() - started)


def test_no_replica_while_nobody_asks(bundles: list[Path], tmp_path: Path, proxy: str) -> None:
    with served(bundles[0], tmp_path, proxy) as server, another_terminal(tmp_path / "other.log") as say:
        say("to zero", NAME)
        deadline = time.monotonic() + 120
        while say("look", NAME) != 0:
            assert time.monotonic() < deadline
            time.sleep(1)
        leaving.until(lambda: not asking.named(server.process.pid, f"ray::ServeReplica:{NAME}"))
        started = time.monotonic()
        assert answers(server) == (200, version(bundles[0]))
        tell(proxy=proxy, first_answer_from_zero_s=round(time.monotonic() - started, 1))


def test_before_it_is_ready_haproxy_asks_clients_to_come_again(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, seen, ready = asking.free_port(), [], threading.Event()
    monkeypatch.setattr(asking, "free_port", lambda: port)

    def poll() -> None:
        while not ready.is_set():
            try:
                answer = httpx.post(f"http://127.0.0.1:{port}/predict", json={"rows": [GOOD]}, timeout=60)
                seen.append((answer.status_code, answer.headers.get("retry-after")))
            except httpx.TransportError:
                seen.append((0, None))
            ready.wait(0.05)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        with served(bundles[0], tmp_path, "HAProxy"):
            pass
    finally:
        ready.set()
        thread.join()
    tell(seen=[f"{count} times {kind}" for kind, count in Counter(seen).items()])
    # refused while nothing listens; then 503 with a time; then 401, the application's own answer without a key
    assert {kind for kind, _ in Counter(seen).items()} == {(0, None), (503, "1"), (401, None)}


def test_several_models_and_the_list_of_them(bundles: list[Path], tmp_path: Path, proxy: str) -> None:
    price = making.price().stage(tmp_path / "price", name="price")
    with served([bundles[0], price], tmp_path, proxy) as server:
        assert server.said.count("try it:") == 2
        names = [each["name"] for each in server.client.get("/").json()["models"]]
        assert names == [NAME, "price"]
        assert "<h1>Models</h1>" in server.client.get("/", headers={"Accept": "text/html"}).text
        for name in names:
            for path in ("", "/docs", "/signature", "/readyz", "/openapi.json"):
                assert server.client.get(f"/{name}{path}").status_code == 200
        asked = server.client.post("/price/predict", json={"rows": [{"size": 100, "place": "EU"}]})
        assert asked.json()["model"]["name"] == "price"
        leaving.until(lambda: 'form="predict"' in server.client.get("/price/metrics").text)
        assert 'application="price"' in server.client.get("/price/metrics").text
        assert f'application="{NAME}"' not in server.client.get("/price/metrics").text
