"""Exact duplicates by row hash, and the division into training, validation and test rows.

Both look at hashes only, so the outcome depends on what the rows hold and not on their order, files or machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raylway.data.rowhash import mix
from raylway.features.prepared import SPLITS

OUT, TRAIN, VALIDATION, TEST = 0, 1, 2, 3
"""Sides of a row: left out, or the position in `features.prepared.SPLITS` + 1."""
assert SPLITS == ("train", "validation", "test")


def first_of_equal(hashes: np.ndarray) -> np.ndarray:
    """Which of N rows are the first with their hash.

    Args:
        hashes: uint64 [N, 2], in the order of the row ids.

    Returns:
        bool [N].
    """
    keep = np.ones(len(hashes), bool)
    order = np.argsort(hashes[:, 0], kind="stable")
    first = hashes[order, 0]
    same = first[1:] == first[:-1]
    if not same.any():
        return keep
    # few rows share 64 bits: only they are compared in full
    involved = order[np.append(same, False) | np.append(False, same)]
    involved = involved[np.lexsort((involved, hashes[involved, 1], hashes[involved, 0]))]
    equal = (hashes[involved[1:]] == hashes[involved[:-1]]).all(axis=1)
    keep[involved[1:][equal]] = False
    return keep


@dataclass(frozen=True)
class Shares:
    """What the job asks for; the rest is for training."""

    validation: float
    test: float

    @property
    def held_out(self) -> int:
        """How many sides besides training."""
        return (self.validation > 0) + (self.test > 0)


def divide(hashes: np.ndarray, strata: np.ndarray, shares: Shares, seed: int) -> np.ndarray:
    """The side of each of N rows.

    Rows are ordered by a seeded scramble of their hash; of each stratum the first go to the test side, the next to
    validation. Equal rows are neighbours in that order and stay together: where they are, counts are approximate.

    Args:
        hashes: uint64 [N, 2].
        strata: int32 [N], from 0 on, every stratum with at least one row.
        shares: Of the whole.
        seed: Of the job.

    Returns:
        int8 [N] of TRAIN, VALIDATION, TEST.
    """
    sides = np.full(len(hashes), TRAIN, np.int8)
    key = mix(hashes[:, 0] ^ mix(np.array([seed], np.uint64)))
    order = np.lexsort((hashes[:, 1], key, strata))
    sizes = np.bincount(strata)
    test, validation = counts(sizes, shares)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for stratum in range(len(sizes)):
        rows = order[starts[stratum] : starts[stratum + 1]]
        first = _between(hashes, rows, int(test[stratum]))
        second = _between(hashes, rows, max(first, int(test[stratum] + validation[stratum])))
        sides[rows[:first]] = TEST
        sides[rows[first:second]] = VALIDATION
    return sides


def counts(sizes: np.ndarray, shares: Shares) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each stratum for test and validation: the totals are the shares of all rows, rounded.

    Each stratum gets its part by largest remainders. Where there are rows enough each has at least one on every side,
    and one always stays for training.
    """
    total = int(sizes.sum())
    test = _allot(_rounded(shares.test, total), sizes, sizes - 1)
    validation = _allot(_rounded(shares.validation, total), sizes, sizes - 1 - test)
    return test, validation


def _rounded(share: float, total: int) -> int:
    """At least one row where there is a share at all."""
    return max(1, int(np.floor(share * total + 0.5))) if share > 0 else 0


def _allot(wanted: int, sizes: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Divide `wanted` in proportion to `sizes`, at most `room` each, at least one each if `wanted` is enough."""
    room = np.maximum(room, 0)
    quota = wanted * sizes / sizes.sum()
    least = np.minimum(room, 1) if wanted >= len(sizes) else np.zeros_like(sizes)
    alloted = np.clip(np.floor(quota).astype(np.int64), least, room)
    wanted = min(wanted, int(room.sum()))
    while (short := wanted - int(alloted.sum())) != 0:
        sign = 1 if short > 0 else -1
        can = alloted < room if sign > 0 else alloted > least
        # largest remainders first; the larger stratum, then the earlier one, breaks a tie
        order = np.lexsort((np.arange(len(sizes)), -sizes, -sign * (quota - alloted)))
        chosen = order[can[order]][: abs(short)]
        alloted[chosen] += sign
    return alloted


def _between(hashes: np.ndarray, rows: np.ndarray, cut: int) -> int:
    """The cut nearest to `cut` that parts no equal rows."""
    low = high = cut
    while 0 < low < len(rows) and (hashes[rows[low - 1]] == hashes[rows[low]]).all():
        low -= 1
    while 0 < high < len(rows) and (hashes[rows[high - 1]] == hashes[rows[high]]).all():
        high += 1
    return low if cut - low <= high - cut else high
