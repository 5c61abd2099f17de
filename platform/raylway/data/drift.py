"""`raylway drift`: new rows against the bundle's profile of the training rows, read in parts."""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.bundle.contents import BundleRecord
from raylway.data import inputs
from raylway.errors import UserError
from raylway.features.encode import Categories, Columns
from raylway.features.learnt import CategoricalFeature, Part
from raylway.features.profile import PARTS, CategoryProfile, DateProfile, NumberProfile, Profile, bins
from raylway.features.shapes import shapes
from raylway.features.shift import CHANCE, Shift, shift_of_category, shift_of_date, shift_of_number
from raylway.features.transform import Transform
from raylway.job.schema import Job

_MOST_NAMES = 10_000
"""Different categories of a column that are counted by name; further ones are counted together."""


class Drift(msgspec.Struct, frozen=True):
    """How far a file's rows are from training."""

    file: str
    rows: int
    unreadable: int
    """Rows that could not be read; they are in no count."""
    drifted: int
    """Inputs that pass a limit."""
    shifts: list[Shift]
    """By input, those that pass a limit first, then by PSI."""


def drift(record: BundleRecord, source: str, job: Job | None = None) -> Drift:
    """Compare rows with what a model was trained on; memory does not grow with them.

    Args:
        record: Of the model's bundle.
        source: File, glob, folder, or address, as in `data.source`.
        job: The run's, for how files are read.

    Raises:
        UserError: The bundle has no profile, the file can't be read, lacks an input or has no rows.
    """
    if record.profile is None:
        raise UserError(
            "the bundle has no profile of its training rows",
            where=record.name,
            fix="run the job again with this version of raylway",
        )
    counted = _counted(record.profile, record.transform)
    required = [each.name for each in record.signature.inputs if each.required]
    rows = unreadable = 0
    found = inputs.opened(source, record.signature, job)
    for table, rejects in inputs.tables(found, record.signature):
        rows += table.num_rows
        unreadable += rejects
        for each in counted:
            each.missing += table[each.column].null_count
        # the model saw no row with a missing cell where such rows are left out, so none is compared
        whole = table.filter(_present(table, required)) if required else table
        for each in counted:
            each.add(whole)
    if not rows:
        raise UserError("the file has no rows to compare", where=source, fix="name a file with rows")
    shifts = [each.shift(CHANCE / len(counted)) for each in counted]
    shifts.sort(key=lambda shift: (not shift.reasons, -shift.psi, shift.name))
    return Drift(source, rows, unreadable, sum(bool(shift.reasons) for shift in shifts), shifts)


def as_text(found: Drift) -> str:
    """For people: a line an input, the furthest first."""
    width = max((len(shift.name) for shift in found.shifts), default=5)
    unreadable = f"; {found.unreadable:,} could not be read" if found.unreadable else ""
    lines = [f"{found.rows:,} rows of {found.file}{unreadable}"]
    lines.append(f"{'input':<{width}}     PSI      KS  chi2 p  missing (before)  unknown")
    for shift in found.shifts:
        distance = "     –" if shift.ks is None else f"{shift.ks:6.3f}"
        chance = "     –" if shift.chi2_p is None else f"{shift.chi2_p:6.3f}"
        why = f"  DRIFT: {'; '.join(shift.reasons)}" if shift.reasons else ""
        lines.append(
            f"{shift.name:<{width}}  {shift.psi:6.3f}  {distance}  {chance}  "
            f"{shift.missing:7.1%} ({shift.missing_before:6.1%})  {shift.unknown:7.1%}{why}"
        )
    some = f"{found.drifted} of {len(found.shifts)} inputs have drifted"
    lines.append(some if found.drifted else "no input has drifted")
    return "\n".join(lines)


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
