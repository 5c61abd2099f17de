"""Which rows a step sees, as a pure function of seed and step: no state, no repeated row, no dropped row, no hang.

Nothing here depends on the number of workers, on storage or on the machine, so a run goes on after any step with any
number of workers and sees the same global batches.

    once a run:   tape = shards in a shuffled order, cut into `lanes` segments of N // lanes + (l < N % lanes) rows;
                  a segment is a list of pieces (first row, count), each within one shard
    epoch e:      lane l = its pieces permuted, then rows permuted inside consecutive windows
    interleave:   row k of the epoch is row k // lanes of lane k % lanes
    step t:       rows t * B to min((t + 1) * B, N), listed lane by lane; only the last step is short
    rank r of W:  entries n * r // W to n * (r + 1) // W of that list
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np


class Purpose(IntEnum):
    """What random numbers are drawn for; streams of different purposes never meet."""

    TAPE = 0
    PIECES = 1
    ROWS = 2
    MODEL = 3
    """Dropout and the like: see `random_seed`."""
    CLASS = 4
    MIX = 5
    """Of classes drawn equally often: see `balanced`."""


def _philox(seed: int, purpose: Purpose, *place: int) -> np.random.Philox:
    """A counter-based generator (Salmon et al. 2011) keyed by seed and purpose; the place is the high part of its
    counter, so that streams of different places never overlap."""
    first, second, third = (*place, 0, 0, 0)[:3]
    return np.random.Philox(key=[seed, int(purpose)], counter=[0, first, second, third])


def random_seed(seed: int, step: int, rank: int) -> int:
    """The seed of torch's own random numbers (63 bits) for one step of one rank."""
    return int(_philox(seed, Purpose.MODEL, step, rank).random_raw()) >> 1


def shuffled(seed: int, count: int, purpose: Purpose, *place: int) -> np.ndarray:
    """A permutation of `count` (int64): the raw draws are sorted, because NumPy promises their stream for all its
    versions (NEP 19) but not that of `Generator.permutation`."""
    return np.argsort(_philox(seed, purpose, *place).random_raw(count), kind="stable")


def num_microbatches(rows: int, workers: int, microbatch: int) -> int:
    """Forward and backward passes of a step of `rows` rows; the same on all ranks."""
    return max(1, math.ceil(math.ceil(rows / workers) / microbatch))


def share(rows: int, part: int, parts: int) -> tuple[int, int]:
    """Start and stop of one of `parts` parts of `rows` entries; sizes differ by at most one."""
    return rows * part // parts, rows * (part + 1) // parts


class Window(NamedTuple):
    """Rows of a lane that are shuffled together."""

    epoch: int
    lane: int
    number: int


