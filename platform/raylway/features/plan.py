"""What is to be fitted: each feature with the treatment that the job's `data.transform` gives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from raylway.errors import UserError
from raylway.features import dates
from raylway.features.learnt import Part, Scale
from raylway.features.schema import canonical_text
from raylway.features.signature import Task
from raylway.job import schema

MOST_POINTS = 1000
"""Quantiles that `scale: quantile` keeps, as scikit-learn's QuantileTransformer: all rows up to so many."""
_NUMBERS: tuple[Part, ...] = ("year", "seconds")
_CATEGORIES: tuple[Part, ...] = ("month", "day", "weekday", "hour")
"""Parts of a date: what grows without end is a number, what comes again is a category."""
_KEYS = {
    "numeric": {"scale", "impute", "indicator", "bins"},
    "categorical": {"categories", "rare", "impute", "indicator"},
    "date": {"scale", "impute", "indicator", "bins", "categories"},
}
"""Keys of `data.transform.columns` that mean something for a feature of each role."""
_STATISTICS = ("mean", "median", "most_frequent")


class Treatment(msgspec.Struct, frozen=True):
    """How one column becomes numbers."""

    scale: Scale
    impute: str | float
    """One of `_STATISTICS`, of categories the last of them only; else the constant: a number, a category, or a date."""
    indicator: bool
    bins: int | None
    one_hot: bool
    rare: int


@dataclass(frozen=True)
class Feature:
    """One feature: a column, or a part of a date."""

    column: str
    part: Part
    how: Treatment
    imputes: bool
    """Whether missing cells are filled in; else no training row has one."""

    @property
    def key(self) -> str:
        """Names it among all features; no column's name holds a zero character."""
        return f"{self.column}\0{self.part}" if self.part else self.column

    @property
    def name(self) -> str:
        return f"{self.column}.{self.part}" if self.part else self.column

    @property
    def scale(self) -> Scale:
        """What scales it; bins do it in their own way."""
        return "none" if self.how.bins else self.how.scale

    @property
    def constant(self) -> float | str | None:
        """What the job itself names to stand in for a missing cell: a number, or a canonical text of a category."""
        how = self.how.impute
        if how in _STATISTICS or not self.part:
            return None if how in _STATISTICS else how
        value = dates.parts(dates.parse(pa.array([how]))[0])[self.part]
        return float(value[0]) if self.part in _NUMBERS else str(value[0])

    @property
    def needs_most_frequent(self) -> bool:
        return self.imputes and self.how.impute == "most_frequent"

    @property
    def needs_quantiles(self) -> bool:
        needs_median = self.imputes and self.how.impute == "median"
        return bool(self.how.bins) or self.scale in ("robust", "quantile") or needs_median

    def shares(self, count: int) -> np.ndarray:
        """Which quantiles of `count` numbers it needs, float64."""
        needed = [np.array([0.25, 0.5, 0.75])]
        if self.how.bins:
            needed.append(self.bin_shares)
        if self.scale == "quantile":
            needed.append(point_shares(count))
        return np.concatenate(needed)

    @property
    def bin_shares(self) -> np.ndarray:
        return np.linspace(0.0, 1.0, (self.how.bins or 1) + 1)


class FitPlan(msgspec.Struct, frozen=True):
    """All that fitting needs to know of a job."""

    derive: dict[str, str]
    """What the features and the target need, in an order in which each reads only earlier ones."""
    served: list[str]
    """Those of them that the features need: a row to be answered has no target."""
    numeric: list[str]
    categorical: list[str]
    date: list[str]
    behind: list[str]
    """Source columns that are no features but are read by derived ones."""
    columns: dict[str, Treatment]
    """Of every feature (`treatments`)."""
    target: str
    task: Task
    classes: list[str]
    """In order; empty for regression."""
    drops_missing: bool
    """Whether rows with missing cells are left out: then none of the training rows has one, and nothing is imputed."""

    @property
    def numbers(self) -> list[Feature]:
        """The numeric features, dates' parts last."""
        return self._features(self.numeric, _NUMBERS)

    @property
    def categories(self) -> list[Feature]:
        """The categorical features, dates' parts last."""
        return self._features(self.categorical, _CATEGORIES)

    def _features(self, names: list[str], parts: tuple[Part, ...]) -> list[Feature]:
        imputes = not self.drops_missing
        whole = [Feature(name, "", self.columns[name], imputes) for name in names]
        return whole + [Feature(name, part, self.columns[name], imputes) for name in self.date for part in parts]


