"""Classes of unequal size (`data.balance`): weights of their rows, or an order that draws each class equally often.

K are the classes with training rows, N the training rows, n[c] those of class c.

    weights:   a row of class c weighs N / (K * n[c]), on average 1 (scikit-learn's "balanced"). The loss of a step is
               sum(weight * loss of the row) / rows of the step: the rows are known from the order, so that any division
               of the batch gives the same gradient.
    resample:  the draws of all epochs, N in each, are dealt to the K classes in turn, so an epoch draws N // K rows of
               a class or one more. A class is an endless stream: its rows permuted by rng(class, c, cycle), cycle after
               cycle; an epoch goes on where the one before it ended. So after any epoch each row of a class was drawn
               as often as every other one, or once more. The N draws of an epoch are mixed by rng(mix, epoch).

Both are pure functions of the seed, the step and the classes of the rows in their order: no state, and the same for any
number of workers.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np

from raylway.train.feed.order import Purpose, share, shuffled


def weights(rows: list[int]) -> np.ndarray:
    """float64 [classes]: what a row of each class weighs; 0 for a class without rows.

    Args:
        rows: Training rows of each class.
    """
    counts = np.array(rows, np.float64)
    present = counts > 0
    return np.divide(counts.sum(), present.sum() * counts, out=np.zeros(len(counts)), where=present)


def draws(rows: list[int], epoch: int) -> list[int]:
    """How many rows of each class an epoch (from 0) draws.

    Args:
        rows: Training rows of each class.
        epoch: The epoch, from 0.
    """
    until = _drawn_before(rows, epoch + 1)
    return [after - before for after, before in zip(until, _drawn_before(rows, epoch), strict=True)]


class Shares(msgspec.Struct, frozen=True):
    """What balancing makes of one class; a line of the event `classes balanced`."""

    name: str
    rows: int
    """Training rows."""
    weight: float
    """Of each of its rows in the loss."""
    drawn: int
    """Rows in the first epoch; later ones have as many, or one more or less."""


def shares(balance: Literal["weights", "resample"], classes: list[str], rows: list[int]) -> list[Shares]:
    """For each class what `balance` makes of it."""
    drawn = draws(rows, 0) if balance == "resample" else rows
    weighs = weights(rows).tolist() if balance == "weights" else [1.0] * len(rows)
    return [Shares(*each) for each in zip(classes, rows, weighs, drawn, strict=True)]


def sentence(balance: Literal["weights", "resample"], found: list[Shares]) -> str:
    """Of the largest and the smallest class, for progress and report."""
    some = sorted((each for each in found if each.rows), key=lambda each: (-each.rows, each.name))
    parts = [
        f"a row of {each.name} weighs {each.weight:.3g}"
        if balance == "weights"
        else f"an epoch draws {each.drawn:,} times among the {each.rows:,} rows of {each.name}"
        for each in (some[0], some[-1])
    ]
    return f"{len(some)} classes balanced: {' and '.join(parts)}"


class Balanced:
    """The order of training rows with each class drawn equally often; used as `order.Order` is.

    Holds, for N rows, 8 N bytes of positions by class and 8 N bytes for the epoch at hand, whatever the size of the
    data; it does not read shard by shard, so data larger than memory is read here and there.

    Args:
        codes: int32 [N], the class of each row, shards laid end to end.
        num_classes: Of the target; some may have no rows.
        seed: The job's.
    """

    def __init__(self, codes: np.ndarray, num_classes: int, seed: int) -> None:
        self.num_rows = len(codes)
        self._seed = seed
        self._rows = np.bincount(codes, minlength=num_classes).tolist()
        by_class = np.argsort(codes, kind="stable")
        self._members = np.split(by_class, np.cumsum(self._rows)[:-1])
        self._held: tuple[int, np.ndarray] = (-1, by_class[:0])

    def positions(self, step: int, batch: int, rank: int = 0, workers: int = 1) -> np.ndarray:
        """Positions (int64) of the rows of one rank in one step; see `Order.positions`."""
        epoch, index = divmod(step, math.ceil(self.num_rows / batch))
        first, last = index * batch, min((index + 1) * batch, self.num_rows)
        start, stop = share(last - first, rank, workers)
        return self._epoch(epoch)[first + start : first + stop]

    def step_rows(self, step: int, batch: int) -> int:
        """Rows of a step over all ranks."""
        index = step % math.ceil(self.num_rows / batch)
        return min(batch, self.num_rows - index * batch)

    def _epoch(self, epoch: int) -> np.ndarray:
        """int64 [N]: the rows of an epoch in their order."""
        held, rows = self._held
        if held != epoch:
            begin = _drawn_before(self._rows, epoch)
            counts = draws(self._rows, epoch)
            drawn = np.concatenate(
                [self._stream(code, begin[code], begin[code] + counts[code]) for code in range(len(counts))]
            )
            rows = drawn[shuffled(self._seed, len(drawn), Purpose.MIX, epoch)]
            self._held = (epoch, rows)
        return rows

    def _stream(self, code: int, start: int, stop: int) -> np.ndarray:
        """Draws `start` to `stop` of a class, counted from the beginning of training."""
        members = self._members[code]
        if start == stop:
            return members[:0]
        size = len(members)
        first, last = start // size, (stop - 1) // size
        cycles = [members[shuffled(self._seed, size, Purpose.CLASS, code, cycle)] for cycle in range(first, last + 1)]
        return np.concatenate(cycles)[start - first * size : stop - first * size]


def _drawn_before(rows: list[int], epoch: int) -> list[int]:
    """Rows drawn of each class in all epochs before this one.

    Dealing N rows an epoch to the K classes in turn gives each epoch's classes N // K rows or one more.
    """
    present = [code for code, count in enumerate(rows) if count]
    dealt = sum(rows) * epoch
    drawn = [0] * len(rows)
    for place, code in enumerate(present):
        drawn[code] = (dealt - place + len(present) - 1) // len(present)
    return drawn
