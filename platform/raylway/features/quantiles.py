"""Exact quantiles of more numbers than fit in memory, by radix selection: no sketch, no sample.

A double becomes a 64-bit key in the same order. The first round counts the keys by their upper 16 bits; each later one
counts, only below the prefixes in which a wanted rank lies, by the next 8 bits. Parts are counts, so they merge exactly
and in any order. As soon as few keys are left below those prefixes, they are sent themselves and the rest is sorting.
A bucket whose keys are all equal is never opened again, so whole numbers and heavy ties end early.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np

FIRST_SHIFT = 48
_DIGITS = 8
_SIGN = np.uint64(1 << 63)


class Histogram(msgspec.Struct, frozen=True):
    """Keys counted by bucket; the arrays are parallel, and the buckets ascend."""

    buckets: bytes
    """uint64: the upper bits of the keys in it."""
    counts: bytes
    """int64."""
    lowest: bytes
    highest: bytes
    """uint64: whole keys."""

    def __len__(self) -> int:
        return len(self.counts) // 8


class Wanted(msgspec.Struct, frozen=True):
    """What the next round is asked for one column: keys below `prefixes`, counted or as they are."""

    shift: int
    """The prefixes are keys without so many of their lower bits."""
    prefixes: bytes
    """uint64, ascending."""
    starts: bytes
    """int64: how many keys of the whole column lie before each prefix."""
    values: bool
    """Whether the keys themselves are to be sent."""


class Found(msgspec.Struct, frozen=True):
    """Values of some ranks of one column, and what is still unknown."""

    ranks: bytes
    """int64, ascending: all that are looked for."""
    values: bytes
    """float64; NaN where not yet known."""

    @property
    def open(self) -> np.ndarray:
        return _int64(self.ranks)[np.isnan(_float64(self.values))]

    def at(self, shares: np.ndarray, count: int) -> np.ndarray:
        """The quantiles at `shares` in [0, 1] of `count` numbers, interpolated linearly as `numpy.quantile` does."""
        place = _places(shares, count)
        below = np.floor(place).astype(np.int64)
        known, ranks = _float64(self.values), _int64(self.ranks)
        low = known[np.searchsorted(ranks, below)]
        high = known[np.searchsorted(ranks, np.minimum(below + 1, count - 1))]
        weight = place - below
        with np.errstate(over="ignore", invalid="ignore"):
            apart = high - low
            whole = np.where(weight < 0.5, low + apart * weight, high - apart * (1 - weight))
        # the difference of two large numbers of unlike sign may be beyond the doubles, their mean is not
        return np.where(np.isfinite(apart), whole, low * (1 - weight) + high * weight)


def ranks(shares: np.ndarray, count: int) -> np.ndarray:
    """Which order statistics, from 0, the quantiles at `shares` of `count` numbers are made of; int64, ascending."""
    below = np.floor(_places(shares, count)).astype(np.int64)
    return np.unique(np.concatenate([below, np.minimum(below + 1, count - 1)]))


def _places(shares: np.ndarray, count: int) -> np.ndarray:
    """Where the quantiles lie among the sorted numbers, from 0. One that is whole but for rounding is whole: between
    equal numbers and others a last bit would tell equal quantiles apart."""
    place = shares * (count - 1)
    nearest = np.rint(place)
    return np.where(np.abs(place - nearest) <= 4 * np.finfo(float).eps * nearest, nearest, place)


def keys(values: np.ndarray) -> np.ndarray:
    """float64 [N], none NaN, as uint64 [N] in the same order; both zeros are one."""
    bits = (values + 0.0).view(np.uint64)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def numbers(found: np.ndarray) -> np.ndarray:
    """The inverse of `keys`."""
    return np.where(found & _SIGN, found ^ _SIGN, ~found).view(np.float64)


def first(values: np.ndarray) -> Histogram:
    """The first round's counts of N numbers, none NaN."""
    found = keys(values)
    return _counted(found, (found >> np.uint64(FIRST_SHIFT)).astype(np.int64), 1 << 16, np.arange(1 << 16))


def below(values: np.ndarray, wanted: Wanted) -> Histogram | bytes:
    """A later round's counts of N numbers, none NaN; or their keys below the prefixes (uint64, any order)."""
    prefixes = _uint64(wanted.prefixes)
    found = keys(values)
    index = np.searchsorted(prefixes, found >> np.uint64(wanted.shift))
    index[index == len(prefixes)] = 0
    inside = prefixes[index] == found >> np.uint64(wanted.shift)
    found, index = found[inside], index[inside]
    if wanted.values:
        return found.tobytes()
    digits = 1 << _DIGITS
    next_digit = (found >> np.uint64(wanted.shift - _DIGITS)) & np.uint64(digits - 1)
    names = (np.repeat(prefixes, digits) << np.uint64(_DIGITS)) | np.tile(
        np.arange(digits, dtype=np.uint64), len(prefixes)
    )
    return _counted(found, index * digits + next_digit.astype(np.int64), len(names), names)


