"""Shows what rank 0 appends to `metrics.jsonl`, and for what it waits, without a word between the processes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from raylway.runs import journal, pace, starts
from raylway.runs.pace import Line
from raylway.runs.progress import Reporter, Stage
from raylway.runs.run import Run
from raylway.train.plan import Plan

_WINDOW = 200
"""Newest steps that speed is shown of."""
_BEHIND = 0.1
"""A rank that takes longer than the median one by this share of a step is named."""
PATIENCE_S = 15.0
"""How long workers may take to come before a word is said: placing them and starting their processes takes some 10."""


class Follower:
    """Reads on where it has read to, each time that it looks.

    Args:
        run: Whose metrics.
        planned: How far training goes.
        stage: Gets the newest figures.
        reporter: Gets the notes.
    """

    def __init__(self, run: Run, planned: Plan, stage: Stage, reporter: Reporter) -> None:
        self._tail = journal.Tail(run.metrics)
        self._planned, self._stage, self._reporter = planned, stage, reporter
        self._validation: dict[str, float] = {}
        self._goodput: dict[str, float] = {}
        self._steps = deque[Line](maxlen=_WINDOW)

    def look(self) -> None:
        has_steps = False
        for line in self._tail.new():
            try:
                found = msgspec.json.decode(line)
            except msgspec.DecodeError:
                self._tail.restart()  # a resumed run has cut it back and is past this point again
                break
            has_steps |= found["kind"] == "step"
            self._take(found)
        if has_steps:
            self._show(self._steps[-1])

    def _take(self, line: Line) -> None:
        match line["kind"]:
            case "step":
                if self._steps and line["step"] <= self._steps[-1]["step"]:
                    self._steps.clear()
                self._steps.append(line)
            case "note":
                self._reporter.note(line["text"])
            case "validation":
                self._validation = {name: value for name, value in line.items() if name.startswith("val_")}
            case "pace":
                self._goodput = {"goodput %": round(100 * line["goodput"], 1)}

    def _show(self, step: Line) -> None:
        loss = step["loss"] if step["loss"] is not None else math.nan
        figures: dict[str, Any] = {"loss": loss, "lr": step["lr"]}
        if found := pace.pace(self._steps):
            figures |= {
                "rows/s": round(found.rows_per_s),
                "data wait %": round(100 * found.data_wait, 2),
                "step p50 ms": round(1000 * found.step_p50_s, 2),
                "step p99 ms": round(1000 * found.step_p99_s, 2),
            }
            if found.behind is not None and found.behind > _BEHIND:
                figures["slowest rank"] = found.slowest_rank
        figures |= self._goodput | self._validation
        if step["skipped"]:
            figures["skipped"] = step["skipped"]
        self._stage.update(step["step"], self._planned.total_steps, "steps", **figures)


class Waiting:
    """Says for what a start waits, once, where its workers take long to come.

    Args:
        run: Whose events.
        planned: What the workers need.
        free: Tells the CPUs and GPUs that nobody has taken.
        reporter: Gets the word.
    """

    def __init__(self, run: Run, planned: Plan, free: Callable[[], tuple[float, float]], reporter: Reporter) -> None:
        self._tail = journal.Tail(run.events)
        self._planned, self._free, self._reporter = planned, free, reporter
        self._since, self._said = math.inf, False

    def look(self) -> None:
        for line in pace.decoded(b"\n".join(self._tail.new())):
            match line["event"]:
                case starts.ASKED | starts.WAITS:
                    self._since = min(self._since, time.monotonic())
                case starts.ALIVE:
                    self._since, self._said = math.inf, False
        if not self._said and time.monotonic() - self._since >= PATIENCE_S:
            self._said = True
            self._reporter.note(self._words())

    def _words(self) -> str:
        wanted, (cpus, gpus) = self._planned, self._free()
        count, each = wanted.needed_workers, f"{wanted.cpus_per_worker} CPU{'s' * (wanted.cpus_per_worker > 1)}"
        now = f"{cpus:g} CPUs"
        if wanted.gpus_per_worker:
            each += f" and {wanted.gpus_per_worker} GPU{'s' * (wanted.gpus_per_worker > 1)}"
            now += f" and {gpus:g} GPUs"
        return f"waiting for {count} worker{'s' * (count > 1)} of {each} each; free now: {now}; Ctrl-C ends the wait"
