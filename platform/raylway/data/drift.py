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
from raylway.features.profile import CategoryProfile, NumberProfile, Shift, bins, shift_of_category, shift_of_number
from raylway.job.schema import Job

_MOST_NAMES = 10_000
"""Different categories of a column that are counted by name; further ones are counted together."""


class Drift(msgspec.Struct, frozen=True):
    """How far a file's rows are from training."""

    file: str
    rows: int
    unreadable: int
    """Rows that could not be read; they are in no count."""
    shifts: list[Shift]
    """By input, those that pass a limit first, then by PSI."""

    @property
    def is_past_limits(self) -> bool:
        return any(shift.reasons for shift in self.shifts)


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
            expected="the profile that the rows are compared with",
            found="a bundle of an earlier version",
            fix="run the job again with this version of raylway",
        )
    numbers = {each.name: _Numbers(each) for each in record.profile.numbers}
    known = {each.name: set(each.categories) for each in record.transform.categorical}
    categories = {
        each.name: _Categories(each, known.get(each.name, set(each.counts))) for each in record.profile.categories
    }
    rows = unreadable = 0
    found = inputs.opened(source, record.signature, job)
    for table, rejects in inputs.tables(found, record.signature, record.transform):
        rows += table.num_rows
        unreadable += rejects
        for name, number in numbers.items():
            number.add(table[name])
        for name, category in categories.items():
            category.add(table[name])
    if not rows:
        raise UserError(
            "the file has no rows to compare",
            where=source,
            expected="a row that can be read",
            found=f"{unreadable:,} that can't" if unreadable else "none",
            fix="name a file with rows",
        )
    shifts = [number.shift() for number in numbers.values()]
    shifts += [category.shift() for category in categories.values()]
    shifts.sort(key=lambda shift: (not shift.reasons, -shift.psi, shift.name))
    return Drift(source, rows, unreadable, shifts)


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
    drifted = sum(bool(shift.reasons) for shift in found.shifts)
    lines.append(f"{drifted} of {len(found.shifts)} inputs have drifted" if drifted else "no input has drifted")
    return "\n".join(lines)


class _Numbers:
    def __init__(self, known: NumberProfile) -> None:
        self._known = known
        self._counts = np.zeros(len(known.counts), np.int64)
        self._missing = 0

    def add(self, column: pa.ChunkedArray) -> None:
        values = column.to_numpy(zero_copy_only=False)
        counts = bins(self._known.edges, values)
        self._counts += counts
        self._missing += len(values) - int(counts.sum())

    def shift(self) -> Shift:
        return shift_of_number(self._known, self._counts, self._missing)


class _Categories:
    def __init__(self, known: CategoryProfile, trained: set[str]) -> None:
        self._known, self._trained = known, trained
        self._counts: Counter[str] = Counter()
        self._missing = self._unknown = 0

    def add(self, column: pa.ChunkedArray) -> None:
        self._missing += column.null_count
        for pair in pc.value_counts(column.drop_null()).to_pylist():
            name, count = pair["values"], pair["counts"]
            if name not in self._trained:
                self._unknown += count
            if name not in self._counts and len(self._counts) >= _MOST_NAMES and name not in self._known.counts:
                name = ""  # counted as one of the others
            self._counts[name] += count

    def shift(self) -> Shift:
        return shift_of_category(self._known, self._counts, self._missing, self._unknown)
