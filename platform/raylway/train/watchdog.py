"""A rank that hangs says who it is and where it is, and ends, so that Ray Train starts the group again.

Nothing else would end it: its peers wait for it, until their own timeout, and one worker alone waits for ever.

How long is too long? A rank shows life at each forward pass, so the limit is one of a microbatch and what lies between
two of them, not of a step. Who has waited so long inside an exchange with its peers is probably not the cause and
leaves the first word to the others. What is slow by nature has the long limit: the way to the first pass (weights and
data are read), a checkpoint, and torch.compile.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Self

from raylway.errors import UserError

LIMIT_VARIABLE = "RAYLWAY_HANG_LIMIT_S"
_LIMIT_S = 240.0
"""Four minutes for one microbatch are no pace to train at; and a shard of the data is read in less."""
_LEAST_S, _MOST_S = 1.0, 86_400.0
LONG = 7.5
"""Times the limit, for what is slow by nature: half an hour by default."""
_WAITING = 1.1
"""Times the limit, for ranks inside an exchange; less than `strategy.TIMEOUT_OVER_LIMIT`."""
_LOOKS = 20
"""Within the limit."""
_SLOW_BY_NATURE = ("/torch/_dynamo/", "/torch/_inductor/", "/raylway/train/checkpoint", "/raylway/train/sav")
_EXCHANGES = ("/torch/distributed/", "/torch/autograd/", "/raylway/train/messages.py")
_SHOWN_FRAMES = 12
_STANDARD_ERROR = 2
"""By its number: `sys.stderr` may be replaced by something that is no file."""


def limit_s() -> float:
    """Seconds, from the environment of the command.

    Raises:
        UserError: What is there is no number of seconds.
    """
    text = os.environ.get(LIMIT_VARIABLE, str(_LIMIT_S))
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not _LEAST_S <= found <= _MOST_S:
        raise UserError(
            "the watchdog's limit is no time to wait",
            where=LIMIT_VARIABLE,
            expected=f"seconds from {_LEAST_S:g} to {_MOST_S:g}, such as {_LIMIT_S:g}",
            found=text,
        )
    return found


class Watchdog:
    """Watches the thread that makes it, from the start of the block to its end.

    Args:
        limit_s: Seconds without a pass.
        tell: Called with what to record, before the process ends.
    """

    def __init__(self, limit_s: float, tell: Callable[[str], None]) -> None:
        self._limit_s, self._tell = limit_s, tell
        self._thread = threading.get_ident()
        self._quiet_s = 0.0
        self._passes = 0
        self._over = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """A forward pass begins."""
        self._quiet_s = 0.0
        self._passes += 1

    def _watch(self) -> None:
        every_s = self._limit_s / _LOOKS
        last = time.monotonic()
        while not self._over.wait(every_s):
            now = time.monotonic()
            # A process that was stopped and goes on has not been quiet all the while.
            self._quiet_s += min(now - last, 2 * every_s)
            last = now
            # If this thread can't run either, because something holds Python's lock, this ends the process, and its
            # standard error has the stack.
            faulthandler.dump_traceback_later(LONG * self._limit_s, exit=True, file=_STANDARD_ERROR)
            frames = self._frames()
            if self._quiet_s > self._limit_s * self._patience(frames):
                self._tell(self._words(frames))
                os._exit(1)

    def _frames(self) -> list[traceback.FrameSummary]:
        """Of the watched thread, the innermost last."""
        frame = sys._current_frames().get(self._thread)
        return list(traceback.extract_stack(frame)) if frame else []

    def _patience(self, frames: list[traceback.FrameSummary]) -> float:
        if not self._passes or any(part in frame.filename for frame in frames for part in _SLOW_BY_NATURE):
            return LONG
        innermost = frames[-1].filename if frames else ""
        return _WAITING if any(part in innermost for part in _EXCHANGES) else 1.0

    def _words(self, frames: list[traceback.FrameSummary]) -> str:
        passes = f"pass {self._passes:,}" if self._passes else "the way to the first pass"
        stack = " < ".join(
            f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in reversed(frames[-_SHOWN_FRAMES:])
        )
        return f"hangs: {passes} is not over after {self._quiet_s:.0f} s, at {stack}"
