"""Checks of a running server that both proxies must pass: a client that leaves, and what is noted of requests."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asking
import httpx
import made as making
import numpy as np
import pyarrow as pa
import pytest
from asking import GOOD, ask

from raylway.bundle import contents
from raylway.bundle.predictor import CHUNK_ROWS
from raylway.models import registry

SLOW = """
import time
from pathlib import Path

import torch

FOLDER = Path(__file__).parent

def build(num_numeric, category_counts, num_outputs):
    class Slow(torch.nn.Linear):
        def forward(self, numeric, categorical):
            with (FOLDER / "passes").open("a") as passes:
                passes.write("x")
            while (FOLDER / "hold").exists():
                time.sleep(0.01)
            return super().forward(numeric)

    return Slow(num_numeric, num_outputs)
"""


def slow_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose model waits as long as there is a file `code/hold`, and counts its passes in `code/passes`."""
    (tmp_path / "slow_model.py").write_text(SLOW)
    monkeypatch.syspath_prepend(str(tmp_path))
    length = np.linspace(5, 15, 20)
    table = pa.table({"length": length, "ripe": np.where(length > 10, "yes", "no")})
    spec = registry.ModelSpec("slow_model:build", {})
    bundle = making.made(table, "ripe", {"length": "number"}, spec, steps=0).stage(tmp_path / "bundle", name="slow")
    (tmp_path / "slow_model.py").unlink()
    return bundle


def until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def frees_its_place(client: httpx.Client, bundle: Path, root: int) -> None:
    """Of its ten batches the one that is computed meanwhile stays the only one."""
    hold, passes = bundle / contents.CODE / "hold", bundle / contents.CODE / "passes"
    passes.unlink()  # the check at the start has made it
    hold.touch()
    body = json.dumps({"data": [[12]] * 640}).encode()
    head = f"POST {client.base_url.path}predict HTTP/1.1\r\nHost: here\r\nX-API-Key: {asking.KEY}\r\n"
    head += f"X-Request-ID: leaves\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        until(passes.exists)
    until(lambda: [line for line in asking.access_log(root, "slow") if line["request_id"] == "leaves"])
    (line,) = [line for line in asking.access_log(root, "slow") if line["request_id"] == "leaves"]
    assert (line["status"], line["rows"], line["form"]) == (499, 640, "predict")
    hold.unlink()
    assert ask(client, {"length": 12})[0] == 200
    assert passes.read_text() == "x" * (64 // CHUNK_ROWS + 1)


def notes(client: httpx.Client, root: int, version: str) -> None:
    """Of requests to the fruit of a server among the children of a process: headers, access log, metrics."""
    answer = client.post("/predict", json={"rows": [GOOD] * 3}, headers={"X-Request-ID": f"mine-{root}"})
    assert answer.headers.get_list("x-request-id") == [f"mine-{root}"]
    assert len(client.post("/predict", json={"rows": []}).headers["x-request-id"]) > 20
    client.post("/invocations", json={"instances": [{"length": "Mum's secret"}]})

    def lines() -> list[dict[str, Any]]:
        found = asking.access_log(root, "fruit")
        return [line for line in found if line["request_id"] == f"mine-{root}"]

    until(lines)
    (line,) = lines()
    assert 0 < line.pop("ms") < 30_000
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "request_id": f"mine-{root}",
        "key": "tests",
        "method": "POST",
        "path": "/predict",
        "form": "predict",
        "status": 200,
        "rows": 3,
        "received_bytes": len(json.dumps({"rows": [GOOD] * 3}, separators=(",", ":"))),
        "sent_bytes": len(answer.content),
    }
    assert "secret" not in json.dumps(asking.access_log(root, "fruit"))

    def told() -> str:
        return client.get("/metrics").text

    until(lambda: re.search(r'raylway_requests_total{[^}]*form="invocations"[^}]*status="422"', told()))
    text = told()
    assert float(re.search(r'raylway_requests_total{[^}]*form="predict"[^}]*status="200".*} (\S+)', text)[1]) >= 2  # type: ignore[index]
    assert float(re.search(r'raylway_rows_total{[^}]*form="predict".*} (\S+)', text)[1]) >= 3  # type: ignore[index]
    assert re.search(rf'raylway_model{{[^}}]*name="fruit"[^}}]*version="{version}".*}} 1.0', text)
    assert set(re.findall(r'application="(\w+)"', text)) == {"fruit"}
