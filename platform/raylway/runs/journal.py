"""Lines that are appended: a file in a folder; in a bucket, where nothing can be appended, segments below its name.

    events.jsonl/t<nanoseconds>-<random>.jsonl   one line of any process; in the order of the names
    metrics.jsonl/g<start>-<offset>.jsonl        lines of one writer from this offset on; what a later start has written
                                                 replaces whatever an earlier one wrote from its first offset on

So a writer whose successor has begun may live on for a moment: what it still writes counts for nothing.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from raylway import storage
from raylway.errors import RunFailed
from raylway.storage import Address, Place

SEND_EVERY_S = 5.0
"""Lines of training are sent to a bucket so often, and read from it."""
_SEGMENT_BYTES = 1 << 20
_AT_ONCE = 16
_OF_A_START = re.compile(r"g(\d+)-(\d+)\.jsonl")


def append(place: Place, line: bytes) -> None:
    """Append one line, which ends with a newline; from any process at any time, and lines never mix."""
    if isinstance(place, Address):
        storage.write_bytes(place / f"t{time.time_ns():020d}-{secrets.token_hex(3)}.jsonl", line)
        return
    with place.open("a+b", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            # A line that a power cut left in half must not take this one along.
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def read(place: Place) -> bytes:
    """All lines; nothing if there are none yet. The last may not be whole."""
    if isinstance(place, Path):
        return place.read_bytes() if place.exists() else b""
    text = b""
    for name, segment in _segments(place, storage.children(place)):
        start = _OF_A_START.fullmatch(name)
        text = (text[: int(start[2])] if start else text) + segment
    return text


def newest(place: Address) -> bytes:
    """Of a bucket the last lines that the newest start has sent; nothing before it has."""
    segments = [each for each in storage.children(place) if _OF_A_START.fullmatch(each.name)]
    return segments[-1].read_bytes() if segments else b""


class Writer(Protocol):
    """Who appends many lines."""

    def write(self, line: bytes) -> None:
        """Append a line."""
        ...

    @property
    def size(self) -> int:
        """The length of all lines."""
        ...

    def sync(self) -> None:
        """Return when all that was written is where it should be. From any thread."""
        ...

    def close(self) -> None: ...


def begin(place: Place, size: int) -> Writer:
    """Start to write behind the first `size` bytes of what is there; the rest is cut off."""
    return _Segments(place, size) if isinstance(place, Address) else _File(place, size)


class Tail:
    """What is appended from now on.

    Args:
        place: Of the lines.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._looked_at = time.monotonic()
        self._name, self._read = self._end()

    def new(self) -> list[bytes]:
        """Whole lines that have come since; of a bucket none before `SEND_EVERY_S` are over. Where a new start has cut
        back what is there, its lines come from there on."""
        if isinstance(self._place, Address):
            with suppress(RunFailed):  # out of reach: whoever writes there says so
                return self._of_segments(self._place)
            return []
        if not self._place.exists():
            return []
        with self._place.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._read:
                self._read = 0
            file.seek(self._read)
            return self._whole(file.read())

    def restart(self) -> None:
        """What was read is no longer there: begin anew."""
        self._read = 0

    def _end(self) -> tuple[str, int]:
        if isinstance(self._place, Path):
            return "", storage.size(self._place) or 0
        there = storage.children(self._place)
        return (there[-1].name, storage.size(there[-1]) or 0) if there else ("", 0)

    def _of_segments(self, place: Address) -> list[bytes]:
        if time.monotonic() - self._looked_at < SEND_EVERY_S:
            return []
        self._looked_at = time.monotonic()
        lines = []
        for segment in storage.children(place):
            if segment.name >= self._name:
                if segment.name > self._name:
                    self._name, self._read = segment.name, 0
                lines += self._whole(segment.read_bytes()[self._read :])
        return lines

    def _whole(self, text: bytes) -> list[bytes]:
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.splitlines()


class _File:
    """A copy of the first bytes under the same name, and what is appended to it. A copy, because whoever wrote before
    may live on for a moment: what it still writes goes into the old file."""

    def __init__(self, path: Path, size: int) -> None:
        storage.write_bytes(path, path.read_bytes()[:size] if size and path.exists() else b"")
        # Unbuffered: a line is one write, so readers see whole lines and a killed process loses none.
        self._file = path.open("ab", buffering=0)

    def write(self, line: bytes) -> None:
        self._file.write(line)

    @property
    def size(self) -> int:
        return self._file.tell()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _Segments:
    """The segments of one start. The newest is sent again and again until it is full, beside whoever writes."""

    def __init__(self, place: Address, size: int) -> None:
        starts = [int(found[1]) for each in place.iterdir() if (found := _OF_A_START.fullmatch(each.name))]
        self._place, self._start = place, 1 + max(starts, default=0)
        self._offset, self._lines, self._sent = size, bytearray(), -1
        self._of_lines, self._of_sending = threading.Lock(), threading.Lock()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="lines")
        self._sending: Future[None] | None = None
        self._send_at = time.monotonic() + SEND_EVERY_S
        self.sync()  # an empty segment alone cuts off what comes behind

    @property
    def size(self) -> int:
        with self._of_lines:
            return self._offset + len(self._lines)

    def write(self, line: bytes) -> None:
        with self._of_lines:
            self._lines += line
        if time.monotonic() >= self._send_at and (self._sending is None or self._sending.done()):
            # What can't be sent now is sent later; `sync` tells whoever needs to know.
            self._sending = self._sender.submit(self.sync)
            self._send_at = time.monotonic() + SEND_EVERY_S

    def sync(self) -> None:
        with self._of_sending:
            with self._of_lines:
                lines = bytes(self._lines)
            if len(lines) == self._sent:
                return
            storage.write_bytes(self._place / f"g{self._start:06d}-{self._offset:015d}.jsonl", lines)
            self._sent = len(lines)
            if self._sent >= _SEGMENT_BYTES:  # a new one follows
                with self._of_lines:
                    del self._lines[: self._sent]
                    self._offset, self._sent = self._offset + self._sent, 0

    def close(self) -> None:
        self._sender.shutdown()
        self.sync()


def _segments(place: Address, there: list[Place]) -> Iterator[tuple[str, bytes]]:
    """Names and contents; a segment that comes while we look is none yet."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from zip((each.name for each in there), pool.map(_content, map(str, there)), strict=True)


def _content(text: str) -> bytes:
    return _of_one_line(text) if text.rpartition("/")[2].startswith("t") else storage.place(text).read_bytes()


@functools.lru_cache(4096)
def _of_one_line(text: str) -> bytes:
    """Such a segment never changes, and whoever wants to know what has happened asks again and again."""
    return storage.place(text).read_bytes()
