"""A sample of recent requests in the memory of a replica, to try a new bundle on before it takes the place of this one.

It is never written down: it goes with the replica. No key is kept, and of a busy server a few requests a second, so the
sample reaches back a minute or more.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import msgspec
import numpy as np

from raylway.bundle.predictor import Predictor
from serve_app.forms import Headers

MOST_REQUESTS = 256
MOST_BYTES = 8 << 20
"""Of all bodies and answers together."""
LARGEST_BYTES = 1 << 20
"""A request that is larger with its answers is not kept."""
EVERY_S = 0.25
"""A request so soon after the last one that was kept is not, once the sample is full."""
_KEPT = (b"content-type", b"inference-header-content-length")
"""The headers that say how a body is to be read."""


class Recorded(msgspec.Struct, frozen=True):
    """One request and what was answered."""

    form: str
    """The name of its `serve_app.forms.Form`."""
    headers: dict[bytes, bytes]
    body: bytes
    answers: list[Any]
    """For each row its label, or its value."""


class Recent:
    """The sample of one replica; lives in its event loop."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._kept: deque[tuple[str, dict[bytes, bytes], bytes, np.ndarray]] = deque()
        self._bytes = 0
        self._next_at = 0.0

    def add(self, form: str, headers: Headers, body: bytes, outputs: np.ndarray) -> None:
        """A request was answered."""
        now = time.monotonic()
        size = len(body) + outputs.nbytes
        is_full = len(self._kept) >= MOST_REQUESTS or self._bytes + size > MOST_BYTES
        if size > LARGEST_BYTES or (is_full and now < self._next_at):
            return
        self._next_at = now + EVERY_S
        self._kept.append((form, {name: headers[name] for name in _KEPT if name in headers}, body, outputs))
        self._bytes += size
        while len(self._kept) > MOST_REQUESTS or self._bytes > MOST_BYTES:
            _, _, body, outputs = self._kept.popleft()
            self._bytes -= len(body) + outputs.nbytes

    def all(self) -> list[Recorded]:
        """The sample, the oldest first."""
        return [Recorded(form, headers, body, self._answers(outputs)) for form, headers, body, outputs in self._kept]

    def _answers(self, outputs: np.ndarray) -> list[Any]:
        labels = self._predictor.answers(outputs).labels
        return outputs.tolist() if labels is None else labels
