"""What training rows look like, small enough for the bundle: what `raylway drift` compares new rows with (`shift`).

Numbers are counted in bins between 20-quantiles, categories by name. One half of the rows decides the quantiles and
which categories have a name, the other half is counted: bins and names that are chosen by the rows that they count fit
them better than any other rows, and these would be told to have drifted. Of text that is no category of the model's the
profile has shapes, no text of anybody's data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.features.encode import Columns
from raylway.features.learnt import Part
from raylway.features.schema import as_float64, canonical_text
from raylway.features.shapes import shapes
from raylway.features.signature import Signature

BINS = 20
PARTS: tuple[Part, ...] = ("weekday", "hour")
"""Of a date, what new rows have like old ones: they are later, but not on other days of the week."""
_KEY = 0x70726F66696C65
"""Of the chance that divides the rows: one that made-up data is not drawn by."""
_CATEGORIES = 100
"""So many of a column's categories are counted by name, the others together."""


class NumberProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    missing: float
    """Share of the rows as they were read: those that were left out for a missing cell count too."""
    minimum: float
    maximum: float
    mean: float
    edges: list[float]
    """Ascending and different: bin i holds values from edge i - 1 to below edge i; the outer bins are open."""
    counts: list[int]
    """Counted rows of each bin; one more than edges."""


class CategoryProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    missing: float
    """As of numbers."""
    counts: dict[str, int]
    """Counted rows of the most frequent categories."""
    others: int
    """Counted rows of all further ones."""
    single: int = 0
    """Categories that stand in one row only, of all rows."""
    of_shapes: bool = False
    """Whether these are shapes (`features.shapes`) and no texts."""


class DateProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    instants: NumberProfile
    """In seconds since 1970."""
    parts: list[CategoryProfile]
    """Those of `PARTS` that differ among the rows, named `column.part`."""


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a sample of the training rows."""

    rows: int
    numbers: list[NumberProfile]
    categories: list[CategoryProfile]
    dates: list[DateProfile] = []
    target: NumberProfile | None = None
    """Of a regression, where the rows have it."""


def profile(rows: pa.Table, signature: Signature, named: Collection[str], missing: Mapping[str, float]) -> Profile:
    """The profile of training rows.

    Args:
        rows: Typed source columns and the target, N rows.
        signature: The model's inputs.
        named: Those of which the transform knows the categories.
        missing: By input the share of the rows that have no value.
    """
    numbers, categories, dates = [], [], []
    columns = Columns(rows)
    for each in signature.inputs:
        share = missing.get(each.name, 0.0)
        if each.type == "number":
            numbers.append(_number(each.name, as_float64(rows[each.name]), share))
        elif each.type == "date":
            instants = _number(each.name, columns.number(each.name, "seconds"), share)
            parts = [_category(f"{each.name}.{part}", columns.text(each.name, part), share) for part in PARTS]
            dates.append(DateProfile(instants, [part for part in parts if len(part.counts) > 1]))
        else:
            texts = canonical_text(rows[each.name])
            is_known = each.name in named
            found = _category(each.name, texts if is_known else shapes(texts), share)
            categories.append(msgspec.structs.replace(found, of_shapes=not is_known))
    target = None
    if signature.task == "regression" and signature.target in rows.column_names:
        target = _number(signature.target, as_float64(rows[signature.target]), 0.0)
    return Profile(rows.num_rows, numbers, categories, dates, target)


def bins(edges: list[float], values: np.ndarray) -> np.ndarray:
    """How many of N values (float64; NaN is missing and not counted) fall between the edges: int64 [edges + 1]."""
    present = values[~np.isnan(values)]
    return np.bincount(np.searchsorted(np.array(edges), present, side="right"), minlength=len(edges) + 1)


def _number(name: str, values: np.ndarray, missing: float) -> NumberProfile:
    present = values[np.isfinite(values)]
    if not len(present):
        return NumberProfile(name, missing, 0.0, 0.0, 0.0, [], [0])
    chosen, counted = _halves(present)
    quantiles, times = np.unique(np.quantile(chosen, np.arange(1, BINS) / BINS, method="higher"), return_counts=True)
    # a value of so many rows that it is several quantiles has a bin for itself: what lies above it is something else
    edges = np.unique([*quantiles, *np.nextafter(quantiles[times > 1], np.inf)])
    edges = edges[np.isfinite(edges)].tolist()
    mean = float((present / len(present)).sum())
    low, high = float(present.min()), float(present.max())
    return NumberProfile(name, missing, low, high, mean, edges, bins(edges, counted).tolist())


def _category(name: str, texts: pa.Array, missing: float) -> CategoryProfile:
    present = texts.drop_null()
    chosen, counted = (_counts(pa.array(half, pa.string())) for half in _halves(present.to_numpy(zero_copy_only=False)))
    names = sorted(chosen, key=lambda text: (-chosen[text], text))[:_CATEGORIES]
    counts = {text: counted.get(text, 0) for text in names}
    single = sum(count == 1 for count in _counts(present).values())
    return CategoryProfile(name, missing, counts, sum(counted.values()) - sum(counts.values()), single)


def _counts(texts: pa.Array) -> dict[str, int]:
    return {pair["values"]: pair["counts"] for pair in pc.value_counts(texts).to_pylist()}


def _halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which half a row belongs to is chance, not its place; of a single row both are that row."""
    first = np.random.Generator(np.random.Philox(key=_KEY)).random(len(values)) < 0.5
    return (values[first], values[~first]) if first.any() and not first.all() else (values, values)
