"""Serving: `raylway serve` beside the article's Flask app (chapter 8) under gunicorn, one process with 8 threads, and
beside the limit: a bare asyncio program that reads the same requests and does the same forward pass, and nothing else.

Two models: the article's 1000-512-256-10 network, asked with the article's request, and that of jobs/flights.yaml,
asked by the names of its columns. For the flights the peers are spared the work: they get the encoded numbers. All
connections stay open. The load comes from the asyncio program below, which waits for each answer before it sends the
next request; it shares the machine with the servers, as a client on a laptop does.

    python benchmarks/serve.py [--seconds 8]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from common import environment, raylway, scratch, table, write_section

from raylway.bundle import contents, examples

WARM_UP_S = 2.0
NETWORK = """
import torch
from torch import nn

widths = {widths}
layers = []
for width, following in zip(widths, widths[1:-1]):
    layers += [nn.Linear(width, following), nn.ReLU(), nn.Dropout(0.5)]
model = nn.Sequential(*layers, nn.Linear(*widths[-2:])).eval()
"""
ARTICLE = """
from flask import Flask, request, jsonify
app = Flask(__name__)


@app.route('/predict', methods=['POST'])
def predict():
    data = request.json['data']
    data = torch.tensor(data).float()
    output = model(data)
    return jsonify(output.tolist())
"""
BARE = """
import asyncio, json, sys
torch.set_num_threads(1)


async def answer(reader, writer):
    try:
        while True:
            head = (await reader.readuntil(b"\\r\\n\\r\\n")).lower()
            length = int(head.partition(b"content-length: ")[2].partition(b"\\r\\n")[0])
            data = torch.tensor(json.loads(await reader.readexactly(length))["data"])
            with torch.inference_mode():
                body = json.dumps(model(data).tolist()).encode()
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%b" % (len(body), body))
    except (asyncio.IncompleteReadError, ConnectionResetError):
        writer.close()


async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", int(sys.argv[1]), limit=1 << 24)
    await server.serve_forever()


asyncio.run(main())
"""
JOB = """
name: article
storage: runs
data:
  source: rows.parquet
  target: target
model: {kind: mlp, hidden: [512, 256], dropout: 0.5}
train: {for: 1 steps, global_batch: 128}
"""
HIDDEN = [128, 64]
"""Of the network of jobs/flights.yaml."""
Body = Callable[[random.Random, int], bytes]
"""A request of so many rows."""
Command = Callable[[int], list[str]]
"""That of a server, by its port."""


class Subject(NamedTuple):
    """One model and how it is asked."""

    name: str
    run: str
    widths: list[int]
    """Of the peers' network."""
    ours: Body


class Load(NamedTuple):
    clients: int
    rows: int

    def __str__(self) -> str:
        return f"{self.clients} client{'s' * (self.clients > 1)}, {self.rows} row{'s' * (self.rows > 1)}"


LOADS = Load(1, 1), Load(16, 1), Load(64, 1), Load(8, 100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=8.0)
    seconds = parser.parse_args().seconds
    with scratch() as folder:
        lines = [line for subject in (article(folder), flights(folder)) for line in compare(folder, subject, seconds)]
    heads = ["requests/s (p50, p99 ms)", "Flask, gunicorn", "raylway serve", "ours / Flask", "p50: ours / Flask"]
    write_section(
        "serve",
        f"{table([*heads, 'bare asyncio', 'ours / bare'], lines)}\n\nRatios of requests above 1: Raylway answers more "
        f"a second. {seconds:g} s a cell after {WARM_UP_S:g} s of warm-up, own load generator (asyncio, kept "
        "connections); every answer was checked to be 200 and to hold all rows. Raylway also validates rows, batches, "
        "keeps metrics and an access log, and runs at most 2 replicas here; of the flights it encodes the columns too.",
    )


def compare(folder: Path, subject: Subject, seconds: float) -> list[list[str]]:
    """The lines of one model: the servers one after the other, each under every load."""
    network = NETWORK.format(widths=subject.widths)
    (folder / "article_app.py").write_text(network + ARTICLE)
    (folder / "bare.py").write_text(network + BARE)
    python = [sys.executable, "-m"]
    gunicorn = [*python, "gunicorn", "--workers", "1", "--threads", "8", "--chdir", str(folder), "article_app:app"]
    servers: list[tuple[Command, Body]] = [
        (lambda port: [*gunicorn, "--bind", f"127.0.0.1:{port}"], numbers(subject.widths[0])),
        (lambda port: [*python, "raylway", "serve", subject.run, "--port", str(port)], subject.ours),
        (lambda port: [sys.executable, "bare.py", str(port)], numbers(subject.widths[0])),
    ]
    found = []
    for command, body in servers:
        with running(command, folder, body(random.Random(0), 1)) as port:
            found.append([asyncio.run(measured(port, load, body, seconds)) for load in LOADS])
    lines = []
    for load, theirs, ours, bare in zip(LOADS, *found, strict=True):
        ratios = [ours["rate"] / theirs["rate"], ours["p50"] / theirs["p50"], ours["rate"] / bare["rate"]]
        words = [f"{ratio:.2f}" for ratio in ratios]
        lines.append([f"{subject.name}, {load}", cell(theirs), cell(ours), *words[:2], cell(bare), words[2]])
    return lines


