"""How fast training goes and where its time went, computed from the lines of `metrics.jsonl` and `events.jsonl`.

Workers write some of these figures while they train; terminal and report compute theirs from the same lines, so that
all of them say the same, whoever was killed on the way.

    rows/s       rows of the steps, divided by the seconds of the steps; validations and checkpoints are not in them
    data wait    share of the steps' seconds in which the rank that waited longest for its rows waited
    slowest rank by its own work in a step, before it waits for the others: until its last backward pass begins
    goodput      share of the wall time of training, over all attempts, that was spent in steps which were kept
"""

from __future__ import annotations

import datetime
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from raylway.runs import journal
from raylway.storage import Place

Line = dict[str, Any]
"""One line of `metrics.jsonl` or `events.jsonl`."""
CONTINUES = "attempt continues"
"""The event by which an attempt says what the one before it had made and is lost."""
STARTED = "attempt started"
_ENDS = ("train done", "train failed", "train interrupted")


class Pace(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of some steps in a row; a line of the kind `pace`."""

    first_step: int
    last_step: int
    rows: int
    rows_per_s: float
    step_p50_s: float
    step_p99_s: float
    data_wait: float
    """Share of the steps' time."""
    stall_s: float
    """Seconds that training stood still for checkpoints between these steps."""
    slowest_rank: int | None = None
    """The rank that held up the others longest; None for one worker."""
    behind: float | None = None
    """How much longer than the median rank it took for its own work, as a share of the steps' time."""


class Spent(msgspec.Struct, frozen=True):
    """Where the wall time of training went, in seconds."""

    wall: float
    """From the start of each command to its end, or to the last that was heard of it; not what lies between two."""
    kept: float
    """Steps whose result the weights have."""
    validation: float
    checkpoints: float
    lost: float
    """Steps made again after a restart, or undone by a way back."""
    attempts: int

    @property
    def goodput(self) -> float:
        return self.kept / self.wall if self.wall > 0 else 0.0

    @property
    def starting(self) -> float:
        """All the rest: starts and restarts."""
        return max(0.0, self.wall - self.kept - self.validation - self.checkpoints - self.lost)


def lines(place: Place) -> Iterator[Line]:
    """Records of a journal, oldest first; a line that is not whole yet, or was left in half by a power cut, is none."""
    yield from decoded(journal.read(place))


def decoded(text: bytes) -> Iterator[Line]:
    """The same of its content."""
    for line in text.splitlines():
        try:
            yield msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue


def pace(found: Sequence[Line]) -> Pace | None:
    """Of step lines, and of the checkpoint lines between them; None without a step."""
    steps = [line for line in found if line["kind"] == "step" and "step_s" in line]
    if not steps:
        return None
    times = np.array([line["step_s"] for line in steps])
    total = float(times.sum())
    p50, p99 = np.percentile(times, [50, 99]).tolist()
    behind: dict[int, float] = defaultdict(float)
    for line in steps:
        if "slowest_rank" in line:
            behind[line["slowest_rank"]] += line["slowest_s"] - line["median_s"]
    rank = max(behind, key=lambda rank: behind[rank], default=None)
    rows = sum(line["rows"] for line in steps)
    return Pace(
        first_step=steps[0]["step"],
        last_step=steps[-1]["step"],
        rows=rows,
        rows_per_s=rows / total,
        step_p50_s=p50,
        step_p99_s=p99,
        data_wait=sum(line["data_s"] for line in steps) / total,
        stall_s=sum(line["stall_s"] for line in found if line["kind"] == "checkpoint"),
        slowest_rank=rank,
        behind=None if rank is None else behind[rank] / total,
    )


class Lost(msgspec.Struct, frozen=True):
    """What attempts before this one have made and is made again; in the event `attempt continues`."""

    lost_steps: int
    lost_s: float
    """Validations and checkpoints between the steps included."""
    heard_until: str
    """When the last line was written."""


def lost(behind: Iterable[Line], heard_until: str) -> Lost:
    """Of the lines behind the checkpoint that a run goes on from.

    Args:
        behind: These lines.
        heard_until: When the last line before them was written.
    """
    steps, seconds = 0, 0.0
    for line in behind:
        steps += int(line["kind"] == "step")
        seconds += _seconds_in(line)
        heard_until = line.get("time", heard_until)
    return Lost(steps, seconds, heard_until)


class Tally:
    """Adds up where time went, line by line of `metrics.jsonl`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = array("d")
        """Seconds of each step, in their order; steps count from 1."""
        self._undone: list[tuple[int, int]] = []
        self.rows = 0
        self.heard_until = ""
        """When the newest line was written."""

    @property
    def steps(self) -> int:
        return len(self._steps)

    @property
    def step_s(self) -> float:
        """Seconds of all steps."""
        return sum(self._steps)

    def add(self, line: Line) -> None:
        self.heard_until = line.get("time", self.heard_until)
        if line["kind"] == "step":
            self._steps.append(_seconds_in(line))
            self.rows += line.get("rows", 0)
        elif line["kind"] == "note" and "undone_from" in line:
            self._undone.append((line["undone_from"], line["step"]))
        else:
            self._seconds[line["kind"]] += _seconds_in(line)

    def spent(self, events: Iterable[Line], until: str = "") -> Spent:
        """Where the time went.

        Args:
            events: Lines of `events.jsonl`.
            until: Now, for a run that goes on.
        """
        happened = list(events)
        undone = sum((sum(self._steps[first - 1 : last]) for first, last in self._undone), 0.0)
        return Spent(
            wall=sum(end - start for start, end in sittings(happened, until or self.heard_until)),
            kept=self.step_s - undone,
            validation=self._seconds["validation"],
            checkpoints=self._seconds["checkpoint"],
            lost=undone + sum(line["lost_s"] for line in happened if line["event"] == CONTINUES),
            attempts=sum(line["event"] == STARTED for line in happened),
        )


def sittings(events: Iterable[Line], until: str = "") -> list[tuple[float, float]]:
    """Start and end of each command's training, in seconds since 1970.

    A command that was killed says no end: its end is the last line that it wrote, the time of which is kept by the
    attempt that goes on after it.

    Args:
        events: Lines of `events.jsonl`.
        until: The end of a command that has said none.
    """
    found: list[_Sitting] = []
    for line in events:
        name, at = line["event"], seconds_of(line["time"])
        here = found[-1] if found and found[-1].is_open else None
        if name == "train running" or (name == STARTED and (here is None or here.launch not in ("", line["launch"]))):
            here = _Sitting(at, at)
            found.append(here)
        if name == STARTED and here is not None:
            here.launch = line["launch"]
        if name == CONTINUES and len(found) > 1 and line["heard_until"]:
            before, heard = found[-2], seconds_of(line["heard_until"])
            before.end = max(before.end, min(heard, found[-1].start))
        if here is not None:
            here.end, here.is_open = at, name not in _ENDS
    if found and found[-1].is_open and until:
        found[-1].end = max(found[-1].end, seconds_of(until))
    return [(sitting.start, sitting.end) for sitting in found]


def _seconds_in(line: Line) -> float:
    """What a step, a validation or a checkpoint took."""
    key = {"step": "step_s", "validation": "elapsed_s", "checkpoint": "stall_s"}.get(line["kind"], "")
    return line.get(key, 0.0)


@dataclass
class _Sitting:
    start: float
    end: float
    launch: str = ""
    is_open: bool = True


def now() -> str:
    """UTC, ISO 8601, as in all records."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def seconds_of(time: str) -> float:
    """Since 1970."""
    return datetime.datetime.fromisoformat(time).timestamp()
