"""Real HTTP clients that ask a server without a pause, each in its own way, and what became of every request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from asking import ALLOWED, GOOD


@dataclass
class Load:
    """What the clients have seen; times are of `time.monotonic`."""

    url: str
    outcomes: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[float, float, str]] = field(default_factory=list)
    """When a request that failed was sent and ended, and how."""
    slowest_s: float = 0.0
    last_answer_at: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, client: httpx.Client, rows: int) -> None:
        sent = time.monotonic()
        try:
            answer = client.post("/predict", json={"rows": [GOOD] * rows})
            outcome = str(answer.status_code)
        except httpx.HTTPError as error:
            answer, outcome = None, type(error).__name__
        ended = time.monotonic()
        with self._lock:
            self.outcomes[outcome] += 1
            if answer is not None and outcome == "200":
                content = answer.json()
                assert len(content["predictions"]) == rows
                self.versions[content["model"]["version"]] += 1
                self.slowest_s = max(self.slowest_s, ended - sent)
                self.last_answer_at = ended
            else:
                self.failures.append((sent, ended, outcome))
        if outcome != "200":
            time.sleep(0.05)

    def run(self, rows: int, keeps: bool, pause_s: float) -> None:
        """One client, until the end."""
        limits = httpx.Limits(max_keepalive_connections=1 if keeps else 0)
        with httpx.Client(base_url=self.url, timeout=60, headers=ALLOWED, limits=limits) as client:
            while not self._stop.is_set():
                self.ask(client, rows)
                self._stop.wait(pause_s)

    def stop(self) -> None:
        self._stop.set()

    @property
    def answered(self) -> int:
        return self.outcomes["200"]

    @property
    def failed(self) -> dict[str, int]:
        return {outcome: count for outcome, count in self.outcomes.items() if outcome != "200"}

    def facts(self) -> dict[str, Any]:
        return {"answered": self.answered, "failed": self.failed, "slowest_s": round(self.slowest_s, 2)}


@contextmanager
def load(url: str, clients: int = 4) -> Iterator[Load]:
    """Ask while the body runs: clients that keep their connection and send one row or 100, one that opens a connection
    for each request, and two that are idle for a time longer than any restart, and shorter."""
    found = Load(url)
    kinds = [(1, True, 0.0)] * clients + [(100, True, 0.0), (1, False, 0.0), (1, True, 1.5), (1, True, 11.0)]
    threads = [threading.Thread(target=found.run, args=kind) for kind in kinds]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        found.stop()
        for thread in threads:
            thread.join()
