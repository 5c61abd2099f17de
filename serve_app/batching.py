"""Rows of many requests in one pass through the model.

While one batch is computed in a thread, requests gather; the next batch takes what has gathered, so an idle server adds
no wait and a busy one fills its batches. A request that is larger than a batch is cut into pieces, and the rest of it
queues again behind the others: small requests never wait for the whole of a large one.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from raylway.bundle.rows import Rows, joined

MAX_WAITING_BATCHES = 512
"""A queue longer than this takes no further request. One of many rows is taken whole while the queue is shorter."""


_NOTHING = Rows(np.zeros((0, 0)), [])


class Overloaded(Exception):
    """The queue is full."""


@dataclass(eq=False)
class _Request:
    rows: Rows
    future: asyncio.Future[np.ndarray]
    taken: int = 0
    """Rows that are in a batch or have been."""
    outputs: list[np.ndarray] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.rows) - self.taken


@dataclass(frozen=True)
class _Piece:
    request: _Request
    rows: Rows


class Batcher:
    """Lives in one event loop.

    Args:
        answer: From n rows to an array of n outputs; runs in a thread, one call at a time.
        max_batch: Most rows in one call.
    """

    def __init__(self, answer: Callable[[Rows], np.ndarray], max_batch: int) -> None:
        self._answer, self._max_batch = answer, max_batch
        self._queue: deque[_Request] = deque()
        self._waiting_rows = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._work: asyncio.Task[None] | None = None
        self._began: float | None = None
        """When the batch that is computed now went to the thread."""

    @property
    def full(self) -> bool:
        """Whether a request would be refused now."""
        return self._waiting_rows >= self._max_batch * MAX_WAITING_BATCHES

    @property
    def busy_s(self) -> float:
        """How long the thread has been at the batch that it computes now; 0 if it is idle."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    def waiting(self) -> int:
        """Rows that no batch has taken yet."""
        return self._waiting_rows

    async def submit(self, rows: Rows) -> np.ndarray:
        """The outputs for the rows of one request, in their order. Cancelled, it frees its place in the queue.

        Raises:
            Overloaded: See there.
            Exception: Whatever `answer` raised for these rows, and for these alone.
        """
        if self.full:
            raise Overloaded(f"{self._waiting_rows:,} rows are waiting already")
        request = _Request(rows, asyncio.get_running_loop().create_future())
        self._queue.append(request)
        self._waiting_rows += len(rows)
        if self._work is None:
            self._work = asyncio.create_task(self._drain())
        try:
            return await request.future
        finally:
            self._waiting_rows -= request.left  # of one that was cancelled or failed
            # its place stays in the queue for as long as a batch is computed; what it asked must not
            request.rows, request.taken = _NOTHING, 0

    async def _drain(self) -> None:
        """Compute batches until nothing waits; the next request starts it anew."""
        loop = asyncio.get_running_loop()
        try:
            while pieces := self._next_batch():
                self._began = time.monotonic()
                for piece, result in await loop.run_in_executor(self._thread, self._compute, pieces):
                    _deliver(piece.request, result)
        finally:
            self._work = self._began = None

    def _next_batch(self) -> list[_Piece]:
        pieces: list[_Piece] = []
        room = self._max_batch
        for _ in range(len(self._queue)):
            request = self._queue.popleft()
            if request.future.done():  # cancelled, or an earlier piece failed
                continue
            count = min(room, request.left)
            pieces.append(_Piece(request, request.rows.part(request.taken, request.taken + count)))
            request.taken += count
            self._waiting_rows -= count
            room -= count
            if request.left:
                self._queue.append(request)
            if not room:
                break
        return pieces

    def _compute(self, pieces: list[_Piece]) -> list[tuple[_Piece, np.ndarray | Exception]]:
        """In the thread: all pieces at once; should that fail, each by itself, so that it fails alone."""
        try:
            outputs = self._answer(joined([piece.rows for piece in pieces]))
        except Exception as error:  # noqa: BLE001 - a model of the user's own may raise anything; its client hears of it
            if len(pieces) == 1:
                return [(pieces[0], error)]
            return [result for piece in pieces for result in self._compute([piece])]
        ends = np.cumsum([len(piece.rows) for piece in pieces])[:-1]
        return list(zip(pieces, np.split(outputs, ends), strict=True))


def _deliver(request: _Request, result: np.ndarray | Exception) -> None:
    if request.future.done():
        return
    if isinstance(result, Exception):
        request.future.set_exception(result)
        return
    request.outputs.append(result)
    if not request.left:
        request.future.set_result(np.concatenate(request.outputs))
