"""`metrics.jsonl`: one line for each step, validation and checkpoint, written by rank 0, each step there once.

A checkpoint remembers how long the file was; a resumed run goes on from there, behind the lines about the checkpoint
itself, and what workers of an attempt whose driver was killed still write counts for nothing (`runs.journal`).
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec

from raylway.errors import RunFailed, UserError
from raylway.runs import journal
from raylway.storage import Place

_ENCODER = msgspec.json.Encoder()


class MetricsLog:
    """The file, opened for appending.

    Args:
        place: `metrics.jsonl`.
        size: Bytes to keep, from the checkpoint that the run goes on from; 0 for a new run.
    """

    def __init__(self, place: Place, size: int) -> None:
        self._lines = journal.begin(place, _kept(journal.read(place), size) if size else 0)

    def write(self, kind: str, **figures: Any) -> None:
        self._lines.write(_ENCODER.encode({"kind": kind, **figures}) + b"\n")

    def mark(self) -> int:
        """The size of the file."""
        return self._lines.size

    def close(self) -> None:
        """After the last line: what came behind the last checkpoint is kept as far as that goes."""
        with suppress(OSError, UserError, RunFailed):
            self._lines.close()

    def sync(self) -> None:
        """Return when what was written is where it should be. Called from the thread that writes checkpoints."""
        self._lines.sync()


def _kept(content: bytes, size: int) -> int:
    while content.startswith(b'{"kind":"checkpoint"', size) and (end := content.find(b"\n", size)) >= 0:
        size = end + 1
    return size


class NoLog:
    """What the other ranks write to."""

    def write(self, kind: str, **figures: Any) -> None:
        pass

    def mark(self) -> int:
        return 0

    def close(self) -> None:
        pass

    def sync(self) -> None:
        pass
