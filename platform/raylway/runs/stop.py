"""The word to stop, from the command to training: a file in the run's folder or bucket."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from raylway import storage
from raylway.errors import RunFailed, UserError
from raylway.storage import Place

_ASK_EVERY_S = 2.0


class StopWord:
    """Given by the command, heard by rank 0 of training.

    Args:
        folder: The run's.
    """

    name = "stop"
    """Of the file."""

    def __init__(self, folder: Place) -> None:
        self._place = folder / self.name
        self._heard = threading.Event()
        self._listener: threading.Thread | None = None

    def give(self) -> None:
        """Tell training to write a checkpoint after the step at hand and end."""
        storage.write_bytes(self._place, b"")

    def take_back(self) -> None:
        """Before a start and after the end."""
        self._place.unlink(missing_ok=True)

    def is_there(self) -> bool:
        """Asked once, of a bucket too."""
        return self._place.exists()

    def is_given(self) -> bool:
        """Asked at each step; of a bucket another thread asks now and then."""
        if isinstance(self._place, Path):
            return self._place.exists()
        if self._listener is None:
            self._listener = threading.Thread(target=self._listen, name="stop", daemon=True)
            self._listener.start()
        return self._heard.is_set()

    def _listen(self) -> None:
        while True:
            try:
                if self._place.exists():
                    self._heard.set()
                    return
            except (RunFailed, UserError):  # whoever writes there says it
                pass
            time.sleep(_ASK_EVERY_S)
