"""One prediction at a time writes to a place: a file lock on disk, a lease in a bucket."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from raylway.errors import UserError
from raylway.predict.output import Output, unwritable
from raylway.runs import hold
from raylway.storage import buckets


@contextmanager
def alone(output: Output) -> Iterator[Callable[[], None]]:
    """No other prediction writes to the output while the body runs. A lock goes with its process, however it dies, a
    lease some time later (`hold`).

    Yields:
        What raises if another prediction has the place after all; call it before something is written there.

    Raises:
        UserError: Another one writes there, or it can't be written.
    """
    with ExitStack() as stack:
        check: Callable[[], None] = lambda: None  # noqa: E731
        if (lease := buckets.parsed(f"{output.place}.lease.json")) and output.is_remote:
            check = stack.enter_context(hold.leased(lease, lambda holder: _held(output, holder)))
        elif output.place:
            try:
                stack.enter_context(_locked(output))
            except OSError as error:
                raise unwritable(output.place, error) from None
        yield check


@contextmanager
def _locked(output: Output) -> Iterator[None]:
    path = output.path.with_name(f".{output.path.name}.lock")
    with ExitStack() as stack:
        is_mine = False
        while not is_mine:
            file = stack.enter_context(path.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _held(output, f"one that holds {path.name}") from None
            with suppress(FileNotFoundError):  # the one before has removed it meanwhile: its lock is nobody's
                is_mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _held(output: Output, holder: str) -> UserError:
    return UserError(
        "another prediction writes there",
        where=output.place,
        expected="one at a time",
        found=holder,
        fix="wait until it ends, or name another place",
    )
