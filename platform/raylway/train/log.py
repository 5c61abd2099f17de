"""`metrics.jsonl`: one line for each step, validation and checkpoint, written by rank 0, each step there once.

A checkpoint remembers how long the file was; a resumed run goes on from a copy of that length, and of the lines about
the checkpoint itself, which come right behind. A copy, because workers
of an attempt whose driver was killed may live on for a moment: what they still write goes into the old file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from raylway import storage

_ENCODER = msgspec.json.Encoder()


class MetricsLog:
    """The file, opened for appending.

    Args:
        path: `metrics.jsonl`.
        size: Bytes to keep, from the checkpoint that the run goes on from; 0 for a new run.
    """

    def __init__(self, path: Path, size: int) -> None:
        storage.write_bytes(path, _kept(path.read_bytes(), size) if size and path.exists() else b"")
        # Unbuffered: a line is one write, so readers see whole lines and a killed process loses none.
        self._file = path.open("ab", buffering=0)

    def write(self, kind: str, **figures: Any) -> None:
        self._file.write(_ENCODER.encode({"kind": kind, **figures}) + b"\n")

    def mark(self) -> int:
        """The size of the file."""
        return self._file.tell()

    def sync(self) -> None:
        """Return when what was written is on the disk. Called from the thread that writes checkpoints."""
        os.fsync(self._file.fileno())


def _kept(content: bytes, size: int) -> bytes:
    while content.startswith(b'{"kind":"checkpoint"', size) and (end := content.find(b"\n", size)) >= 0:
        size = end + 1
    return content[:size]


class NoLog:
    """What the other ranks write to."""

    def write(self, kind: str, **figures: Any) -> None:
        pass

    def mark(self) -> int:
        return 0

    def sync(self) -> None:
        pass
