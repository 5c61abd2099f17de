"""How far new rows are from a profile of the training rows: three measures of counts, and the limits that they pass.

- PSI, the population stability index: the sum of (new - old) * ln(new / old) over the shares. Below 0.1 is read as no
  change, above 0.25 as a large one (Siddiqi 2006, "Credit Risk Scorecards"); the usual line, 0.2, is ours.
- KS, the largest distance between the two cumulated shares (numbers), at the edges of the bins.
- Chi-square: how often two samples of one population have counts so different (categories).

A limit counts only where chance alone would pass it less often than `CHANCE` over all inputs together, so that a small
file is not told to have drifted. PSI grows without bound as a sample shrinks, hence its chance is that of the counts
behind it: a test of homogeneity over cells that hold enough rows (Cochran 1954, "Some methods for strengthening the
common chi-square tests"), by Pearson's statistic or the likelihood ratio, whichever is smaller: each of them alone says
too much on one side. The chance of missing cells and unknown categories is bounded by Chernoff's inequality.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from raylway.features.profile import CategoryProfile, DateProfile, NumberProfile

_LEAST_SHARE = 1e-4
"""Stands in for a share of zero, of which there is no logarithm."""
_LEAST_EXPECTED = 5.0
"""Rows that a cell must be expected to hold to be compared by itself."""

PSI_LIMIT = 0.2
KS_LIMIT = 0.15
MISSING_LIMIT = 0.1
"""More missing cells than in training, as a share of the rows."""
UNKNOWN_LIMIT = 0.05
"""More categories that training did not see than rows of one population have, as a share of the rows."""
CHANCE = 0.001
"""Of any limit of any input."""


class Shift(msgspec.Struct, frozen=True):
    """How far one input of new rows is from training."""

    name: str
    psi: float
    ks: float | None
    """Of numbers."""
    chi2_p: float | None
    """Of categories: how often chance alone gives counts so different."""
    missing: float
    missing_before: float
    unknown: float
    reasons: list[str]
    """The limits that it passes, in words."""


def psi(before: np.ndarray, now: np.ndarray) -> float:
    """The population stability index of two lists of counts."""
    old = np.maximum(before / max(1, before.sum()), _LEAST_SHARE)
    new = np.maximum(now / max(1, now.sum()), _LEAST_SHARE)
    return float(((new - old) * np.log(new / old)).sum())


def ks(before: np.ndarray, now: np.ndarray) -> float:
    """The largest distance between two cumulated lists of counts."""
    old, new = np.cumsum(before) / max(1, before.sum()), np.cumsum(now) / max(1, now.sum())
    return float(np.abs(old - new).max())


def ks_chance(distance: float, rows: int, others: int) -> float:
    """How often two samples of one population are so far apart (Kolmogorov's limit, with Stephens' correction)."""
    size = math.sqrt(rows * others / (rows + others))
    x = (size + 0.12 + 0.11 / size) * distance
    if x < 0.2:
        return 1.0
    return min(1.0, max(0.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))))


def chi_square(before: np.ndarray, now: np.ndarray) -> float:
    """How often two samples of one population have counts so different (Pearson's test of homogeneity)."""
    table = _table(before, now)
    if table is None:
        return 1.0
    expected = _expected(table)
    return chi_square_tail(float(((table - expected) ** 2 / expected).sum()), table.shape[1] - 1)


def counts_chance(before: np.ndarray, now: np.ndarray) -> float:
    """As `chi_square`, but never too small for cells with few rows: see the module's text."""
    table = _table(before, now)
    if table is None:
        return 1.0
    pooled = _pooled(table)
    if pooled.shape[1] < 2:
        return 1.0
    expected = _expected(pooled)
    pearson = float(((pooled - expected) ** 2 / expected).sum())
    ratio = 2 * float((pooled * np.log(np.maximum(pooled, 1) / expected)).sum())
    return chi_square_tail(min(pearson, ratio), pooled.shape[1] - 1)


def excess_chance(share: float, rows: int, before: float, rows_before: int) -> float:
    """No less often than so do `share` or more of `rows` rows show what a share `before` of other rows did.

    The true share is taken as large as three standard errors allow.
    """
    count = before * rows_before
    likely = min(1.0, (count + 1 + 3 * math.sqrt(count + 1)) / max(1, rows_before))
    if share <= likely:
        return 1.0
    apart = share * math.log(share / likely)
    if share < 1:
        apart += (1 - share) * math.log((1 - share) / (1 - likely))
    return math.exp(-rows * apart)


def chi_square_tail(value: float, freedom: int) -> float:
    """How often a chi-square of `freedom` degrees exceeds `value`: the upper regularised incomplete gamma function, by
    its series or continued fraction (Press and others, "Numerical Recipes", 6.2)."""
    a, x = freedom / 2, value / 2
    if x <= 0:
        return 1.0
    if not math.isfinite(x):
        return 0.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        n = a
        while term > total * 1e-16:
            n += 1
            term *= x / n
            total += term
        return max(0.0, 1 - total * scale)
    b = x + 1 - a
    c, d = 1e300, 1 / b
    h = d
    for i in range(1, 10_000):
        b += 2
        step = -i * (i - a)
        d = 1 / (step * d + b)
        c = b + step / c
        h *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return min(1.0, scale * h)


def shift_of_number(known: NumberProfile, now: np.ndarray, missing: int, chance: float) -> Shift:
    """How far the numbers of one input are from training.

    Args:
        known: The input's profile.
        now: New rows by bin (`profile.bins`).
        missing: New rows without a number.
        chance: What passes a limit more often than this by chance alone is no reason.
    """
    before, rows, old_rows = np.array(known.counts), int(now.sum()), int(sum(known.counts))
    share, reasons = _absence(known, old_rows, rows, missing, chance)
    if not rows or not old_rows:
        return Shift(known.name, 0.0, None, None, share, known.missing, 0.0, reasons)
    stability, distance = psi(before, now), ks(before, now)
    reasons += _unstable(stability, before, now, chance)
    if distance > KS_LIMIT and ks_chance(distance, rows, old_rows) < chance:
        reasons.append(f"KS {distance:.3f} is above {KS_LIMIT:g}")
    return Shift(known.name, stability, distance, None, share, known.missing, 0.0, reasons)


def shift_of_category(known: CategoryProfile, now: dict[str, int], missing: int, unknown: int, chance: float) -> Shift:
    """How far the categories of one input are from training.

    Args:
        known: The input's profile.
        now: New rows by category, unknown ones included.
        missing: New rows without a category.
        unknown: New rows with a category that training did not see.
        chance: As in `shift_of_number`.
    """
    rest = sum(now.values()) - sum(now.get(name, 0) for name in known.counts)
    before = np.array([*known.counts.values(), known.others])
    counts = np.array([*(now.get(name, 0) for name in known.counts), rest])
    rows, old_rows = int(counts.sum()), int(before.sum())
    share, reasons = _absence(known, old_rows, rows, missing, chance)
    strange = unknown / max(1, rows + missing)
    if not rows or not old_rows:
        return Shift(known.name, 0.0, None, None, share, known.missing, strange, reasons)
    stability = psi(before, counts)
    reasons += _unstable(stability, before, counts, chance)
    # of one population, further rows bring new categories as often as training held some in a single row (Good 1953)
    usual = known.single / (2 * old_rows)
    if strange > UNKNOWN_LIMIT + usual and excess_chance(strange, rows + missing, usual, 2 * old_rows) < chance:
        reasons.append(f"{strange:.1%} of the rows hold a category that training did not see")
    return Shift(known.name, stability, None, chi_square(before, counts), share, known.missing, strange, reasons)


def shift_of_date(known: DateProfile, now: np.ndarray, missing: int, unknown: dict[str, int], chance: float) -> Shift:
    """How far the dates of one input are from training. That they are later is shown and no reason: new rows are.

    Args:
        known: The input's profile.
        now: New rows by bin of their instant.
        missing: New rows without a date.
        unknown: By part of the date, new rows in which it has a value that training did not see.
        chance: As in `shift_of_number`.
    """
    found = shift_of_number(known.instants, now, missing, chance)
    rows = max(1, int(now.sum()) + missing)
    worst = max(unknown.values(), default=0) / rows
    reasons = [reason for reason in found.reasons if "missing" in reason]
    for part, count in unknown.items():
        if count / rows > UNKNOWN_LIMIT and excess_chance(count / rows, rows, 0.0, sum(known.instants.counts)) < chance:
            reasons.append(f"{count / rows:.1%} of the rows hold a {part} that training did not see")
    return msgspec.structs.replace(found, unknown=worst, reasons=reasons)


def _absence(
    known: NumberProfile | CategoryProfile, old_rows: int, rows: int, missing: int, chance: float
) -> tuple[float, list[str]]:
    """The share of missing cells, and whether it passes the limit. Rows are those with a value."""
    share = missing / max(1, rows + missing)
    likely = excess_chance(share, rows + missing, known.missing, old_rows)
    if share - known.missing > MISSING_LIMIT and likely < chance:
        return share, [f"{share:.1%} of the cells are missing; {known.missing:.1%} were in training"]
    return share, []


def _unstable(stability: float, before: np.ndarray, now: np.ndarray, chance: float) -> list[str]:
    if stability > PSI_LIMIT and counts_chance(before, now) < chance:
        return [f"PSI {stability:.3f} is above {PSI_LIMIT:g}"]
    return []


def _table(before: np.ndarray, now: np.ndarray) -> np.ndarray | None:
    """Both counts of the cells with rows, float64 [2, cells]; None if there is nothing to compare."""
    there = (before + now) > 0
    table = np.stack([before[there], now[there]]).astype(float)
    return table if table.shape[1] > 1 and table.sum(axis=1).all() else None


def _pooled(table: np.ndarray) -> np.ndarray:
    """The cells of a table, those too small to be compared by themselves together."""
    cells = table.T[np.argsort(-table.sum(axis=0), kind="stable")]
    share = table.sum(axis=1).min() / table.sum()
    pooled: list[np.ndarray] = []
    waiting = np.zeros(2)
    for cell in cells:
        waiting = waiting + cell
        if waiting.sum() * share >= _LEAST_EXPECTED:
            pooled.append(waiting)
            waiting = np.zeros(2)
    if pooled:
        pooled[-1] = pooled[-1] + waiting
    return np.array(pooled).reshape(-1, 2).T


def _expected(table: np.ndarray) -> np.ndarray:
    return table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
