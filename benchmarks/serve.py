"""Serving: `raylway serve` beside the article's Flask app (chapter 8) under gunicorn, one process with 8 threads.

Both hold the article's 1000-512-256-10 network and get the article's request, one row of 1,000 numbers a request, over
connections that stay open. The load comes from the asyncio program below, which waits for each answer before it sends
the next request; it shares the machine with the servers, as a client on a laptop does.

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
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from common import environment, raylway, scratch, table, write_section

CLIENTS = (1, 16, 64)
WARM_UP_S = 2.0
ARTICLE = """
import torch
from flask import Flask, request, jsonify
from common import BigModel

model = BigModel()
app = Flask(__name__)


@app.route('/predict', methods=['POST'])
def predict():
    data = request.json['data']
    data = torch.tensor(data).float()
    output = model(data)
    return jsonify(output.tolist())
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=8.0)
    seconds = parser.parse_args().seconds
    with scratch() as folder:
        served = bundle(folder)
        with running(flask_command(folder), folder, "/predict") as port:
            theirs = {clients: load(port, clients, seconds) for clients in CLIENTS}
        command = [sys.executable, "-m", "raylway", "serve", served]
        with running(lambda port: [*command, "--port", str(port)], folder, "/readyz") as port:
            ours = {clients: load(port, clients, seconds) for clients in CLIENTS}
    lines = []
    for clients in CLIENTS:
        ratio = ours[clients]["rate"] / theirs[clients]["rate"]
        lines.append([f"{clients} clients", cell(theirs[clients]), cell(ours[clients]), f"{ratio:.2f}"])
    heads = ["requests/s (p50, p99 ms)", "article's Flask app, gunicorn", "raylway serve", "ours / theirs"]
    write_section(
        "serve",
        f"{table(heads, lines)}\n\nRatios above 1: Raylway answers more requests a second. {seconds:g} s a cell after "
        f"{WARM_UP_S:g} s of warm-up, own load generator (asyncio, kept connections); every answer was checked to be "
        "complete and 200. Raylway also validates each row, answers in batches, and runs at most 2 replicas here.",
    )


def bundle(folder: Path) -> str:
    """The folder of a run whose bundle holds the article's network; one step of training is enough to serve it."""
    rows = np.random.default_rng(0).standard_normal((1_000, 1_000))
    frame = pd.DataFrame(rows, columns=[f"x{index}" for index in range(1_000)])
    frame["target"] = np.arange(1_000) % 10
    frame.to_parquet(folder / "rows.parquet")
    (folder / "job.yaml").write_text(JOB)
    raylway("run", "job.yaml", "--set", "serve.replicas={min: 1, max: 2}", folder=folder)
    (run,) = (folder / "runs" / "article").iterdir()
    return str(run)


def flask_command(folder: Path):
    (folder / "article_app.py").write_text(ARTICLE)
    options = ["--workers", "1", "--threads", "8", "--chdir", str(folder)]
    options += ["--pythonpath", f"{folder},{Path(__file__).parent}"]
    return lambda port: [sys.executable, "-m", "gunicorn", *options, "--bind", f"127.0.0.1:{port}", "article_app:app"]


@contextmanager
def running(command, folder: Path, ready: str) -> Iterator[int]:
    """A server on a free port, from when it answers at `ready` until the body ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command(port), cwd=folder, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(server, f"http://127.0.0.1:{port}{ready}", folder / "server.log")
            yield port
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


def wait_until_ready(server: subprocess.Popen, address: str, log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            if error.code == 405:  # Flask is there; its only path wants a POST
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{address} is not ready\n{log.read_text()}")


def load(port: int, clients: int, seconds: float) -> dict[str, float]:
    """Requests a second, and milliseconds at the 50th and 99th percentile, of so many clients at once."""
    return asyncio.run(_load(port, clients, seconds))


async def _load(port: int, clients: int, seconds: float) -> dict[str, float]:
    start = time.perf_counter() + WARM_UP_S
    parts = await asyncio.gather(*(_client(port, number, start, start + seconds) for number in range(clients)))
    latencies = np.concatenate(parts) * 1e3
    return {
        "rate": len(latencies) / seconds,
        "p50": float(np.percentile(latencies, 50)),
        "p99": float(np.percentile(latencies, 99)),
    }


async def _client(port: int, number: int, start: float, end: float) -> list[float]:
    """One connection that sends a request as soon as the last is answered; seconds of each answered within the time."""
    row = [random.Random(number).gauss(0, 1) for _ in range(1_000)]
    body = json.dumps({"data": [row]}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    latencies = []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (sent := time.perf_counter()) < end:
        writer.write(request)
        status, closes, answer = await _answer(reader)
        now = time.perf_counter()
        if status != 200 or len(json.loads(answer)[0]) != 10:
            raise RuntimeError(f"status {status}: {answer[:300]!r}")
        if start <= sent and now <= end:
            latencies.append(now - sent)
        if closes:
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    return latencies


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
