"""Where a job runs: the embedded Ray and its end, tokens, capacity, and what workers of a cluster do first."""

from __future__ import annotations

import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import REPOSITORY, environment, raylway

from raylway.errors import UserError
from raylway.launch import auth, worker_setup
from raylway.launch.capacity import Capacity, Node, NodeType, capacity

SLOW = """
import os, threading, time
from pathlib import Path

HERE = Path(__file__).parent


def double(table):
    if threading.current_thread() is not threading.main_thread():  # where the rows are read
        wait()
    import pyarrow.compute as pc

    return pc.multiply(table["length"], 2)


def wait():
    (HERE / "begun").write_text(str(len(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())))
    while (HERE / "hold").exists():
        time.sleep(0.05)
"""
DRIVER = """
import os, sys, time
from pathlib import Path
from raylway.launch import start
from raylway.runs.progress import Reporter

with start.connect(Reporter(), [str(Path.cwd() / "modules")]) as have:
    import ray

    @ray.remote
    def work():
        import mine
        print(mine.WORD, flush=True)
        print("not for people", file=sys.stderr, flush=True)
        return os.environ.get("RAY_AUTH_MODE")

    client = ray._private.worker.global_worker.gcs_client
    ray._private.utils.publish_error_to_driver("made", "not for people", gcs_client=client)
    print("mode", ray.get(work.remote()), "cpus", have.cpus == ray.cluster_resources()["CPU"], flush=True)
    time.sleep(300)
"""


def processes(mark: str) -> list[str]:
    """Command lines of the living processes that inherited an environment variable."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"MARK={mark}\0" in (entry / "environ").read_text():
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return [line for line in found if line]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """A process of a user who has no token yet, inside `connect`, with a worker that has run. Its standard output is
    for results, whatever Ray has to say."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "mine.py").write_text("WORD = 'a word of the user'\n")
    mark = tmp_path.name
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        cwd=tmp_path,
        env={**environment(), "HOME": str(tmp_path), "MARK": mark},
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "err").open("w"),
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "mode token cpus True\n", (tmp_path / "err").read_text()
        yield process, mark, tmp_path
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_embedded_ray_ends_with_its_process(
    driver: tuple[subprocess.Popen[str], str, Path], number: signal.Signals
) -> None:
    process, mark, folder = driver
    started = processes(mark)
    assert any("gcs_server" in line for line in started)
    assert any("ray::" in line for line in started)
    (home,) = {word for line in started for word in re.findall(r"/tmp/raylway-\w+", line)}
    process.send_signal(number)
    code = process.wait(30)
    deadline = time.monotonic() + 20
    agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent") if number == signal.SIGKILL else ()
    while left := [line for line in processes(mark) if not line.startswith(agents)]:
        assert time.monotonic() < deadline, left
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert not Path(home).exists()
        # Python reports an interrupt that nobody caught as death by the signal; the command line turns it into 130.
        assert code == -signal.SIGINT
    told = (folder / "err").read_text()
    assert re.search(r"worker \d+: a word of the user", told)
    assert "not for people" not in told
    assert "WARNING" not in told
    token = folder / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a token, and a process that has not looked for one yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    return tmp_path


def test_a_token_that_ray_made_readable_becomes_private(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("a" * 64)
    file.chmod(0o644)
    auth.prepare_to_join()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert (file.stat().st_mode & 0o777, file.read_text()) == (0o600, "a" * 64)
    monkeypatch.delenv("RAY_AUTH_MODE")


def test_a_mode_that_the_user_chose_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    auth.prepare_local()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert not (home / ".ray").exists()


@pytest.mark.parametrize("content", [None, ""])
def test_a_named_token_file_must_be_usable(home: Path, monkeypatch: pytest.MonkeyPatch, content: str | None) -> None:
    if content is not None:
        (home / "t").write_text(content)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "t"))
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH"):
        auth.prepare_to_join()


def server(answer: bytes, code: int = 200) -> Any:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    running = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    return running


@pytest.mark.parametrize(
    ("answer", "code", "expected"),
    [
        (b'{"authentication_mode": "token"}', 200, "asks for a token and there is none"),
        (b"<html>", 200, "no Ray job server answers"),
        (b"[]", 200, "no Ray job server answers"),
        (b"", 500, "HTTP 500"),
    ],
)
def test_what_stands_at_the_address_is_found_out_first(home: Path, answer: bytes, code: int, expected: str) -> None:
    running = server(answer, code)
    url = f"http://127.0.0.1:{running.server_port}"
    try:
        with pytest.raises(UserError, match=expected) as raised:
            auth.prepare_to_join(url)
    finally:
        running.shutdown()
        running.server_close()
    assert raised.value.where == url


