"""What training rows look like, small enough for the bundle, and how far other rows are from it.

Numbers are counted in bins between the training rows' 20-quantiles, categories by name. Three measures compare counts:

- PSI, the population stability index: the sum of (new - old) * ln(new / old) over the shares. Below 0.1 is read as no
  change, above 0.25 as a large one (Siddiqi 2006, "Credit Risk Scorecards"); the usual line, 0.2, is ours. Of two
  samples of one population it follows a chi-square times (1/n + 1/m) (Yurdakul and Naranjo 2020, "Statistical
  properties of the population stability index"), so that small files are not told to have drifted by chance.
- KS, the largest distance between the two cumulated shares (numbers), at the edges of the bins.
- Chi-square: that the new counts come from the training shares (categories), as the chance of so large a value.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.features.schema import as_float64, canonical_text
from raylway.features.signature import Signature

BINS = 20
_CATEGORIES = 100
"""So many of a column's categories are counted by name, the others together."""
_LEAST_SHARE = 1e-4
"""Stands in for a share of zero, of which there is no logarithm."""

PSI_LIMIT = 0.2
KS_LIMIT = 0.15
MISSING_LIMIT = 0.1
"""More missing cells than in training, as a share of the rows."""
UNKNOWN_LIMIT = 0.05
"""Categories that training did not see, as a share of the rows."""
CHANCE = 0.001
"""A limit counts only where chance alone would reach such a value less often than this."""


class NumberProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    missing: float
    """Share of the rows."""
    minimum: float
    maximum: float
    mean: float
    edges: list[float]
    """Ascending and different: bin i holds values from edge i - 1 to below edge i; the outer bins are open."""
    counts: list[int]
    """Rows of each bin; one more than edges."""


class CategoryProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    missing: float
    counts: dict[str, int]
    """Rows of the most frequent categories."""
    others: int
    """Rows of all further ones."""


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a sample of the training rows."""

    rows: int
    numbers: list[NumberProfile]
    categories: list[CategoryProfile]


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


def profile(rows: pa.Table, signature: Signature) -> Profile:
    """The profile of training rows.

    Args:
        rows: Typed source columns, N rows.
        signature: The model's inputs.
    """
    numbers, categories = [], []
    for each in signature.inputs:
        if each.type == "number":
            numbers.append(_number(each.name, as_float64(rows[each.name])))
        elif each.type == "category":  # later rows have later dates: that tells no drift
            categories.append(_category(each.name, canonical_text(rows[each.name])))
    return Profile(rows.num_rows, numbers, categories)


def bins(edges: list[float], values: np.ndarray) -> np.ndarray:
    """How many of N values (float64; NaN is missing and not counted) fall between the edges: int64 [edges + 1]."""
    present = values[~np.isnan(values)]
    return np.bincount(np.searchsorted(np.array(edges), present, side="right"), minlength=len(edges) + 1)


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
    """How often two samples of one population have counts so different (test of homogeneity)."""
    there = (before + now) > 0
    table = np.stack([before[there], now[there]]).astype(float)
    if table.shape[1] < 2 or not table.sum(axis=1).all():
        return 1.0
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    return chi_square_tail(float(((table - expected) ** 2 / expected).sum()), table.shape[1] - 1)


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


def shift_of_number(known: NumberProfile, now: np.ndarray, missing: int) -> Shift:
    """How far the numbers of one input are from training.

    Args:
        known: The input's profile.
        now: New rows by bin (`bins`).
        missing: New rows without a number.
    """
    before, rows, old_rows = np.array(known.counts), int(now.sum()), int(sum(known.counts))
    share, reasons = _absence(known.missing, old_rows, rows, missing)
    if not rows or not old_rows:
        return Shift(known.name, 0.0, None, None, share, known.missing, 0.0, reasons)
    stability, distance = psi(before, now), ks(before, now)
    reasons += _unstable(stability, before, now)
    if distance > KS_LIMIT and ks_chance(distance, rows, old_rows) < CHANCE:
        reasons.append(f"KS {distance:.3f} is above {KS_LIMIT:g}")
    return Shift(known.name, stability, distance, None, share, known.missing, 0.0, reasons)


def shift_of_category(known: CategoryProfile, now: dict[str, int], missing: int, unknown: int) -> Shift:
    """How far the categories of one input are from training.

    Args:
        known: The input's profile.
        now: New rows by category, unknown ones included.
        missing: New rows without a category.
        unknown: New rows with a category that training did not see.
    """
    rest = sum(now.values()) - sum(now.get(name, 0) for name in known.counts)
    before = np.array([*known.counts.values(), known.others])
    counts = np.array([*(now.get(name, 0) for name in known.counts), rest])
    rows, old_rows = int(counts.sum()), int(before.sum())
    share, reasons = _absence(known.missing, old_rows, rows, missing)
    strange = unknown / max(1, rows + missing)
    if not rows or not old_rows:
        return Shift(known.name, 0.0, None, None, share, known.missing, strange, reasons)
    stability = psi(before, counts)
    reasons += _unstable(stability, before, counts)
    if strange > UNKNOWN_LIMIT:
        reasons.append(f"{strange:.1%} of the rows hold a category that training did not see")
    return Shift(known.name, stability, None, chi_square(before, counts), share, known.missing, strange, reasons)


def _absence(missing_before: float, rows_before: int, rows: int, missing: int) -> tuple[float, list[str]]:
    """The share of missing cells, and whether it passes the limit. Rows are those with a value."""
    share = missing / max(1, rows + missing)
    total = round(rows_before / (1 - missing_before)) if missing_before < 1 else 0
    before = np.array([rows_before, total - rows_before])
    if share - missing_before > MISSING_LIMIT and chi_square(before, np.array([rows, missing])) < CHANCE:
        return share, [f"{share:.1%} of the cells are missing; {missing_before:.1%} were in training"]
    return share, []


def _number(name: str, values: np.ndarray) -> NumberProfile:
    present = values[np.isfinite(values)]
    if not len(present):
        return NumberProfile(name, 1.0, 0.0, 0.0, 0.0, [], [0])
    edges = np.unique(np.quantile(present, np.arange(1, BINS) / BINS, method="higher")).tolist()
    missing = 1 - len(present) / len(values)
    low, high = float(present.min()), float(present.max())
    return NumberProfile(name, missing, low, high, float(present.mean()), edges, bins(edges, present).tolist())


def _category(name: str, texts: pa.Array) -> CategoryProfile:
    counted = pc.value_counts(texts.drop_null()).to_pylist()
    ordered = sorted(((pair["values"], pair["counts"]) for pair in counted), key=lambda pair: (-pair[1], pair[0]))
    others = sum(count for _, count in ordered[_CATEGORIES:])
    return CategoryProfile(name, texts.null_count / max(1, len(texts)), dict(ordered[:_CATEGORIES]), others)


def _unstable(stability: float, before: np.ndarray, now: np.ndarray) -> list[str]:
    freedom = int(((before + now) > 0).sum()) - 1
    spread = 1 / before.sum() + 1 / now.sum()
    if stability > PSI_LIMIT and freedom and chi_square_tail(stability / spread, freedom) < CHANCE:
        return [f"PSI {stability:.3f} is above {PSI_LIMIT:g}"]
    return []