def merged(parts: Iterable[Histogram]) -> Histogram:
    """The counts of all parts."""
    some = list(parts)
    buckets = np.concatenate([_uint64(part.buckets) for part in some])
    names, index = np.unique(buckets, return_inverse=True)
    counts = np.zeros(len(names), np.int64)
    lowest, highest = np.full(len(names), ~np.uint64(0)), np.zeros(len(names), np.uint64)
    np.add.at(counts, index, np.concatenate([_int64(part.counts) for part in some]))
    np.minimum.at(lowest, index, np.concatenate([_uint64(part.lowest) for part in some]))
    np.maximum.at(highest, index, np.concatenate([_uint64(part.highest) for part in some]))
    return Histogram(names.tobytes(), counts.tobytes(), lowest.tobytes(), highest.tobytes())


def looking_for(wanted_ranks: np.ndarray) -> Found:
    """Nothing known yet of these ranks (int64, ascending)."""
    return Found(wanted_ranks.tobytes(), np.full(len(wanted_ranks), np.nan).tobytes())


def advance(found: Found, counted: Histogram, asked: Wanted | None, most_values: int) -> tuple[Found, Wanted | None]:
    """What the counts of all parts say, and what to ask next; None when every rank is known.

    Args:
        found: What was known.
        counted: The merged answer to `asked`.
        asked: None for the first round.
        most_values: So many keys may be sent as they are.
    """
    buckets, counts = _uint64(counted.buckets), _int64(counted.counts)
    starts = np.cumsum(counts) - counts
    shift = FIRST_SHIFT
    if asked is not None:
        shift = asked.shift - _DIGITS
        parent = np.searchsorted(_uint64(asked.prefixes), buckets >> np.uint64(_DIGITS))
        opens = np.searchsorted(parent, np.arange(len(asked.prefixes) // 8))  # the first bucket of each prefix
        starts += (_int64(asked.starts) - starts[opens])[parent]
    lowest, highest = _uint64(counted.lowest), _uint64(counted.highest)
    ranks_left = found.open
    place = np.searchsorted(starts, ranks_left, side="right") - 1
    at_start = (ranks_left == starts[place]) | (lowest[place] == highest[place])
    at_end = ranks_left == starts[place] + counts[place] - 1
    values = np.where(at_start, numbers(lowest)[place], np.where(at_end, numbers(highest)[place], np.nan))
    found = _with(found, values)
    unknown = np.unique(place[~(at_start | at_end)])
    if not len(unknown):
        return found, None
    few = int(counts[unknown].sum()) <= most_values
    return found, Wanted(shift, buckets[unknown].tobytes(), starts[unknown].tobytes(), few)


def finish(found: Found, parts: Iterable[bytes], asked: Wanted) -> Found:
    """Every rank, from the keys that all parts sent."""
    sent = np.sort(np.concatenate([_uint64(part) for part in parts]))
    prefixes = _uint64(asked.prefixes)
    left = found.open
    place = np.searchsorted(_int64(asked.starts), left, side="right") - 1
    begins = np.searchsorted(sent >> np.uint64(asked.shift), prefixes)
    return _with(found, numbers(sent)[begins[place] + left - _int64(asked.starts)[place]])


def _with(found: Found, values: np.ndarray) -> Found:
    known = _float64(found.values).copy()
    known[np.isnan(known)] = values
    return Found(found.ranks, known.tobytes())


def _counted(found: np.ndarray, bucket: np.ndarray, size: int, names: np.ndarray) -> Histogram:
    counts = np.bincount(bucket, minlength=size)
    lowest, highest = np.full(size, ~np.uint64(0)), np.zeros(size, np.uint64)
    np.minimum.at(lowest, bucket, found)
    np.maximum.at(highest, bucket, found)
    some = np.flatnonzero(counts)
    return Histogram(
        names[some].astype(np.uint64).tobytes(),
        counts[some].astype(np.int64).tobytes(),
        lowest[some].tobytes(),
        highest[some].tobytes(),
    )


def _uint64(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint64)


def _int64(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.int64)


def _float64(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.float64)
