"""Progress of long work: one line a stage, live on a terminal, plain lines elsewhere, JSON for machines.

All of it goes to standard error; standard output is kept for results.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

Style = Literal["live", "lines", "json"]
_LINE_EVERY_S = 5.0
_DRAW_EVERY_S = 0.2


class Stage:
    """One running stage; `update` as often as you like, it is shown at a bearable pace."""

    def __init__(self, reporter: Reporter, name: str) -> None:
        self._reporter, self.name = reporter, name
        self.started_at = time.monotonic()
        self._shown_at = self.started_at
        self._first: tuple[float, float] | None = None
        self.figures: dict[str, Any] = {}

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_at

    def update(self, done: float, total: float | None = None, unit: str = "rows", **figures: Any) -> None:
        """Say how far the stage is.

        Args:
            done: Units done so far.
            total: Units in all, if known; gives the remaining time.
            unit: What is counted.
            figures: Further values to show, such as loss and learning rate.
        """
        now = time.monotonic()
        if self._first is None or self.figures.get("unit") != unit:
            self._first = (now, done)
        since, base = self._first
        rate = (done - base) / (now - since) if now > since else 0.0
        self.figures = {"done": done, "total": total, "unit": unit, "rate": rate, **figures}
        if total and rate > 0:
            self.figures["remaining_s"] = max(0.0, (total - done) / rate)
        if now - self._shown_at >= self._reporter.pace_s:
            self._shown_at = now
            self._reporter.show(self, final=False)

    def finish(self, summary: str) -> None:
        """Say what came out; the stage's last line shows it."""
        self.figures = {"summary": summary}


class Reporter:
    """Where progress goes.

    Args:
        style: `live` redraws one line on a terminal; `lines` prints one now and then; `json` prints one object a line.
        stream: Standard error if left out.
    """

    def __init__(self, style: Style | None = None, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self.style: Style = style or ("live" if self._stream.isatty() else "lines")
        self.pace_s = _DRAW_EVERY_S if self.style == "live" else _LINE_EVERY_S
        self._bar: Bar | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Show a stage from its start to its end; one that fails shows no last line."""
        stage = Stage(self, name)
        if self.style == "json":
            self._json(event="start", stage=name)
        with self._live(name):
            yield stage
        self.show(stage, final=True)

    def note(self, text: str) -> None:
        """One sentence that the user should see now."""
        if self.style == "json":
            self._json(event="note", text=text)
        elif self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def show(self, stage: Stage, final: bool) -> None:
        if self.style == "json":
            event = "done" if final else "progress"
            self._json(event=event, stage=stage.name, elapsed_s=round(stage.elapsed_s, 2), **stage.figures)
            return
        text = stage.figures.get("summary") or _sentence(stage.figures)
        if final:
            self.note(f"{stage.name:<10} ✓ {text}  [{stage.elapsed_s:.1f} s]")
        elif self._bar is not None:
            done, total = stage.figures["done"], stage.figures["total"]
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, text=text)
        else:
            self.note(f"{stage.name:<10} … {text}")

    @contextmanager
    def _live(self, name: str) -> Iterator[None]:
        """On a terminal: a line with a bar, redrawn while the body runs and gone after it."""
        if self.style != "live":
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, ratio=1))
        columns = (TextColumn(f"{name:<10}"), BarColumn(bar_width=20, pulse_style="dim"), text)
        console = Console(file=self._stream, force_terminal=True)
        with Progress(*columns, console=console, transient=True, expand=True) as bar:
            bar.add_task(name, total=None, text="")
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

    def _json(self, **record: Any) -> None:
        print(json.dumps(record, default=str), file=self._stream, flush=True)


def _sentence(figures: dict[str, Any]) -> str:
    if "done" not in figures:
        return ""
    unit, done, total = figures["unit"], figures["done"], figures["total"]
    parts = [f"{done:,.0f}/{total:,.0f} {unit}" if total else f"{done:,.0f} {unit}"]
    if figures["rate"]:
        parts.append(f"{figures['rate']:,.0f} {unit}/s")
    if "remaining_s" in figures:
        parts.append(f"{figures['remaining_s']:.0f} s left")
    known = ("done", "total", "unit", "rate", "remaining_s")
    for name, value in figures.items():
        if name not in known:
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)