class Order:
    """The order of one split.

    Holds at most one window of row positions for each lane that this process touches.

    Args:
        shard_rows: Rows of each shard, in the order of the manifest.
        seed: The job's; None leaves rows in their order, for evaluation.
        lanes: 1 for small data, whose window is all rows; else each lane is shuffled in windows of 2 median shards.
    """

    def __init__(self, shard_rows: Sequence[int], seed: int | None, lanes: int = 1) -> None:
        self.num_rows = sum(shard_rows)
        self._seed, self._lanes = seed, lanes
        self._window = max(1, self.num_rows if lanes == 1 else 2 * int(np.median(shard_rows)))
        self._segments = self._cut(shard_rows)
        self._held: dict[int, tuple[Window, np.ndarray]] = {}

    def positions(self, step: int, batch: int, rank: int = 0, workers: int = 1) -> np.ndarray:
        """Positions (int64, over the shards laid end to end) of the rows of one rank in one step.

        Args:
            step: The global step, from 0; it runs on over the epochs.
            batch: Rows of a full step, over all ranks.
            rank: Which share.
            workers: How many shares.
        """
        parts = [
            self._window_rows(window)[start:stop] for window, start, stop in self._touched(step, batch, rank, workers)
        ]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def windows(self, step: int, batch: int, rank: int = 0, workers: int = 1) -> list[Window]:
        """Where the rows of one rank in one step come from."""
        return [window for window, _, _ in self._touched(step, batch, rank, workers)]

    def after(self, window: Window) -> Window:
        """The one that its lane comes to next."""
        epoch, lane, number = window
        is_last = (number + 1) * self._window >= self._lane_length(lane)
        return Window(epoch + 1, lane, 0) if is_last else Window(epoch, lane, number + 1)

    def spans(self, window: Window) -> np.ndarray:
        """The rows of a window before they are shuffled: int64 [S, 2], first position and count, each in one shard."""
        epoch, lane, number = window
        pieces = self._segments[lane][self._shuffled(len(self._segments[lane]), Purpose.PIECES, epoch, lane)]
        ends = np.cumsum(pieces[:, 1])
        low, high = number * self._window, min((number + 1) * self._window, self._lane_length(lane))
        cut = slice(np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high) + 1)
        (first, count), end = pieces[cut].T, ends[cut]
        ahead = np.maximum(low - (end - count), 0)
        return np.stack([first + ahead, count - ahead - np.maximum(end - high, 0)], axis=1)

    def step_rows(self, step: int, batch: int) -> int:
        """Rows of a step over all ranks."""
        index = step % math.ceil(self.num_rows / batch)
        return min(batch, self.num_rows - index * batch)

    def _cut(self, shard_rows: Sequence[int]) -> list[np.ndarray]:
        """For each lane its pieces, int64 [P, 2]: first row and count, each within one shard."""
        starts = np.concatenate([[0], np.cumsum(shard_rows)])
        left = [(int(starts[shard]), shard_rows[shard]) for shard in self._shuffled(len(shard_rows), Purpose.TAPE)]
        left.reverse()
        segments = []
        for lane in range(self._lanes):
            wanted = self._lane_length(lane)
            pieces = []
            while wanted:
                first, count = left.pop()
                taken = min(count, wanted)
                if taken < count:
                    left.append((first + taken, count - taken))
                if taken:
                    pieces.append((first, taken))
                wanted -= taken
            segments.append(np.array(pieces, np.int64).reshape(-1, 2))
        return segments

    def _touched(self, step: int, batch: int, rank: int, workers: int) -> Iterator[tuple[Window, int, int]]:
        """The windows that a rank's rows of a step are in, each with where in it they start and stop."""
        epoch, index = divmod(step, math.ceil(self.num_rows / batch))
        first, last = index * batch, min((index + 1) * batch, self.num_rows)
        start, stop = share(last - first, rank, workers)
        listed = 0
        for lane in range(self._lanes):
            # The step's rows of this lane are its rows `begin` to `end`, of which this rank has `low` to `high`.
            begin, end = (-((lane - bound) // self._lanes) for bound in (first, last))
            low, high = begin + max(start - listed, 0), begin + min(stop - listed, end - begin)
            listed += end - begin
            for number in range(low // self._window, (high - 1) // self._window + 1) if low < high else ():
                at = number * self._window
                yield Window(epoch, lane, number), max(low - at, 0), min(high - at, self._window)

    def _lane_length(self, lane: int) -> int:
        return self.num_rows // self._lanes + (lane < self.num_rows % self._lanes)

    def _window_rows(self, window: Window) -> np.ndarray:
        held = self._held.get(window.lane)
        if held is not None and held[0] == window:
            return held[1]
        rows = np.concatenate([np.arange(first, first + count) for first, count in self.spans(window).tolist()])
        found = rows[self._shuffled(len(rows), Purpose.ROWS, *window)]
        self._held[window.lane] = (window, found)
        return found

    def _shuffled(self, count: int, purpose: Purpose, *place: int) -> np.ndarray:
        return np.arange(count) if self._seed is None else shuffled(self._seed, count, purpose, *place)
