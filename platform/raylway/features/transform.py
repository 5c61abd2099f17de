"""From typed columns to the model's numbers: fitted on training rows only, in one pass whose parts merge.

Numbers are standardised with the population spread (as scikit-learn's StandardScaler); categories become codes, 0 for
unknown. The same object encodes rows in preparation, evaluation and serving.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.features.expression import Expression
from raylway.features.schema import as_float64, canonical_text, sorted_names
from raylway.features.signature import Task

VERSION = 1
"""Raise it when `encode` gives other numbers for the same rows: prepared data is then made anew."""

_LARGEST_SCALED = 1e6
"""A training row can't be further from the mean than sqrt(rows) spreads, so the bound only tames wild served rows:
their products stay finite in float32."""


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


@dataclass
class Statistics:
    """What fitting needs to know of some rows; parts merge into the statistics of all rows."""

    numeric: dict[str, Moments] = field(default_factory=dict)
    categorical: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, table: pa.Table, numeric: list[str], categorical: list[str]) -> Statistics:
        """Of the rows of a typed table, over the named columns."""
        return cls(
            {name: Moments.of(as_float64(table[name])) for name in numeric},
            {name: _counts(canonical_text(table[name])) for name in categorical},
        )

    def merged(self, other: Statistics) -> Statistics:
        """These rows followed by the other's."""
        return Statistics(
            {name: self.numeric.get(name, Moments()).merged(part) for name, part in other.numeric.items()},
            {name: self.categorical.get(name, Counter()) + part for name, part in other.categorical.items()},
        )


class NumericFeature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    mean: float
    spread: float
    """Population standard deviation; 0 for a constant column, which is then 0 for every row."""
    minimum: float
    maximum: float


class CategoricalFeature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    categories: list[str]
    """The category of code i + 1."""
    most_frequent: str
    """Stands in for a missing cell; empty where training rows had none, which is the unknown."""


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    task: Task
    classes: list[str]
    mean: float
    spread: float
    """For regression: the model learns (target - mean) / spread; a constant target has spread 1."""


@dataclass(frozen=True)
class Encoded:
    """Rows as the model takes them."""

    numeric: np.ndarray
    """float32 [N, number of numeric features]"""
    categorical: np.ndarray
    """int32 [N, number of categorical features]; 0 is unknown"""


class Transform(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    derive: dict[str, str]
    """Derived features by name, in an order in which each reads only earlier ones."""
    numeric: list[NumericFeature]
    categorical: list[CategoricalFeature]
    target: Target

    @property
    def feature_names(self) -> list[str]:
        """Numeric, then categorical: the order of the model's inputs."""
        return [feature.name for feature in self.numeric] + [feature.name for feature in self.categorical]

    def encode(self, table: pa.Table) -> Encoded:
        """Encode the rows of a typed table that holds the raw inputs (further columns are ignored).

        A missing number becomes the training mean, a missing category the most frequent one, an unseen category 0.
        """
        return Encoder(self).encode(table)

    def encode_target(self, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """The target of N rows, none missing: class codes as int32, or the raw values as float64."""
        if self.target.task == "regression":
            return as_float64(column)
        codes = pc.index_in(canonical_text(column), pa.array(self.target.classes, pa.string()))
        return codes.to_numpy(zero_copy_only=False).astype(np.int32)


class Encoder:
    """`Transform.encode` with its constants laid out once, for many small calls."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform
        self._mean = np.array([feature.mean for feature in transform.numeric])
        self._spread = np.array([feature.spread or 1.0 for feature in transform.numeric])
        self._constant = np.array([not feature.spread for feature in transform.numeric], bool)
        self._categories = [pa.array(feature.categories, pa.string()) for feature in transform.categorical]
        self._booleans = [_are_booleans(feature.categories) for feature in transform.categorical]

    def encode(self, table: pa.Table) -> Encoded:
        """As `Transform.encode`."""
        table = derived(table, self._transform.derive)
        numbers = np.empty((table.num_rows, len(self._mean)))
        for index, feature in enumerate(self._transform.numeric):
            numbers[:, index] = as_float64(table[feature.name])
        texts = [canonical_text(table[feature.name]) for feature in self._transform.categorical]
        return Encoded(self.scale(numbers), self.codes(texts, table.num_rows))

    def scale(self, numbers: np.ndarray) -> np.ndarray:
        """Raw values of the numeric features, float64 [N, D] with NaN for missing, as float32 [N, D]."""
        with np.errstate(over="ignore"):
            scaled = (numbers - self._mean) / self._spread
        scaled[:, self._constant] = 0.0
        return np.clip(np.nan_to_num(scaled, nan=0.0), -_LARGEST_SCALED, _LARGEST_SCALED).astype(np.float32)

    def codes(self, texts: list[pa.Array], rows: int) -> np.ndarray:
        """Canonical texts of the C categorical features, null for missing, as int32 [rows, C]."""
        codes = np.zeros((rows, len(texts)), np.int32)
        for index, feature in enumerate(self._transform.categorical):
            filled, known = pc.fill_null(texts[index], feature.most_frequent), self._categories[index]
            if self._booleans[index]:
                filled, known = pc.utf8_lower(filled), pc.utf8_lower(known)
            found = pc.fill_null(pc.index_in(filled, known), -1)
            codes[:, index] = found.to_numpy(zero_copy_only=False) + 1
        return codes


def _are_booleans(categories: list[str]) -> bool:
    """Whether the categories are true and false in one spelling: a file's `True` and JSON's `true` are then one."""
    lower = {name.lower() for name in categories}
    return lower <= {"true", "false"} and len(lower) == len(categories)


def derived(table: pa.Table, derive: dict[str, str]) -> pa.Table:
    """The table with derived columns added; one that is there already is kept as it is."""
    for name, text in derive.items():
        if name not in table.column_names:
            table = table.append_column(name, Expression(text, f"data.derive.{name}").evaluate(table))
    return table


def fit(statistics: Statistics, derive: dict[str, str], target: Target) -> Transform:
    """The transform of the training rows behind `statistics`."""
    return Transform(
        derive=derive,
        numeric=[
            # without a present training cell there is no range, and JSON has no infinity
            NumericFeature(name, part.mean, part.spread, *((part.minimum, part.maximum) if part.count else (0.0, 0.0)))
            for name, part in statistics.numeric.items()
        ],
        categorical=[
            CategoricalFeature(name, sorted_names(set(counts)), _most_frequent(counts))
            for name, counts in statistics.categorical.items()
        ],
        target=target,
    )


def _most_frequent(counts: Counter[str]) -> str:
    """The first in code point order of those that stand most often."""
    return min(counts, key=lambda text: (-counts[text], text), default="")


def _counts(texts: pa.Array) -> Counter[str]:
    return Counter({pair["values"]: pair["counts"] for pair in texts.drop_null().value_counts().to_pylist()})
