"""From prepared rows to the tensors of a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from raylway.features.learnt import Target
from raylway.features.prepared import Rows
from raylway.train.feed.balanced import Balanced
from raylway.train.feed.order import Order, Window, num_microbatches, share

_AHEAD = 2
"""Steps that are read before they are needed: one, and another in case one takes long."""


@dataclass(frozen=True)
class Microbatch:
    """Rows of one forward and backward pass; never empty."""

    numeric: torch.Tensor
    """float32 [n, D]"""
    categorical: torch.Tensor
    """int64 [n, C]"""
    target: torch.Tensor
    """int64 [n] class codes, or float64 [n] standardised values"""
    weight: torch.Tensor
    """float64 [n]: 1 or that of the row's class; 0 for a row that only fills up the shape, or stands in where a
    rank has none"""
    stands_in: bool = False
    """It holds no other rows, so that every rank makes the same passes."""


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step."""

    num_rows: int
    """Rows of the step over all ranks."""
    microbatches: list[Microbatch]
    """As many on every rank."""
    digest: int
    """Of which rows this rank has read, each for which place in the step's batch; below 2^32 times their number. Added
    up over the ranks it tells one global batch from another, whatever the number of workers."""


@dataclass(frozen=True)
class Share:
    """Which part of each step this process reads."""

    rank: int
    workers: int
    global_batch: int
    microbatch: int
    padded: int = 1
    """Microbatches are filled up to so many rows."""

    def filled(self, num_rows: int) -> Share:
        """The same with microbatches of one shape: of the largest one in an epoch of `num_rows` rows."""
        steps = {min(self.global_batch, num_rows), num_rows % self.global_batch or self.global_batch}
        return dataclasses.replace(self, padded=max(map(self._largest, steps)))

    def _largest(self, rows: int) -> int:
        """Rows of the largest microbatch of any rank in a step of `rows` rows."""
        return math.ceil(math.ceil(rows / self.workers) / num_microbatches(rows, self.workers, self.microbatch))


class Feed:
    """The rows of this rank, step by step; the next steps are read while this one computes.

    Data that is read shard by shard has a second thread, which goes one window ahead in each lane of this rank: it
    opens the shards there and reads them once to compare their checksums.

    Args:
        rows: The split; shards are verified when first read.
        order: Of the same split.
        share: This rank's.
        target: For standardising a regression target.
        device: Where tensors go.
        weights: float64 [classes], what a row of each class weighs; None: 1.
    """

    def __init__(
        self,
        rows: Rows,
        order: Order | Balanced,
        share: Share,
        target: Target,
        device: torch.device,
        weights: np.ndarray | None = None,
    ) -> None:
        self._rows, self._order, self._share, self._target, self._device = rows, order, share, target, device
        self._weights = weights
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._ahead: dict[int, Future[Batch]] = {}
        self._scout = ThreadPoolExecutor(1, thread_name_prefix="scout")
        self._scouted: dict[int, Window] = {}

    @property
    def most_rows(self) -> int:
        """In one microbatch."""
        return self._share.microbatch

    def step(self, step: int) -> Batch:
        """This rank's microbatches of a global step, and a start on the steps after it."""
        for number in range(step, step + 1 + _AHEAD):
            if number not in self._ahead:
                self._ahead[number] = self._reader.submit(self._read, number)
        return self._ahead.pop(step).result()

    def filling(self) -> Microbatch:
        """One that counts nothing."""
        return self._tensors(np.zeros(0, np.int64))[0]

    def sample(self, count: int) -> Microbatch:
        """So many rows of the split, the first ones; over again where there are fewer."""
        return self._tensors(np.arange(count) % self._order.num_rows)[0]

    def epoch(self) -> Iterator[Microbatch]:
        """This rank's share of all rows once, for evaluation, in as many microbatches as on every other rank."""
        mine, num_rows = self._share, self._order.num_rows
        first, last = share(num_rows, mine.rank, mine.workers)
        for index in range(num_microbatches(num_rows, mine.workers, mine.microbatch)):
            start = first + index * mine.microbatch
            yield self._tensors(np.arange(start, min(start + mine.microbatch, last)))[0]

    def _read(self, step: int) -> Batch:
        mine = self._share
        num_rows = self._order.step_rows(step, mine.global_batch)
        positions = self._order.positions(step, mine.global_batch, mine.rank, mine.workers)
        self._go_ahead(step)
        count = num_microbatches(num_rows, mine.workers, mine.microbatch)
        bounds = [share(len(positions), part, count) for part in range(count)]
        parts = [self._tensors(positions[start:stop]) for start, stop in bounds]
        ids = np.concatenate([row_ids for _, row_ids in parts])
        return Batch(num_rows, [part for part, _ in parts], _digest(ids, share(num_rows, mine.rank, mine.workers)[0]))

    def _go_ahead(self, step: int) -> None:
        mine, order = self._share, self._order
        if isinstance(order, Balanced):
            return
        for window in order.windows(step, mine.global_batch, mine.rank, mine.workers):
            if self._scouted.get(window.lane) != window:
                self._scouted[window.lane] = window
                # A shard that is damaged is told by the step that needs it.
                self._scout.submit(self._rows.open, order.spans(order.after(window)))

    def _tensors(self, positions: np.ndarray) -> tuple[Microbatch, np.ndarray]:
        """The rows at some positions, and their ids (none of a row that stands in)."""
        count = len(positions)
        if count < self._share.padded:
            # Also where a rank has no row: it must run the same passes, or its peers wait for it. Any row does: its
            # loss counts 0 times. One that is there is as finite as the others.
            more = np.full(self._share.padded - count, positions[0] if count else 0)
            positions = np.concatenate([positions, more])
        numeric, categorical, target, row_ids = self._rows.take(positions)
        weight = np.ones(len(positions)) if self._weights is None else self._weights[target]
        weight[count:] = 0
        if self._target.task == "regression":
            target = (target - self._target.mean) / self._target.spread
        microbatch = Microbatch(
            torch.from_numpy(numeric).to(self._device),
            torch.from_numpy(categorical).to(self._device, torch.int64),
            torch.from_numpy(target).to(
                self._device, torch.float64 if self._target.task == "regression" else torch.int64
            ),
            torch.from_numpy(weight).to(self._device),
            not count,
        )
        return microbatch, row_ids[:count]


def _digest(row_ids: np.ndarray, first: int) -> int:
    """The sum of a 32-bit hash of each row id with its place, from `first` on (the finaliser of splitmix64)."""
    words = row_ids + np.arange(first, first + len(row_ids), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    return int((words >> np.uint64(32)).sum())