def point_shares(count: int) -> np.ndarray:
    """The equal shares at which `scale: quantile` keeps quantiles of `count` numbers."""
    return np.linspace(0.0, 1.0, max(1, min(MOST_POINTS, count)))


def treatments(
    section: schema.Transform, numeric: list[str], categorical: list[str], date: list[str]
) -> dict[str, Treatment]:
    """How each feature is treated: the section's own keys, and what differs for a column.

    Args:
        section: `data.transform` of the job.
        numeric: Names of the features of each role.
        categorical: As above.
        date: As above.

    Raises:
        UserError: A column has a key that its role has no use for; `where` is the dotted key.
    """
    roles = dict.fromkeys(numeric, "numeric") | dict.fromkeys(categorical, "categorical") | dict.fromkeys(date, "date")
    return {name: _treatment(section, name, role) for name, role in roles.items()}


def _treatment(section: schema.Transform, name: str, role: str) -> Treatment:
    own = section.columns.get(name, schema.ColumnTransform())
    given = {key: getattr(own, key) for key in sorted(own.model_fields_set)}
    for key, wanted in given.items():
        if key not in _KEYS[role]:
            raise UserError(
                f"{key} means nothing for the column {name!r}, which is {_WORDS[role]}",
                where=f"data.transform.columns.{name}.{key}",
                expected=f"keys for it: {', '.join(sorted(_KEYS[role]))}",
                found=f"{key}: {wanted}",
                fix=f"take the key out, or list the column under data.features.{_OTHER[role]}",
            )

    def value(key: str) -> Any:
        return getattr(section, key) if given.get(key) is None else given[key]

    bins = given["bins"] if "bins" in given else None if given.get("scale") else section.bins
    impute = _impute(section, own.impute, name, role)
    return Treatment(value("scale"), impute, value("indicator"), bins, value("categories") == "one_hot", value("rare"))


def _impute(section: schema.Transform, own: float | str | None, name: str, role: str) -> float | str:
    """`Treatment.impute` of a feature.

    Raises:
        UserError: What its column asks for can't stand in.
    """
    if own is None:
        if role == "categorical":
            return "most_frequent"
        return "mean" if role == "date" and isinstance(section.impute, float) else section.impute
    if role == "categorical" and own not in ("mean", "median"):
        return own if isinstance(own, str) else str(canonical_text(pa.array([own]))[0])
    if role != "categorical" and own in _STATISTICS:
        return own
    if role == "numeric" and isinstance(own, float):
        return own
    if role == "date" and isinstance(own, str) and dates.parse(pa.array([own]))[1][0]:
        return own
    raise UserError(
        f"this can't stand in for a missing cell of the column {name!r}, which is {_WORDS[role]}",
        where=f"data.transform.columns.{name}.impute",
        expected=_STAND_INS[role],
        found=str(own) if isinstance(own, str) else f"{own:g}",
        fix="write one of these, or take the key out",
    )


_WORDS = {"numeric": "numeric", "categorical": "a category", "date": "a date"}
_OTHER = {"numeric": "categorical", "categorical": "numeric", "date": "categorical or numeric"}
_STAND_INS = {
    "numeric": "mean, median, most_frequent or a number",
    "categorical": "most_frequent, or a category that is none of these words",
    "date": "mean, median, most_frequent or a date such as 2013-01-31",
}
