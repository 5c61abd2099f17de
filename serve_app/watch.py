"""What is known of the requests afterwards: metrics and the access log.

A request only leaves a note. Once a second the notes of that second become counts and lines in a thread, since counting
and writing at once would cost each request more than reading it does. Metrics go through Ray, with its labels
`application`, `deployment` and `replica`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec
from ray.serve import metrics

from raylway.bundle.contents import BundleRecord
from raylway.bundle.rows import Rows
from serve_app.drift import INTERVAL_S, Drift, Report

FLUSH_S = 1.0
GONE = 499
"""Not a status that is ever sent: the client went away before its answer."""
MOST_INPUTS = 100
"""Inputs with metrics of their own; a wider model has them for the first so many that drift."""
_LOGGER = logging.getLogger("ray.serve")
_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]
_ROWS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0]


@dataclass(slots=True)
class Note:
    """What one request leaves. No value of a row is in it."""

    method: str
    path: str
    request_id: str
    started_at: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)
    form: str = "page"
    key: str | None = None
    rows: int = 0
    received: int = 0
    status: int = GONE
    sent: int = 0
    seconds: float = 0.0

    def line(self) -> bytes:
        """As one line of JSON."""
        at = datetime.fromtimestamp(self.started_at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        content = {
            "time": at,
            "request_id": self.request_id,
            "key": self.key,
            "method": self.method,
            "path": self.path,
            "form": self.form,
            "status": self.status,
            "rows": self.rows,
            "received_bytes": self.received,
            "sent_bytes": self.sent,
            "ms": round(self.seconds * 1000, 3),
        }
        return msgspec.json.encode(content) + b"\n"


class Watch:
    """Of one replica; lives in its event loop.

    Args:
        record: Of the bundle that is served.
        write: Takes lines of the access log, in a thread; without it there is none.
    """

    def __init__(self, record: BundleRecord, write: Callable[[bytes], None] | None = None) -> None:
        self._write = write
        self._notes: list[Note] = []
        self._batches: list[int] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="watch")
        self._timer: asyncio.TimerHandle | None = None
        self._drift = Drift(record, record.profile) if record.profile else None
        self._drift_at = time.monotonic() + INTERVAL_S
        self.waiting: Callable[[], int] = lambda: 0
        """How many rows wait now."""
        self._metrics = _Metrics(record)

    def asked(self, rows: Rows) -> None:
        """Rows were asked, and are good."""
        if self._drift:
            self._drift.add(rows)

    def computed(self, rows: int) -> None:
        """A batch of so many rows was computed; from any thread."""
        self._batches.append(rows)

    def ended(self, note: Note) -> None:
        """A request is over."""
        note.seconds = time.perf_counter() - note.started
        self._notes.append(note)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Hand everything noted to the thread."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        notes, self._notes = self._notes, []
        batches, self._batches = self._batches, []
        sample = []
        if self._drift and time.monotonic() >= self._drift_at:
            sample = self._drift.take()
            self._drift_at = time.monotonic() + INTERVAL_S
        self._thread.submit(self._count, notes, batches, self.waiting(), sample).add_done_callback(_say_failure)

    def close(self) -> None:
        """Wait until all is written."""
        self.flush()
        self._thread.shutdown()

    def _count(self, notes: list[Note], batches: list[int], waiting: int, sample: list[Rows]) -> None:
        if self._write and notes:
            self._write(b"".join(note.line() for note in notes))
        self._metrics.count(notes, batches, waiting)
        if sample and self._drift:
            self._metrics.tell(self._drift.count(sample))


class _Metrics:
    def __init__(self, record: BundleRecord) -> None:
        self._requests = _counter("requests", "Requests by form and status.", "form", "status")
        self._rows = _counter("rows", "Rows asked.", "form")
        self._seconds = metrics.Histogram("raylway_request_seconds", "Time to the answer.", _SECONDS, ("form",))
        self._batch = metrics.Histogram("raylway_batch_rows", "Rows in one pass through the model.", _ROWS)
        self._waiting = _gauge("waiting_rows", "Rows in the queue.")
        self._psi = _gauge("input_psi", "Population stability index of an input against training.", "input")
        self._missing = _gauge("input_missing", "Share of the rows without a value.", "input")
        self._unseen = _gauge("input_unseen", "Share of the rows with a category that training did not see.", "input")
        self._outside = _gauge("input_out_of_range", "Share of the rows outside the range of training.", "input")
        self._drifted = _gauge("inputs_drifted", "Inputs that pass a limit of drift.")
        self._compared = _gauge("drift_rows", "Rows that are compared with training.")
        self._shown: set[str] = set()
        self._model = _gauge("model", "1 for the model that is served.", "name", "version")
        self._model.set(1, {"name": record.name, "version": record.version})

    def count(self, notes: list[Note], batches: list[int], waiting: int) -> None:
        ended = Counter((note.form, str(note.status)) for note in notes)
        for (form, status), count in ended.items():
            self._requests.inc(count, {"form": form, "status": status})
        rows: Counter[str] = Counter()
        for note in notes:
            rows[note.form] += note.rows
            self._seconds.observe(note.seconds, {"form": note.form})
        for form, count in rows.items():
            if count:
                self._rows.inc(count, {"form": form})
        for batch in batches:
            self._batch.observe(batch)
        self._waiting.set(waiting)

    def tell(self, report: Report) -> None:
        """Show how far the inputs are from training."""
        drifted = [shift.name for shift in report.shifts if shift.reasons]
        self._drifted.set(len(drifted))
        self._compared.set(report.rows)
        names = [shift.name for shift in report.shifts] if len(report.shifts) <= MOST_INPUTS else drifted
        self._shown |= set(names[: MOST_INPUTS - len(self._shown)])
        for shift in report.shifts:
            if shift.name in self._shown:
                tags = {"input": shift.name}
                self._psi.set(shift.psi, tags)
                self._missing.set(shift.missing, tags)
                self._unseen.set(shift.unknown, tags)
                if shift.name in report.out_of_range:
                    self._outside.set(report.out_of_range[shift.name], tags)


def _say_failure(done: Future[None]) -> None:
    if error := done.exception():
        _LOGGER.error("requests could not be counted", exc_info=error)


def _counter(name: str, text: str, *tags: str) -> metrics.Counter:
    return metrics.Counter(f"raylway_{name}", text, tags)  # type: ignore[arg-type] # Ray declares one tag, takes any


def _gauge(name: str, text: str, *tags: str) -> metrics.Gauge:
    return metrics.Gauge(f"raylway_{name}", text, tags)  # type: ignore[arg-type]
