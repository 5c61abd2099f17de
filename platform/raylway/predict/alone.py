"""One prediction at a time writes to a place."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from raylway.errors import UserError
from raylway.predict.output import Output


@contextmanager
def alone(output: Output) -> Iterator[None]:
    """No other prediction writes to a local output while the body runs; a lock goes with its process, however it dies.

    Raises:
        UserError: Another one does.
    """
    path = output.path.with_name(f".{output.path.name}.lock")
    with ExitStack() as stack:
        is_mine = False
        while not is_mine:
            file = stack.enter_context(path.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    "another prediction writes there",
                    where=output.place,
                    expected="one at a time",
                    found=f"one that holds {path.name}",
                    fix="wait until it ends, or name another place",
                ) from None
            with suppress(FileNotFoundError):  # the one before has removed it meanwhile: its lock is nobody's
                is_mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
