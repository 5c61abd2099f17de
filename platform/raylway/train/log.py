"""`metrics.jsonl`: one line for each step, validation and checkpoint, written by rank 0, each step there once.

A checkpoint remembers how long the file was; a resumed run goes on from there, behind the lines about the checkpoint
itself, and what workers of an attempt whose driver was killed still write counts for nothing (`runs.journal`). What is
written here goes on to where people watch (`sinks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import msgspec

from raylway.errors import RunFailed, UserError
from raylway.runs import journal, pace, starts
from raylway.runs.pace import Line, Tally
from raylway.runs.run import Run

_ENCODER = msgspec.json.Encoder()
PACE_STEPS = 1_000
"""At most so many steps are between two lines of the kind `pace`; each epoch ends with one."""


class Sink(Protocol):
    """Another place for the lines."""

    def write(self, line: Line) -> None: ...

    def flush(self) -> None: ...


class MetricsLog:
    """The file, opened for appending.

    Args:
        run: Its events tell the share of the wall time that went into steps, and hear of the first one.
        size: Bytes to keep, from the checkpoint that the run goes on from; 0 for a new run.
        sinks: Get each line that is written from now on.
    """

    def __init__(self, run: Run, size: int, sinks: Sequence[Sink] = ()) -> None:
        found = journal.read(run.metrics)
        size = _kept(found, size) if size else 0
        self._run, self._sinks = run, sinks
        self._has_begun = False
        self._tally, self._recent = Tally(), list[Line]()
        for line in pace.decoded(found[:size]):
            self._add(line)
        self.lost = pace.lost(pace.decoded(found[size:]), self._tally.heard_until) if found else None
        """What the attempts before have written behind this point; None if there was none."""
        self._lines = journal.begin(run.metrics, size)

    def write(self, kind: str, **figures: Any) -> None:
        line = {"kind": kind, "time": pace.now(), **figures}
        self._lines.write(_ENCODER.encode(line) + b"\n")
        self._add(line)
        for sink in self._sinks:
            sink.write(line)
        if kind == "step" and not self._has_begun:
            self._has_begun = True
            self._run.log(starts.FIRST_STEP)

    def pace(self, step: int, is_last_of_epoch: bool) -> None:
        """Write a line of the kind `pace` where one is due after a step."""
        if not is_last_of_epoch and step % PACE_STEPS:
            return
        if found := pace.pace(self._recent):
            spent = self._tally.spent(pace.lines(self._run.events), pace.now())
            overall = self._tally.rows / self._tally.step_s
            self.write(
                "pace", step=step, **msgspec.to_builtins(found), overall_rows_per_s=overall, goodput=spent.goodput
            )

    def mark(self) -> int:
        """The size of the file."""
        return self._lines.size

    def close(self) -> None:
        """After the last line: what came behind the last checkpoint is kept as far as that goes."""
        with suppress(OSError, UserError, RunFailed):
            self._lines.close()

    def sync(self) -> None:
        """Return when what was written is where it should be. Called from the thread that writes checkpoints."""
        for sink in self._sinks:
            sink.flush()
        self._lines.sync()

    def _add(self, line: Line) -> None:
        self._tally.add(line)
        self._recent.append(line)
        if line["kind"] == "pace":
            self._recent = []


def _kept(content: bytes, size: int) -> int:
    while content.startswith(b'{"kind":"checkpoint"', size) and (end := content.find(b"\n", size)) >= 0:
        size = end + 1
    return size


class NoLog:
    """What the other ranks write to."""

    def write(self, kind: str, **figures: Any) -> None:
        pass

    def pace(self, step: int, is_last_of_epoch: bool) -> None:
        pass

    def mark(self) -> int:
        return 0

    def close(self) -> None:
        pass

    def sync(self) -> None:
        pass
