"""Count, mean, spread, range and most frequent of numbers, from parts that merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import msgspec
import numpy as np


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of one numeric column; missing cells are not counted."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    minimum: float = np.inf
    maximum: float = -np.inf

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Of N float64 values; NaN is missing."""
        present = values[~np.isnan(values)]
        if not len(present):
            return cls()
        with np.errstate(over="ignore", invalid="ignore"):  # whoever asks for the mean or spread sees what is left
            mean = float(present.mean())
            squares = float(np.square(present - mean).sum())
        return cls(len(present), mean, squares, float(present.min()), float(present.max()))

    def merged(self, other: Moments) -> Moments:
        """Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance". Its last bits depend on the order
        of merging, so callers merge in the order of the rows."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * other.count / count,
            self.squares + other.squares + delta * delta * self.count * other.count / count,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )

    @property
    def spread(self) -> float:
        """Population standard deviation; exactly 0 for a constant column, whatever rounding left in the sum."""
        if not self.count or self.minimum == self.maximum:
            return 0.0
        return float(np.sqrt(self.squares / self.count))


class Frequent(msgspec.Struct, frozen=True):
    """How often each different number stands in some rows, or the most frequent ones and a bound for the others."""

    values: bytes
    """float64, ascending."""
    counts: bytes
    """int64."""
    bound: int
    """No number that is not listed stands more often; 0: all are listed."""

    MOST: ClassVar[int] = 1 << 16

    @classmethod
    def of(cls, present: np.ndarray) -> Frequent:
        """Of N float64 values, none NaN."""
        values, counts = np.unique(present + 0.0, return_counts=True)
        bound = 0
        if len(values) > cls.MOST:
            order = np.argsort(-counts, kind="stable")
            bound = int(counts[order[cls.MOST]])
            kept = np.sort(order[: cls.MOST])
            values, counts = values[kept], counts[kept]
        return cls(values.tobytes(), counts.astype(np.int64).tobytes(), bound)


def most_frequent(parts: list[Frequent]) -> float | None:
    """The number that stands most often in all parts, the smallest of equals; NaN if there is none.

    None where the parts do not tell: so many different numbers stand about equally often that none is typical.
    """
    listed = [np.frombuffer(part.values, np.float64) for part in parts]
    values, index = np.unique(np.concatenate(listed), return_inverse=True)
    if not len(values):
        return float("nan")
    known, uncovered = np.zeros(len(values), np.int64), np.full(len(values), sum(part.bound for part in parts))
    np.add.at(known, index, np.concatenate([np.frombuffer(part.counts, np.int64) for part in parts]))
    bounds = [np.full(len(some), part.bound) for part, some in zip(parts, listed, strict=True)]
    np.subtract.at(uncovered, index, np.concatenate(bounds))
    best = int(np.argmax(known))  # the first, so the smallest of equals
    rivals = np.delete(known + uncovered, best)
    certain = not any(part.bound for part in parts) or (
        sum(part.bound for part in parts) < known[best] and bool((rivals < known[best]).all())
    )
    return float(values[best]) if certain else None
