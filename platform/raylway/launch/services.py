"""Which models are served on this machine by an embedded Ray: a note that each such process keeps, for `--replace`.

It holds the Ray's address and lies in a folder that only this user can read, which goes with the process however that
one ends. Whoever joins still needs Ray's token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec

from raylway import storage
from raylway.launch import start
from raylway.runs.progress import Reporter

_FILE = "serving.json"


class Service(msgspec.Struct, frozen=True):
    """One process that serves."""

    address: str
    """Of its Ray."""
    url: str
    names: list[str]
    """Of the applications."""

    def __str__(self) -> str:
        return f"{', '.join(self.names)} at {self.url} (RAY_ADDRESS={self.address})"


@contextmanager
def announced(service: Service, reporter: Reporter) -> Iterator[None]:
    """Let `running` find a service while the body runs."""
    with start.temporary_folder(reporter) as folder:
        storage.write_record(folder / _FILE, service)
        yield


def running() -> list[Service]:
    """The services of this user on this machine."""
    found = []
    for folder in start.live_folders():
        with suppress(FileNotFoundError):
            found.append(storage.read_record(folder / _FILE, Service))
    return found
