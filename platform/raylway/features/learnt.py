"""What fitting learns of each feature and of the target: plain records, part of the transform in a bundle."""

from __future__ import annotations

from typing import Literal

import msgspec

from raylway.features.signature import Task

Scale = Literal["standard", "robust", "quantile", "log", "none"]
Part = Literal["", "year", "month", "day", "weekday", "hour", "seconds"]
"""Of a date; empty for a feature that is the column itself."""


class NumericFeature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the present training cells, where nothing else is said."""

    name: str
    column: str
    part: Part
    mean: float
    spread: float
    """Population standard deviation; 0 for a constant column."""
    minimum: float
    maximum: float
    scale: Scale
    centre: float
    unit: float
    """The scaled value is (x - centre) / unit, x being its signed log1p for `log`. 0: a constant column, which is 0 for
    every row."""
    points: list[float]
    """For `quantile` the training quantiles at equal shares from 0 to 1."""
    edges: list[float]
    """Of the bins, ascending, if the feature is piecewise linear; then nothing else scales it."""
    fill: float
    """Stands in for a missing cell."""
    indicator: bool
    """Whether one more input says that the cell was missing."""

    @property
    def width(self) -> int:
        """How many inputs of the model the number itself is."""
        return max(1, len(self.edges) - 1)


class CategoricalFeature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    name: str
    column: str
    part: Part
    categories: list[str]
    """The category of code i + 1."""
    rare: list[str]
    """Categories of too few training rows: they share the code behind those of `categories`."""
    most_frequent: str
    """Stands in for a missing cell; empty where training rows had none, which is the unknown."""
    one_hot: bool
    """Whether each code is a number of its own (0 or 1; all 0 for the unknown) instead of a code for an embedding."""
    indicator: bool
    constant: str | None = None
    """Stands in for a missing cell instead, if the job names one; a category where training rows missed cells."""

    @property
    def count(self) -> int:
        """Codes, the unknown apart."""
        return len(self.categories) + bool(self.rare)

    @property
    def known(self) -> list[str]:
        """Every category of the training rows."""
        return [*self.categories, *self.rare]


class Behind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A column that no feature is but a derived one reads: what may stand in a made-up row."""

    name: str
    minimum: float
    mean: float
    maximum: float
    """Of numbers; 0 of texts."""
    texts: list[str]
    """Shapes of frequent ones (`features.shapes`), the most frequent first, never a text itself; empty of numbers."""


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    task: Task
    classes: list[str]
    mean: float
    spread: float
    """For regression: the model learns (target - mean) / spread; a constant target has spread 1."""
