"""The numbers behind the report's charts: pure functions of arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MOST_POINTS = 2_000
"""Of one line; more can't be told apart on a page and make the file large."""


class Reliability(NamedTuple):
    """Answers grouped by the probability that they claim."""

    claimed: np.ndarray
    """float [B]: mean claimed probability of each group that has rows."""
    observed: np.ndarray
    """float [B]: how often the claim came true."""
    rows: np.ndarray
    """int [B]"""

    @property
    def error(self) -> float:
        """Expected calibration error: the mean gap between claimed and observed, weighted by rows (Guo et al. 2017)."""
        return float(np.average(np.abs(self.claimed - self.observed), weights=self.rows))


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: each the mean of equally many neighbours (the last of what is left)."""
    size = -(-len(x) // most)
    if size <= 1:
        return x, y
    starts = np.arange(0, len(x), size)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def smoothed(values: np.ndarray, share: float = 0.04) -> np.ndarray:
    """The centred moving mean over `share` of the points; at the ends over those that are there."""
    reach = int(len(values) * share / 2)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    index = np.arange(len(values))
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def roc(is_class: np.ndarray, score: np.ndarray, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rate at every threshold, thinned to about `most` points; both classes must occur.

    Equal scores are one step, so a tie is a slope and the area is that of the metric.
    """
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(is_class[order], dtype=np.float64)
    last_of_ties = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    true = np.concatenate([[0.0], hits[last_of_ties] / hits[-1]])
    false = np.concatenate([[0.0], (last_of_ties + 1 - hits[last_of_ties]) / (len(order) - hits[-1])])
    if len(true) <= most:
        return false, true
    # Evenly along the curve, not along the thresholds: a steep rise keeps its points.
    length = false + true
    keep = np.unique(np.searchsorted(length, np.linspace(0, 2, most)).clip(0, len(true) - 1))
    return false[keep], true[keep]


def reliability(claimed: np.ndarray, came_true: np.ndarray, bins: int = 10) -> Reliability:
    """Claims in equally wide groups of [0, 1].

    Args:
        claimed: float [N] probabilities.
        came_true: bool [N].
    """
    group = np.minimum((claimed * bins).astype(int), bins - 1)
    rows = np.bincount(group, minlength=bins)
    present = rows > 0
    sums = np.bincount(group, weights=claimed, minlength=bins)
    hits = np.bincount(group, weights=came_true, minlength=bins)
    return Reliability(sums[present] / rows[present], hits[present] / rows[present], rows[present])


def spread(rows: int, most: int) -> slice:
    """Every k-th of `rows` rows, so that at most `most` are drawn."""
    return slice(0, rows, max(1, -(-rows // most)))
