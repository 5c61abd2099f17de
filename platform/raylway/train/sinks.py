"""Where people watch a run beside its own files: TensorBoard, and Prometheus through Ray's metrics. Fed by rank 0."""

from __future__ import annotations

import math
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from raylway import storage
from raylway.runs.pace import Line, seconds_of
from raylway.runs.run import Run
from raylway.train.log import Sink

FOLDER = "tensorboard"
_FLUSH_EVERY_S = 10.0
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
    found: list[Sink] = [TensorBoard(run.folder / FOLDER, step)] if isinstance(run.folder, Path) else []
    if _is_inside_ray():
        found.append(Prometheus(run.folder.parent.name, run.folder.name))
    return found


class TensorBoard:
    """Event files for TensorBoard, a new one for each attempt; each step is in one of them. Folders only: in a bucket
    nothing can be appended to a file.

    Args:
        folder: Of these files.
        step: What earlier attempts have written of later steps is cut off.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        kept = sorted(folder.glob("events.out.tfevents.*"))
        for path in kept:
            content = path.read_bytes()
            size = _size_until(content, step)
            if size < len(content):
                # A copy: workers whose driver was killed may still write into the old one.
                storage.write_bytes(path, content[:size])
        begun_at = time.time()
        # TensorBoard reads the files of a folder by name. The number tells apart starts within one second.
        name = f"events.out.tfevents.{begun_at:010.0f}.{socket.gethostname()}.{len(kept):05d}"
        self._writer = RecordWriter(str(folder / name))
        self._writer.write(Event(wall_time=begun_at, file_version="brain.Event:2").SerializeToString())
        self._flushed_at = time.monotonic()

    def write(self, line: Line) -> None:
        event = Event(wall_time=seconds_of(line["time"]), step=line["step"])
        for name, value in _figures(line):
            # A window's stall is in the lines of its checkpoints.
            if not (line["kind"] == "pace" and name in ("rows_per_s", "stall_s")):
                event.summary.value.add(tag=f"{_group(name)}/{name}", simple_value=value)
        if event.summary.value:
            self._writer.write(event.SerializeToString())
        if time.monotonic() - self._flushed_at >= _FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        self._flushed_at = time.monotonic()
        self._writer.flush()


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


def _size_until(content: bytes, step: int) -> int:
    """Bytes of the whole records up to a step. A record: its length, a checksum of that, itself, its checksum."""
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
