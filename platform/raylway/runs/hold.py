"""One command at a time works on a run, or writes to a place: a file lock in a folder, a lease in a bucket."""

from __future__ import annotations

import fcntl
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from raylway import storage
from raylway.errors import RunFailed, UserError
from raylway.storage import Address, Place

RENEW_EVERY_S = 10.0
_EXPIRES_AFTER = 3
"""A lease that was not renewed for so many times that is of a holder that died."""


class Lease(msgspec.Struct, frozen=True):
    """Who holds a run or a place in a bucket, `lease.json`."""

    holder: str
    host: str
    process: int
    renewed: int
    """How often."""


@contextmanager
def hold(folder: Place) -> Iterator[None]:
    """Hold a run while the body runs. A lock goes with its process, however it dies; a lease does when its holder is
    known to be dead (its process on this machine is gone), or has not renewed it for half a minute.

    Raises:
        UserError: Another command holds it.
    """
    if isinstance(folder, Address):
        with leased(folder / "lease.json", lambda holder: _held(folder, holder)):
            yield
    else:
        with _locked(folder):
            yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _held(folder, "") from None
        yield


@contextmanager
def leased(place: Address, held: Callable[[str], UserError]) -> Iterator[Callable[[], None]]:
    """Hold a lease while the body runs.

    Args:
        place: Of the lease.
        held: The error for the words that say who has it.

    Yields:
        What raises if another has it: of two that begin at the same time both may believe for a moment that it is
        theirs.

    Raises:
        UserError: Another has it.
    """
    found = _read(place)
    if found is not None and not _is_dead(place, found):
        raise held(f"process {found.process} on {found.host}")
    mine = Lease(secrets.token_hex(8), platform.node(), os.getpid(), 0)

    def check() -> None:
        if (now := _read(place)) is None or now.holder != mine.holder:
            raise held("another command began at the same time")

    storage.write_record(place, mine)
    check()
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(place, mine, ended), name="lease", daemon=True)
    renewing.start()
    try:
        yield check
    finally:
        ended.set()
        renewing.join()
        with suppress(RunFailed, UserError):  # it expires by itself
            if (left := _read(place)) is not None and left.holder == mine.holder:
                place.unlink(missing_ok=True)


def _read(place: Address) -> Lease | None:
    try:
        return storage.read_record(place, Lease)
    except FileNotFoundError:
        return None


def _is_dead(place: Address, found: Lease) -> bool:
    """Whether a lease is of a process that is gone; waits for its next renewal where that can't be seen from here."""
    if found.host == platform.node() and not Path("/proc", str(found.process)).exists() and Path("/proc/self").exists():
        return True
    deadline = time.monotonic() + _EXPIRES_AFTER * RENEW_EVERY_S
    while time.monotonic() < deadline:
        time.sleep(RENEW_EVERY_S / 5)
        now = _read(place)
        if now is None:
            return True
        if now != found:
            return False
    return True


def _renew(place: Address, mine: Lease, ended: threading.Event) -> None:
    """Again and again until the end. Where another has taken it over it is the other's."""
    count = 0
    while not ended.wait(RENEW_EVERY_S):
        with suppress(RunFailed, UserError):
            if (now := _read(place)) is None or now.holder != mine.holder:
                return
            count += 1
            storage.write_record(place, msgspec.structs.replace(mine, renewed=count))


def _held(folder: Place, holder: str) -> UserError:
    return UserError(
        "this run is being worked on by another process",
        where=str(folder),
        found=holder,
        fix="wait until it ends, or stop it and give this command again",
    )
