"""Files of web servers that give no ranges: copied to the temporary folder of the process that reads them.

As long as only the beginning is read, as `raylway check` does, only that is copied.
"""

from __future__ import annotations

import tempfile
import threading

import msgspec
import urllib3
import xxhash

from raylway.data.location import Location, was_changed
from raylway.data.web_ask import CHECKSUM, ask, refuse_other
from raylway.errors import UserError

_BEGINNING = 16 << 20
_STEP = 1 << 20
_MOST_COPIES = 32
"""At a time; the oldest goes."""
_copies: dict[str, Copy] = {}
_guard = threading.Lock()


class Copy:
    """The bytes of one file, whole or its beginning; of the file that is copied any number of threads may read.

    Args:
        location: The file, as it was found.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - goes with the copy
        self._lock = threading.Lock()
        self._bytes, self._is_whole, self._checksum = 0, False, ""

    def fetch(self, view: memoryview, position: int) -> None:
        """Fill a view with the file's bytes from a position on.

        Raises:
            UserError: The server does not give the file, or it was changed.
        """
        with self._lock:
            end = position + len(view)
            if end > self._bytes:
                is_beginning = end <= _BEGINNING and not self.location.stamp.startswith(CHECKSUM)
                self._fill(_BEGINNING if is_beginning else None)
            self._file.seek(position)
            if self._file.readinto(view) < len(view):
                raise was_changed(self.location)

    def identify(self) -> Location:
        """The location with the length and checksum of the file, which is copied whole."""
        with self._lock:
            self._fill(None)
            self.location = msgspec.structs.replace(self.location, length=self._bytes, stamp=self._checksum)
            return self.location

    def _fill(self, limit: int | None) -> None:
        ask(self.location, lambda: None, lambda answer: self._take(answer, limit))
        if self.location.stamp.startswith(CHECKSUM) and self.location.stamp != self._checksum:
            raise was_changed(self.location)

    def _take(self, answer: urllib3.BaseHTTPResponse, limit: int | None) -> None:
        """Copy the file from its beginning."""
        if self.location.length is not None:
            refuse_other(self.location, answer)
        if "Content-Length" not in answer.headers and "Transfer-Encoding" not in answer.headers:
            raise UserError(
                "the server does not say where the file ends",
                where=self.location.name,
                expected="Content-Length, or chunks: without them a connection that was cut looks like the end",
                fix="copy the file to a folder or bucket",
            )
        digest, self._bytes = xxhash.xxh3_128(), 0
        try:
            self._file.seek(0)
            self._file.truncate()
            while (limit is None or self._bytes < limit) and (chunk := answer.read(_STEP)):
                self._bytes += self._file.write(chunk)
                digest.update(chunk)
            self._file.flush()
        except OSError as error:
            raise UserError(
                "the file can't be copied to the temporary folder",
                where=self.location.name,
                found=f"{tempfile.gettempdir()}: {error.strerror}",
                fix="name a folder with room in TMPDIR: the server gives no ranges, so the file is copied first",
            ) from None
        self._checksum = f"{CHECKSUM}{digest.hexdigest()}"


def of(location: Location) -> Copy:
    """The copy of a file in this process."""
    with _guard:
        found = _copies.get(location.path)
        known = found and (found.location.length, found.location.stamp)
        if found is None or known != (location.length, location.stamp):
            found = _kept(Copy(location))
        return found


def identified(location: Location) -> Location:
    """The location of a file that the server says too little of, by its copy."""
    with _guard:
        copy = _kept(Copy(location))
    return copy.identify()


def _kept(copy: Copy) -> Copy:
    _copies.pop(copy.location.path, None)
    while len(_copies) >= _MOST_COPIES:
        del _copies[next(iter(_copies))]
    _copies[copy.location.path] = copy
    return copy
