"""How many rows of each stratum go to test and validation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raylway.errors import UserError
from raylway.features.prepared import SPLITS

OUT, TRAIN, VALIDATION, TEST = 0, 1, 2, 3
"""Sides of a row: left out, or the position in `features.prepared.SPLITS` + 1."""
assert SPLITS == ("train", "validation", "test")


@dataclass(frozen=True)
class Shares:
    """What the job asks for; the rest is for training."""

    validation: float
    test: float

    @property
    def held_out(self) -> int:
        """How many sides besides training."""
        return (self.validation > 0) + (self.test > 0)


def counts(sizes: np.ndarray, shares: Shares) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each stratum for test and validation: the totals are the shares of all rows, rounded.

    Each stratum gets its part by largest remainders. Where there are rows enough each has at least one on every side,
    and one always stays for training.
    """
    total = int(sizes.sum())
    if not total:
        return np.zeros_like(sizes), np.zeros_like(sizes)
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


def too_few(units: int, what: str, sides: int, where: str) -> UserError:
    """There are fewer units than sides.

    Args:
        units: How many there are.
        what: What they are: rows, groups, instants.
        sides: How many sides have a share.
        where: In the job file.
    """
    return UserError(
        f"too few {what} to divide into training, validation and test rows",
        where=where,
        expected=f"at least {sides} different {what}, as many as there are sides with a share",
        found=f"{units} different {what}",
        fix=f"give more {what}, or set validation or test to 0%",
    )
