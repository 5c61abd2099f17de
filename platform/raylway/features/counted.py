"""New rows counted as a profile of the training rows counts them, to be compared with it (`shift`)."""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.features.encode import Categories, Columns
from raylway.features.learnt import CategoricalFeature, Part
from raylway.features.profile import PARTS, CategoryProfile, DateProfile, NumberProfile, Profile, bins
from raylway.features.shapes import shapes
from raylway.features.shift import CHANCE, Shift, shift_of_category, shift_of_date, shift_of_number
from raylway.features.signature import Signature
from raylway.features.transform import Transform

_MOST_NAMES = 10_000
"""Different categories of a column that are counted by name; further ones are counted together."""


class Counts:
    """Memory does not grow with the rows.

    Args:
        known: The profile.
        transform: The model's, for the names of its categories.
        signature: The model's inputs.
    """

    def __init__(self, known: Profile, transform: Transform, signature: Signature) -> None:
        self.rows = 0
        self._counted = _counted(known, transform)
        self._required = [each.name for each in signature.inputs if each.required]

    def add(self, table: pa.Table) -> None:
        """Count the rows of a typed table of the inputs."""
        self.rows += table.num_rows
        for each in self._counted:
            each.missing += table[each.column].null_count
        # the model saw no row with a missing cell where such rows are left out, so none is compared
        whole = table.filter(_present(table, self._required)) if self._required else table
        for each in self._counted:
            each.add(whole)

    def shifts(self) -> list[Shift]:
        """How far each input is from training, in the order of the profile."""
        return [each.shift(CHANCE / len(self._counted)) for each in self._counted]


def _counted(known: Profile, transform: Transform) -> list[_Numbers | _Categories | _Dates]:
    features = {(each.column, each.part): each for each in transform.categorical}
    counted: list[_Numbers | _Categories | _Dates] = [_Numbers(each) for each in known.numbers]
    counted += [_Categories(each, each.name, "", features.get((each.name, ""))) for each in known.categories]
    for each in known.dates:
        column = each.instants.name
        counted.append(_Dates(each, [feature for feature in transform.categorical if feature.column == column]))
        counted += [_Categories(part, column, _part(part.name), None) for part in each.parts]
    return counted


def _part(name: str) -> Part:
    """Of a profile that is named `column.part`."""
    return next(part for part in PARTS if name.endswith(f".{part}"))


def _present(table: pa.Table, names: list[str]) -> pa.Array:
    present = np.ones(table.num_rows, bool)
    for name in names:
        present &= table[name].is_valid().to_numpy()
    return pa.array(present)


class _Numbers:
    def __init__(self, known: NumberProfile) -> None:
        self.column, self.missing = known.name, 0
        self._known = known
        self._counts = np.zeros(len(known.counts), np.int64)

    def add(self, table: pa.Table) -> None:
        self._counts += bins(self._known.edges, table[self.column].to_numpy())

    def shift(self, chance: float) -> Shift:
        return shift_of_number(self._known, self._counts, self.missing, chance)


class _Categories:
    """Categories by name, shapes of texts, or a part of a date."""

    def __init__(self, known: CategoryProfile, column: str, part: Part, feature: CategoricalFeature | None) -> None:
        self.column, self.missing = column, 0
        self._part: Part = part
        self._trained = Categories(feature) if feature else None
        names = pa.array(known.counts, pa.string())
        spelt = self._trained.spelt(names).to_pylist() if self._trained else names.to_pylist()
        counts = dict(zip(spelt, known.counts.values(), strict=True))
        self._known = msgspec.structs.replace(known, counts=counts)
        self._counts: Counter[str] = Counter()
        self._unknown = 0

    def add(self, table: pa.Table) -> None:
        texts = Columns(table).text(self.column, self._part).drop_null()
        if self._known.of_shapes:
            texts = shapes(texts)
        if self._trained:
            texts = self._trained.spelt(texts)
            self._unknown += int((self._trained.codes(texts) == 0).sum())
        for pair in pc.value_counts(texts).to_pylist():
            name, count = pair["values"], pair["counts"]
            if name not in self._counts and len(self._counts) >= _MOST_NAMES and name not in self._known.counts:
                name = ""  # counted as one of the others
            self._counts[name] += count

    def shift(self, chance: float) -> Shift:
        return shift_of_category(self._known, self._counts, self.missing, self._unknown, chance)


class _Dates:
    """A date's instant, and those of its parts that the model has codes for."""

    def __init__(self, known: DateProfile, features: list[CategoricalFeature]) -> None:
        self.column, self.missing = known.instants.name, 0
        self._known = known
        self._features = [(each.part, Categories(each)) for each in features]
        self._counts = np.zeros(len(known.instants.counts), np.int64)
        self._unknown: Counter[str] = Counter()

    def add(self, table: pa.Table) -> None:
        columns = Columns(table)
        self._counts += bins(self._known.instants.edges, columns.number(self.column, "seconds"))
        for part, trained in self._features:
            texts = columns.text(self.column, part).drop_null()
            self._unknown[part] += int((trained.codes(texts) == 0).sum())

    def shift(self, chance: float) -> Shift:
        return shift_of_date(self._known, self._counts, self.missing, self._unknown, chance)