def test_an_open_cluster_needs_no_token(home: Path) -> None:
    running = server(b'{"authentication_mode": "disabled"}')
    auth.prepare_to_join(f"http://127.0.0.1:{running.server_port}")
    running.shutdown()
    running.server_close()
    assert "RAY_AUTH_MODE" not in os.environ


def test_workers_that_never_fit_are_refused() -> None:
    two = Capacity([Node("a", 4, 1), Node("b", 3, 0)])
    assert [two.most_workers(2, 0), two.most_workers(3, 0), two.most_workers(1, 1), two.most_workers(5, 0)] == [
        3,
        2,
        1,
        0,
    ]
    two.refuse_impossible(3, 2, 0)
    with pytest.raises(UserError, match=r"x\.yaml:3: 4 workers of 2 CPU each can never run at once here") as raised:
        two.refuse_impossible(4, 2, 0, where="x.yaml:3")
    assert "at most 3" in str(raised.value)
    assert "2 nodes, 7 CPUs, 1 GPUs" in str(raised.value)


def test_an_autoscaler_counts_within_its_bounds() -> None:
    head = Node("h", 1, 0, is_head=True)
    kinds = [NodeType("small", Node("", 2, 0), 3), NodeType("big", Node("", 8, 0), 1)]
    assert Capacity([head], kinds, most_nodes=2).most_workers(2, 0) == 4 + 1
    assert Capacity([head], kinds, most_nodes=9).most_workers(2, 0) == 4 + 3
    assert Capacity([head], kinds, most_nodes=9).most_workers(1, 0) == 1 + 8 + 6
    # A running machine that the autoscaler started is one of those it may start.
    assert Capacity([head, Node("w", 8, 0)], kinds, most_nodes=9).most_workers(2, 0) == 4 + 3


def test_the_launchers_file_says_what_may_come(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    have = capacity(joined=True)
    assert (have.cpus, have.hosts, have.most_workers(1, 0)) == (4, 1, 4)
    (tmp_path / "ray_bootstrap_config.yaml").write_text((REPOSITORY / "cluster" / "aws.yaml").read_text())
    assert capacity(joined=False).most_workers(1, 1) == 0
    have = capacity(joined=True)
    assert have.most_workers(1, 1) == 4 * 4
    assert "up to 4 gpu (48 CPUs, 4 GPUs)" in have.describe()
    have.require_shared(tmp_path)  # one machine shares with itself


def test_a_worker_finds_the_users_modules_and_its_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    asked = worker_setup.runtime_env([str(tmp_path / "jobs"), str(tmp_path), "/elsewhere"])
    assert "py_modules" not in asked  # the job brought the packages
    other = tmp_path / "unpacked"
    other.mkdir()
    monkeypatch.chdir(other)
    for name, value in asked["env_vars"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    monkeypatch.setattr(sys, "path", list(sys.path))
    worker_setup.prepare_worker()
    assert sys.path[:3] == [str(other / "jobs"), str(other), "/elsewhere"]
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine0"


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_interfaces_are_found_by_address() -> None:
    assert worker_setup.interface_of("127.0.0.1") == "lo"
    assert worker_setup.interface_of("203.0.113.77") is None
    assert worker_setup.interface_of("::1") is None


def test_a_host_whose_name_is_loopback_names_its_interface(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that what is set below is undone at the end
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "192.0.2.9")
    monkeypatch.setattr(worker_setup, "interface_of", {"192.0.2.9": "eth7"}.get)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("192.0.2.9", 0))])
    worker_setup.prefer_node_address()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("127.0.1.1", 0))])
    worker_setup.prefer_node_address()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_a_small_machine_prepares_without_starting_ray_and_sigterm_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "slow_steps.py").write_text(SLOW)
    rows = "".join(f"{number},{'yes' if number % 2 else 'no'}\n" for number in range(40))
    (tmp_path / "rows.csv").write_text(f"length,ripe\n{rows}")
    derive = "{twice: 'slow_steps:double(length)'}"
    (tmp_path / "job.yaml").write_text(f"name: held\ndata: {{source: rows.csv, target: ripe, derive: {derive}}}\n")
    hold = tmp_path / "hold"
    hold.touch()
    few = ",".join(map(str, sorted(os.sched_getaffinity(0))[:8]))
    held = subprocess.Popen(
        ["taskset", "-c", few, sys.executable, "-m", "raylway", "prepare", "job.yaml"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (tmp_path / "begun").read_text() == "0"  # no process of Ray
    held.send_signal(signal.SIGTERM)
    hold.unlink()  # the thread that is at work comes to its end first
    assert held.wait(60) == 143, held.stderr
    assert [path.name for path in (tmp_path / "runs" / "prepared").iterdir() if path.name != "pieces"] == []
    whole = raylway("prepare", "job.yaml", "--json", folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
