"""Where people watch a run beside its own files: TensorBoard, and Prometheus through Ray's metrics. Fed by rank 0."""

from __future__ import annotations

import math
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from raylway import storage
from raylway.runs.pace import Line, seconds_of
from raylway.runs.run import Run
from raylway.storage import Address, Place
from raylway.train.log import Sink

FOLDER = "tensorboard"
_NAMES = "events.out.tfevents."
_FLUSH_EVERY_S = 10.0
_OBJECT_BYTES = 1 << 20
_EXPORT_EVERY_S = 1.0
_GROUPS = {
    "loss": "train",
    "lr": "train",
    "grad_norm": "train",
    "val_": "validation",
    "rows_per_s": "speed",
    "overall_rows_per_s": "speed",
    "step_s": "speed",
    "data_s": "speed",
    "slowest_s": "speed",
    "median_s": "speed",
    "step_p50_s": "speed",
    "step_p99_s": "speed",
    "data_wait": "speed",
    "stall_s": "speed",
    "behind": "speed",
    "goodput": "speed",
}
"""Under which heading a figure is shown; what is not listed (or does not begin so) is not shown."""


def all_of(run: Run, step: int) -> list[Sink]:
    """The sinks of a run that goes on behind a step."""
    found: list[Sink] = [TensorBoard(run.folder / FOLDER, step)]
    if _is_inside_ray():
        found.append(Prometheus(run.folder.parent.name, run.folder.name))
    return found


class TensorBoard:
    """Event files for TensorBoard, a new one for each attempt; each step is in one of them. In a bucket they are sent
    with each checkpoint.

    Args:
        folder: Of these files.
        step: What earlier attempts have written of later steps is cut off.
    """

    def __init__(self, folder: Place, step: int) -> None:
        kept = [each for each in storage.children(folder) if each.name.startswith(_NAMES)]
        for place in kept:
            content = place.read_bytes()
            size = _size_until(content, step)
            if size < len(content):
                # A copy: workers whose driver was killed may still write into the old one.
                storage.write_bytes(place, content[:size])
        begun_at = time.time()
        # TensorBoard reads the files of a folder by name. The number tells apart starts within one second.
        name = f"{_NAMES}{begun_at:010.0f}.{socket.gethostname()}"
        first = _record(Event(wall_time=begun_at, file_version="brain.Event:2"))
        self._file: _Events
        if isinstance(folder, Address):
            self._file = _Objects(folder, name, len(kept), first)
        else:
            self._file = _File(folder, f"{name}.{len(kept):05d}", first)

    def write(self, line: Line) -> None:
        event = Event(wall_time=seconds_of(line["time"]), step=line["step"])
        for name, value in _figures(line):
            # A window's stall is in the lines of its checkpoints.
            if not (line["kind"] == "pace" and name in ("rows_per_s", "stall_s")):
                event.summary.value.add(tag=f"{_group(name)}/{name}", simple_value=value)
        if event.summary.value:
            self._file.write(_record(event))

    def flush(self) -> None:
        self._file.flush()


class _Events(Protocol):
    """What the records are written to."""

    def write(self, record: bytes) -> None: ...

    def flush(self) -> None:
        """Return when they are there for others."""
        ...


class _File:
    """In a folder; others see the records after a while."""

    def __init__(self, folder: Path, name: str, first: bytes) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / name).open("ab")
        self._file.write(first)
        self._flushed_at = time.monotonic()

    def write(self, record: bytes) -> None:
        self._file.write(record)
        if time.monotonic() - self._flushed_at >= _FLUSH_EVERY_S:
            self._flushed_at = time.monotonic()
            self._file.flush()

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


class _Objects:
    """In a bucket, where nothing can be appended: the newest is sent again at each flush until it is full.

    Written and flushed by two threads.
    """

    def __init__(self, folder: Address, name: str, number: int, first: bytes) -> None:
        self._folder, self._name, self._number, self._first = folder, name, number, first
        self._contents = {number: bytearray(first)}
        """By number: what is not sent yet, or not full."""
        self._lock = threading.Lock()

    def write(self, record: bytes) -> None:
        with self._lock:
            if len(self._contents[self._number]) >= _OBJECT_BYTES:
                self._number += 1
                self._contents[self._number] = bytearray(self._first)
            self._contents[self._number] += record

    def flush(self) -> None:
        with self._lock:
            newest, contents = self._number, {number: bytes(content) for number, content in self._contents.items()}
        for number, content in contents.items():
            storage.write_bytes(self._folder / f"{self._name}.{number:05d}", content)
            if number < newest:
                with self._lock:
                    del self._contents[number]


class Prometheus:
    """Gauges and counters `raylway_train_<figure>` in the metrics that each node of Ray exports, once a second.

    Args:
        job: The job's name, a tag of each.
        run: The run's id, another.
    """

    def __init__(self, job: str, run: str) -> None:
        from ray.util.metrics import Counter, Gauge

        self._tags = {"job": job, "run": run}
        self._gauges: dict[str, Gauge] = {}
        self._counters = {
            name: Counter(f"raylway_train_{name}", f"{name.capitalize()} made by this attempt.", tuple(self._tags))
            for name in ("steps", "rows")
        }
        self._counts = {"steps": 0, "rows": 0}
        self._latest: Line = {}
        self._exported_at = -math.inf

    def write(self, line: Line) -> None:
        self._latest |= dict(_figures(line))
        if line["kind"] == "step":
            self._latest["step"] = line["step"]
            self._counts["steps"] += 1
            self._counts["rows"] += line["rows"]
        if time.monotonic() - self._exported_at >= _EXPORT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        from ray.util.metrics import Gauge

        self._exported_at = time.monotonic()
        for name, value in self._latest.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"raylway_train_{name}", f"The newest {name}.", tuple(self._tags))
            self._gauges[name].set(value, self._tags)
        for name, count in self._counts.items():
            if count:
                self._counters[name].inc(count, self._tags)
            self._counts[name] = 0


def _figures(line: Line) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if _group(name) and isinstance(value, int | float) and math.isfinite(value):
            yield name, value


def _group(name: str) -> str:
    return _GROUPS["val_"] if name.startswith("val_") else _GROUPS.get(name, "")


def _record(event: Event) -> bytes:
    """Its length, a checksum of that, itself, its checksum."""
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return b"".join(
        [length, struct.pack("<I", masked_crc32c(length)), content, struct.pack("<I", masked_crc32c(content))]
    )


def _size_until(content: bytes, step: int) -> int:
    """Bytes of the whole records up to a step."""
    at = 0
    while at + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        end = at + 16 + length
        if end > len(content) or Event.FromString(content[at + 12 : end - 4]).step > step:
            break
        at = end
    return at


def _is_inside_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()
