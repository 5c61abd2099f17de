"""From raw values to the model's numbers: the one code that preparation, evaluation, prediction and serving run.

Every operation works on each cell by itself, so a row's bits do not depend on the rows that are encoded with it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.features import dates
from raylway.features.learnt import CategoricalFeature, NumericFeature, Part
from raylway.features.schema import as_float64, canonical_text

LARGEST_SCALED = 1e6
"""Or what the training rows reach, if that is more. The bound only tames wild served rows: their products stay finite
in float32."""


class Columns:
    """The features' raw values in a typed table; a date is read once for all of its parts."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._dates: dict[str, tuple[dict[str, np.ndarray], np.ndarray]] = {}

    def number(self, column: str, part: Part = "") -> np.ndarray:
        """float64 [N]; NaN is missing."""
        if not part:
            return as_float64(self._table[column])
        parts, valid = self._parts(column)
        return np.where(valid, parts[part], np.nan)

    def text(self, column: str, part: Part = "") -> pa.Array:
        """N canonical texts; null is missing."""
        if not part:
            return canonical_text(self._table[column])
        parts, valid = self._parts(column)
        return canonical_text(pa.array(parts[part], mask=~valid))

    def _parts(self, column: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
        if column not in self._dates:
            instants, valid = dates.parse(self._table[column])
            self._dates[column] = dates.parts(instants), valid
        return self._dates[column]


class Numbers:
    """The numeric features of a transform, with their constants laid out once."""

    def __init__(self, features: list[NumericFeature]) -> None:
        self._features = features
        self._fill = np.array([feature.fill for feature in features])
        self._centre = np.array([feature.centre for feature in features])
        self._unit = np.array([feature.unit or 1.0 for feature in features])
        self._constant = np.array([not feature.unit for feature in features], bool)
        self._logged = np.flatnonzero([feature.scale == "log" and not feature.edges for feature in features])
        self._indicated = np.flatnonzero([feature.indicator for feature in features])
        widths = [feature.width + feature.indicator for feature in features]
        self._starts = np.cumsum([0, *widths])
        self._curved = [(place, *curve) for place, feature in enumerate(features) for curve in _curve(feature)]
        self._bound = np.full(len(features), LARGEST_SCALED)
        ends = np.array([[feature.minimum for feature in features], [feature.maximum for feature in features]])
        self._bound = np.maximum(LARGEST_SCALED, np.abs(self._scaled(ends)).max(axis=0, initial=0.0))

    def encode(self, numbers: np.ndarray) -> np.ndarray:
        """float64 [N, features], NaN for missing, as float64 [N, inputs]."""
        missing = np.isnan(numbers)
        filled = np.where(missing, self._fill, numbers)
        scaled = self._scaled(filled)
        np.clip(scaled, -self._bound, self._bound, out=scaled)
        if self._starts[-1] == len(self._features):
            result = scaled
        else:
            result = np.empty((len(numbers), self._starts[-1]))
            result[:, self._starts[:-1]] = scaled
            places = self._starts[1:][self._indicated] - 1
            result[:, places] = missing[:, self._indicated]
        for place, curve, points in self._curved:
            start, width = self._starts[place], self._features[place].width
            result[:, start : start + width] = curve(np.ascontiguousarray(filled[:, place]), points)
        return result

    def _scaled(self, filled: np.ndarray) -> np.ndarray:
        if len(self._logged):
            filled = filled.copy()
            some = np.ascontiguousarray(filled[:, self._logged])
            filled[:, self._logged] = signed_log(some)
        with np.errstate(over="ignore"):
            scaled = (filled - self._centre) / self._unit
        scaled[:, self._constant] = 0.0
        return scaled


class Categories:
    """One categorical feature, with its names laid out once."""

    def __init__(self, feature: CategoricalFeature) -> None:
        self._fill = feature.most_frequent if feature.constant is None else feature.constant
        self._fold = _are_booleans([name for name in feature.known if name != feature.constant])
        self._known = self.spelt(pa.array(feature.known, pa.string()))
        self._last = feature.count

    def spelt(self, texts: pa.Array) -> pa.Array:
        """N canonical texts, true and false in one spelling where they are the categories."""
        return pc.utf8_lower(texts) if self._fold else texts

    def codes(self, texts: pa.Array) -> np.ndarray:
        """int32 [N] of N canonical texts, null for missing."""
        filled = self.spelt(pc.fill_null(texts, self._fill))
        found = pc.fill_null(pc.index_in(filled, self._known), -1).to_numpy(zero_copy_only=False) + 1
        return np.minimum(found, self._last).astype(np.int32)  # the rare ones stand last


def signed_log(values: np.ndarray) -> np.ndarray:
    """sign(x) log(1 + |x|)."""
    return np.sign(values) * np.log1p(np.abs(values))


def piecewise_linear(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """N numbers over T bins, float64 [N, T]: Gorishniy, Rubachev, Babenko 2022, "On Embeddings for Numerical Features
    in Tabular Deep Learning" (arXiv 2203.05556), equation 1.

    Component t is (x - b[t-1]) / (b[t] - b[t-1]), from 0 to 1; the first goes on below 0, the last above 1.
    """
    with np.errstate(over="ignore"):
        parts = (values[:, None] - edges[:-1]) / np.diff(edges)
    np.maximum(parts[:, 1:], 0.0, out=parts[:, 1:])
    np.minimum(parts[:, :-1], 1.0, out=parts[:, :-1])
    return np.clip(parts, -LARGEST_SCALED, LARGEST_SCALED)


def share_below(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """N numbers as shares of the training rows, float64 [N, 1] from 0 to 1.

    Linear between the quantiles; a value that equals several of them gets the middle of their shares, and what lies on
    or beyond the outermost ones 0 or 1 (as scikit-learn's QuantileTransformer).
    """
    last = len(points) - 1
    low = np.clip(np.searchsorted(points, values, side="right") - 1, 0, last)
    high = np.clip(np.searchsorted(points, values, side="left"), 0, last)
    inside = low < high  # else the value is one of the quantiles, the highest of its equals at `low`
    weight = np.zeros(len(values))
    np.divide(values - points[low], points[high] - points[low], out=weight, where=inside)
    place = np.where(inside, low + weight, 0.5 * (low + high)) / max(1, last)
    return np.where(values <= points[0], 0.0, np.where(values >= points[-1], 1.0, place))[:, None]


def _curve(feature: NumericFeature) -> list[tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], np.ndarray]]:
    """How the feature bends, if it does: the function, and its edges or quantiles."""
    if feature.edges:
        return [(piecewise_linear, np.array(feature.edges))]
    return [(share_below, np.array(feature.points))] if feature.points else []


def _are_booleans(categories: list[str]) -> bool:
    """Whether the categories are true and false in one spelling: a file's `True` and JSON's `true` are then one."""
    lower = {name.lower() for name in categories}
    return lower <= {"true", "false"} and len(lower) == len(categories)
