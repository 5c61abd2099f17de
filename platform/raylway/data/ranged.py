"""A remote file as a Python file: read in ranges, from any position."""

from __future__ import annotations

import io
from collections.abc import Callable

BUFFER_BYTES = 4 << 20
"""Asked for at a time where little is read; a far server answers in some 50 ms however little it is."""


class Ranged(io.RawIOBase):
    """Bytes of known number that are fetched as they are read.

    Args:
        length: Of the file.
        fetch: Fills a view from a position on, wholly; it ends within the file.
    """

    def __init__(self, length: int, fetch: Callable[[memoryview, int], None]) -> None:
        self._length, self._fetch, self._position = length, fetch, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        if view:
            self._fetch(view, self._position)
        self._position += len(view)
        return len(view)


def buffered(length: int, fetch: Callable[[memoryview, int], None]) -> io.BufferedReader:
    """`Ranged` with what is read in small steps fetched in large ones."""
    return io.BufferedReader(Ranged(length, fetch), max(1, min(BUFFER_BYTES, length)))
