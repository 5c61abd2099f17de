"""From typed columns to the model's inputs: what was fitted on the training rows, applied to any rows.

The model takes two matrices. `numeric` holds, feature by feature, the numbers of the numeric features (one each, or one
a bin), the columns of one-hot categories, and the indicators of missing cells, each behind its feature. `categorical`
holds one code for each feature with embedding codes: 0 unknown, then the categories, then one for all rare ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.errors import UserError
from raylway.features.derive import derived, parsed
from raylway.features.encode import Categories, Columns, Numbers
from raylway.features.learnt import Behind, CategoricalFeature, NumericFeature, Target
from raylway.features.schema import as_float64, canonical_text

_WITHOUT_VALUE = "has no value for this row, and the model was trained without such rows"

VERSION = 2
"""Raise it when `encode` gives other numbers for the same rows: prepared data is then made anew."""


@dataclass(frozen=True)
class Encoded:
    """Rows as the model takes them."""

    numeric: np.ndarray
    """float32 [N, `Transform.num_numeric`]"""
    categorical: np.ndarray
    """int32 [N, number of `Transform.category_counts`]; 0 is unknown"""


class Transform(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    derive: dict[str, str]
    """Derived features by name, in an order in which each reads only earlier ones."""
    numeric: list[NumericFeature]
    categorical: list[CategoricalFeature]
    behind: list[Behind]
    target: Target
    drops_missing: bool
    """Whether rows with missing cells were left out: such a row then has no answer, nothing is filled in."""

    @property
    def feature_names(self) -> list[str]:
        """Numeric, then categorical."""
        return [feature.name for feature in self.numeric] + [feature.name for feature in self.categorical]

    @property
    def embedded(self) -> list[CategoricalFeature]:
        """The features with codes, in the order of the model's categorical inputs."""
        return [feature for feature in self.categorical if not feature.one_hot]

    @property
    def category_counts(self) -> list[int]:
        """By categorical input of the model: its codes, the unknown (0) apart."""
        return [feature.count for feature in self.embedded]

    @property
    def num_numeric(self) -> int:
        """Numbers that the model takes for a row."""
        numbers = sum(feature.width + feature.indicator for feature in self.numeric)
        return numbers + sum(feature.count * feature.one_hot + feature.indicator for feature in self.categorical)

    @property
    def number_starts(self) -> list[int]:
        """Where each number begins among the `num_numeric` inputs. The bins of a feature are one: their sum ascends
        with it."""
        starts = [0]
        for feature in self.numeric:
            starts += [starts[-1] + feature.width] + [starts[-1] + feature.width + 1] * feature.indicator
        starts += range(starts[-1] + 1, self.num_numeric + 1)
        return starts[:-1]

    @property
    def numeric_names(self) -> list[str]:
        """A name for each of the `num_numeric` inputs."""
        names: list[str] = []
        for feature in self.numeric:
            pairs = zip(feature.edges, feature.edges[1:], strict=False)
            bins = [f"{feature.name} {low:.6g} to {high:.6g}" for low, high in pairs]
            names += bins or [feature.name]
            names += [f"{feature.name} is missing"] * feature.indicator
        for category in self.categorical:
            if category.one_hot:
                names += [f"{category.name} is {each}" for each in category.categories]
                names += [f"{category.name} is rare"] * bool(category.rare)
            names += [f"{category.name} is missing"] * category.indicator
        return names

    def encode(self, table: pa.Table) -> Encoded:
        """Encode the rows of a typed table that holds the raw inputs (further columns are ignored).

        For many small calls keep an `Encoder`.
        """
        return Encoder(self).encode(table)

    def encode_target(self, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """The target of N rows, none missing: class codes as int32, or the raw values as float64."""
        if self.target.task == "regression":
            return as_float64(column)
        codes = pc.index_in(canonical_text(column), pa.array(self.target.classes, pa.string()))
        return codes.to_numpy(zero_copy_only=False).astype(np.int32)


class Encoder:
    """`Transform.encode` with its constants laid out once, for many small calls.

    Functions of the user's are imported here: what they are now they stay.

    Raises:
        UserError: There is no such function.
    """

    def __init__(self, transform: Transform) -> None:
        self._transform = transform
        self._derive = parsed(transform.derive)
        for each in self._derive.values():
            each.load()
        self._numbers = Numbers(transform.numeric)
        self._categories = [Categories(feature) for feature in transform.categorical]

    def encode(self, table: pa.Table) -> Encoded:
        """As `Transform.encode`.

        Raises:
            UserError: A derived column can't be computed.
        """
        columns = Columns(derived(table, self._derive))
        numbers = np.empty((table.num_rows, len(self._transform.numeric)))
        for index, number in enumerate(self._transform.numeric):
            numbers[:, index] = columns.number(number.column, number.part)
        texts = [columns.text(feature.column, feature.part) for feature in self._transform.categorical]
        return self.encode_raw(numbers, texts)

    def encode_raw(self, numbers: np.ndarray, texts: Sequence[pa.Array]) -> Encoded:
        """Encode rows that come as the features' raw values, in the order of the transform's features.

        Args:
            numbers: float64 [N, numeric features]; NaN is missing.
            texts: For each categorical feature N canonical texts; null is missing.
        """
        codes = [categories.codes(column) for categories, column in zip(self._categories, texts, strict=True)]
        embedded = np.zeros((len(numbers), len(self._transform.category_counts)), np.int32)
        place = 0
        for feature, code in zip(self._transform.categorical, codes, strict=True):
            if not feature.one_hot:
                embedded[:, place] = code
                place += 1
        return Encoded(self.wide(numbers, texts, codes).astype(np.float32), embedded)

    def wide(self, numbers: np.ndarray, texts: Sequence[pa.Array], codes: Sequence[np.ndarray]) -> np.ndarray:
        """The model's numeric inputs in full precision, float64 [N, `num_numeric`]; arguments as in `encode_raw`."""
        parts = [self._numbers.encode(numbers)]
        for feature, column, code in zip(self._transform.categorical, texts, codes, strict=True):
            if feature.one_hot:
                parts.append((code[:, None] == np.arange(1, feature.count + 1)).astype(np.float64))
            if feature.indicator:
                parts.append(column.is_null().to_numpy(zero_copy_only=False).astype(np.float64)[:, None])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def unanswerable(self, table: pa.Table) -> dict[int, tuple[str, str]]:
        """By row the derived feature that keeps it from an answer, and why: it has no value (a zero divisor, say) where
        the training rows were left out for that, or the user's function fails on the row."""
        used = {feature.column for feature in self._transform.numeric}
        used |= {feature.column for feature in self._transform.categorical}
        found: dict[int, tuple[str, str]] = {}
        for name, each in self._derive.items():
            try:
                column = each.evaluate(table)
            except UserError as error:
                return self._halved(table) if table.num_rows > 1 else {0: (name, f"can't be computed: {error.what}")}
            table = table.append_column(name, column)
            if name in used and self._transform.drops_missing:
                rows = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist()
                found = dict.fromkeys(rows, (name, _WITHOUT_VALUE)) | found
        return found

    def _halved(self, table: pa.Table) -> dict[int, tuple[str, str]]:
        """`unanswerable`, of which some row of the table makes a function fail."""
        middle = table.num_rows // 2
        after = self.unanswerable(table.slice(middle))
        return self.unanswerable(table.slice(0, middle)) | {middle + row: why for row, why in after.items()}
