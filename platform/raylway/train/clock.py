"""How long the parts of a step take on one rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Own(NamedTuple):
    """One rank's part in the time of a step, in seconds."""

    wait: float
    """For its rows."""
    work: float
    """From the start of the step, its wait included, until it may have to wait for other ranks."""


class Clock:
    """Times the step at hand. On a GPU, work is what the GPU has done, not what was handed to it.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._marks = _gpu_marks() if device.type == "cuda" else None
        self._started_at = self._fed_at = self._worked_until = time.monotonic()
        self._stopped_s = 0.0

    def start(self) -> None:
        """The step begins."""
        self._started_at = self._worked_until = time.monotonic()
        self._stopped_s = 0.0
        if self._marks:
            for mark in self._marks:
                mark.record()

    def fed(self) -> None:
        """The rows are here."""
        self._fed_at = self._worked_until = time.monotonic()

    def worked(self) -> None:
        """So far this rank has not waited for another one; the last call of a step counts."""
        self._worked_until = time.monotonic()
        if self._marks:
            self._marks[1].record()

    def own(self) -> Own:
        """Of this step."""
        work = self._worked_until - self._started_at
        if self._marks:
            # The exchange that follows waits for the GPU anyway.
            self._marks[1].synchronize()
            work = max(work, self._marks[0].elapsed_time(self._marks[1]) / 1000)
        return Own(self._fed_at - self._started_at, work)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The body is not the step's: a wait for a checkpoint."""
        stopped_at = time.monotonic()
        yield
        self._stopped_s += time.monotonic() - stopped_at

    def elapsed_s(self) -> float:
        """Since the step began."""
        return time.monotonic() - self._started_at - self._stopped_s


def _gpu_marks() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
