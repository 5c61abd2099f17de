"""`raylway drift`: new rows against the bundle's profile of the training rows, read in parts."""

from __future__ import annotations

import msgspec

from raylway.bundle.contents import BundleRecord
from raylway.data import inputs
from raylway.errors import UserError
from raylway.features.counted import Counts
from raylway.features.shift import Shift
from raylway.job.schema import Job


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
            expected="the profile that the rows are compared with",
            found="a bundle of an earlier version",
            fix="run the job again with this version of raylway",
        )
    counts = Counts(record.profile, record.transform, record.signature)
    unreadable = 0
    found = inputs.opened(source, record.signature, job)
    for table, rejects in inputs.tables(found, record.signature):
        unreadable += rejects
        counts.add(table)
    if not counts.rows:
        raise UserError(
            "the file has no rows to compare",
            where=source,
            expected="a row that can be read",
            found=f"{unreadable:,} that can't" if unreadable else "none",
            fix="name a file with rows",
        )
    shifts = sorted(counts.shifts(), key=lambda shift: (not shift.reasons, -shift.psi, shift.name))
    return Drift(source, counts.rows, unreadable, sum(bool(shift.reasons) for shift in shifts), shifts)


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