def article(folder: Path) -> Subject:
    """The article's network; one step of training is enough to serve it."""
    rows = np.random.default_rng(0).standard_normal((1_000, 1_000))
    frame = pd.DataFrame(rows, columns=[f"x{index}" for index in range(1_000)])
    frame["target"] = np.arange(1_000) % 10
    frame.to_parquet(folder / "rows.parquet")
    (folder / "article.yaml").write_text(JOB)
    return Subject("article", trained(folder, "article"), [1_000, 512, 256, 10], numbers(1_000))


def flights(folder: Path) -> Subject:
    """The flights after a short training; the peers' network is as wide as ours once its columns are encoded."""
    text = (Path(__file__).parent.parent / "jobs" / "flights.yaml").read_text()
    (folder / "flights.yaml").write_text(text)
    run = trained(folder, "flights", "--set", "train.for=20 steps", "--set", "train.schedule.warmup=0 steps")
    bundle = contents.load(Path(run) / "bundle")
    rows: list[dict[str, Any]] = examples.read(bundle.folder).rows
    first = next(each for each in bundle.weights().values() if each.ndim == 2 and each.shape[0] == HIDDEN[0])

    def body(chance: random.Random, count: int) -> bytes:
        return json.dumps({"rows": [chance.choice(rows) for _ in range(count)]}).encode()

    return Subject("flights", run, [first.shape[1], *HIDDEN, 2], body)


def trained(folder: Path, name: str, *settings: str) -> str:
    """The folder of a run whose bundle is served by at most two replicas."""
    raylway("run", f"{name}.yaml", "--set", "serve.replicas={min: 1, max: 2}", *settings, folder=folder)
    (run,) = (folder / "runs" / name).iterdir()
    return str(run)


def numbers(width: int) -> Body:
    """The article's request: a nested list of numbers."""

    def body(chance: random.Random, count: int) -> bytes:
        return json.dumps({"data": [[chance.gauss(0, 1) for _ in range(width)] for _ in range(count)]}).encode()

    return body


@contextmanager
def running(command: Command, folder: Path, body: bytes) -> Iterator[int]:
    """A server on a free port, from when it answers a request until the body ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command(port), cwd=folder, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(server, f"http://127.0.0.1:{port}/predict", body, folder / "server.log")
            yield port
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


def wait_until_ready(server: subprocess.Popen[bytes], address: str, body: bytes, log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and server.poll() is None:
        try:
            asked = urllib.request.Request(address, body, {"Content-Type": "application/json"})
            urllib.request.urlopen(asked, timeout=5).close()
            return
        except OSError:  # refused, or an HTTP error: not yet there
            time.sleep(0.2)
    raise RuntimeError(f"{address} is not ready\n{log.read_text()}")


async def measured(port: int, load: Load, body: Body, seconds: float) -> dict[str, float]:
    """Requests a second, and milliseconds at the 50th and 99th percentile."""
    bodies = [body(random.Random(number), load.rows) for number in range(load.clients)]
    start = time.perf_counter() + WARM_UP_S
    parts = await asyncio.gather(*(_client(port, each, load.rows, start, start + seconds) for each in bodies))
    latencies = np.concatenate(parts) * 1e3
    return {
        "rate": len(latencies) / seconds,
        "p50": float(np.percentile(latencies, 50)),
        "p99": float(np.percentile(latencies, 99)),
    }


async def _client(port: int, body: bytes, rows: int, start: float, end: float) -> list[float]:
    """One connection that sends a request as soon as the last is answered; seconds of each answered within the time."""
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    latencies = []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (sent := time.perf_counter()) < end:
        writer.write(request)
        status, closes, answer = await _answer(reader)
        now = time.perf_counter()
        if status != 200 or len(_rows(json.loads(answer))) != rows:
            raise RuntimeError(f"status {status}: {answer[:300]!r}")
        if start <= sent and now <= end:
            latencies.append(now - sent)
        if closes:
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    return latencies


def _rows(answer: Any) -> list[Any]:
    rows: list[Any] = answer["predictions"] if isinstance(answer, dict) else answer
    return rows


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bool, bytes]:
    """Status, whether the server closes the connection, and the body of one answer with a content length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
    body = await reader.readexactly(int(fields["content-length"]))
    return int(head.split(" ", 2)[1]), fields.get("connection") == "close", body


def cell(found: dict[str, float]) -> str:
    return f"{found['rate']:,.0f} ({found['p50']:.1f}, {found['p99']:.0f})"


if __name__ == "__main__":
    main()
